"""Count the float32 rows that an exact search through int8 codes reads.

    python -m benchmarks.rows_read [--vectors FILE.npy --queries FILE.npy] [--k 1 10 100]

Without files the vectors are normal numbers, which are the hardest: all are equally far from a
query. A count depends on the instruction set, which decides the first digits of a query, and a
little on the threads, but never on a clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.arguments import Parser, at_least_one
from benchmarks.harness.measure import facts
from benchmarks.harness.registry import shape_text
from benchmarks.harness.results import COLUMNS, add, aligned, row_of
from benchmarks.harness.timing import Case
from benchmarks.ops import corpora

N_QUERIES = 64
COLUMNS_HERE = [*COLUMNS, "vectors", "rows_read"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from fastrag.ops import backends

    parser = Parser("rows_read", __doc__)
    for name, size in (("vectors", "[N, D]"), ("queries", "[B, D]")):
        parser.add_argument(f"--{name}", type=Path, help=f"float32 {size}, .npy; default: normal")
    ks = (1, 10, 100)
    parser.add_argument(
        "--k", type=at_least_one, nargs="+", default=ks, help=f"hits; default: {ks}"
    )
    parser.add_csv(COLUMNS_HERE)
    args = parser.parse_args(argv)
    if (args.vectors is None) != (args.queries is None):
        parser.error("--vectors, --queries: expected both or neither")
    if backends.why_not("cpp"):
        parser.error(backends.why_not("cpp"))
    args.sets = [("normal", partial(_normal, n, 768)) for n in (200_000, 1_000_000)]
    if args.vectors:
        try:
            vectors, queries = corpora.read(args.vectors), corpora.read(args.queries)
        except ValueError as error:
            parser.error(str(error))
        if vectors.shape[1] != queries.shape[1]:
            expected = f"expected the width of --vectors, {vectors.shape[1]}"
            parser.error(f"--queries: {expected}, got {queries.shape[1]}")
        args.sets = [(args.vectors.stem, lambda: (vectors, queries))]
    return args


def _normal(n_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    made = torch.randn(n_rows + N_QUERIES, dim, generator=torch.Generator().manual_seed(0))
    return made[:n_rows], made[n_rows:]


def count(vectors: Tensor, queries: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Return the mean number of rows read for a query, by k."""
    from fastrag.index import codec
    from fastrag.ops.cpp import CodedIndex

    made = codec.fit_int8([vectors])
    index = CodedIndex(vectors, made.encode(vectors)[0], **made.arguments)
    return {k: sum(index.n_rows_read(q[None], k) for q in queries) / len(queries) for k in ks}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    machine, rows = facts(torch.device("cpu")), []
    table = [["vectors", "N,D,k,B", "rows read for a query"]]
    for name, make in args.sets:
        vectors, queries = make()
        queries = queries[:N_QUERIES]
        for k, found in count(vectors, queries, [k for k in args.k if k <= len(vectors)]).items():
            shape = (*vectors.shape, k, len(queries))
            case = Case("mips", "cpp", "int8-float32", shape, "float32", "cpu")
            rows.append(row_of(case, machine, "ok", vectors=name, rows_read=f"{found:.1f}"))
            table.append([name, shape_text(shape), f"{found:.1f}"])
    if args.csv:
        add(args.csv, rows, COLUMNS_HERE)
    print(aligned(table, 2, indent=""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
