"""Counts the float32 rows that an exact search through int8 codes reads.

    python -m benchmarks.rows_read [--vectors FILE.npy --queries FILE.npy] [--k 1 10 100]

Without files: normal numbers, which are the hardest, all equally far from a query. A count depends
on the instruction set, whose first digits of a query differ, and a little on the threads; never on
a clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.arguments import Parser, check_csv
from benchmarks.harness.measure import facts
from benchmarks.harness.report import COLUMNS, add_to_csv, aligned, shape_text

KS = (1, 10, 100)
N_QUERIES = 64
COLUMNS_HERE = [*COLUMNS, "vectors", "rows_read"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from fastrag.ops import backends

    parser = Parser(prog="benchmarks.rows_read", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vectors", type=Path, help="float32 [N, D], .npy; with --queries")
    parser.add_argument("--queries", type=Path, help="float32 [B, D], .npy; with --vectors")
    parser.add_argument("--k", type=int, nargs="+", default=KS, help="hits; default: 1 10 100")
    parser.add_argument("--csv", type=Path, help="file to add the rows to")
    args = parser.parse_args(argv)
    if (args.vectors is None) != (args.queries is None):
        parser.error("--vectors, --queries: expected both or neither")
    if min(args.k) < 1:
        parser.error(f"--k: expected at least 1, got {min(args.k)}")
    check_csv(parser, args.csv, COLUMNS_HERE)
    if backends.why_not("cpp"):
        parser.error(backends.why_not("cpp"))
    args.sets = NORMAL
    if args.vectors:
        vectors, queries = (_read(parser, file) for file in (args.vectors, args.queries))
        if vectors.shape[1] != queries.shape[1]:
            parser.error(
                f"--queries: expected the width of --vectors, {vectors.shape[1]}, got "
                f"{queries.shape[1]}"
            )
        args.sets = ((args.vectors.stem, lambda: (vectors, queries)),)
    return args


def _read(parser: Parser, file: Path) -> Tensor:
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}")
    if found.ndim != 2 or found.dtype != np.float32 or not found.size:
        parser.error(f"{file}: expected float32 [n, D], got {found.dtype} {list(found.shape)}")
    return torch.from_numpy(found)


def _normal(n_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    made = torch.randn(n_rows + N_QUERIES, dim, generator=torch.Generator().manual_seed(0))
    return made[:n_rows], made[n_rows:]


NORMAL = tuple(("normal", partial(_normal, n, 768)) for n in (200_000, 1_000_000))


def count(vectors: Tensor, queries: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Rows read for a query, in the mean over searches of one query each."""
    from fastrag.index import codec
    from fastrag.ops.cpp import CodedIndex

    made = codec.fit_int8([vectors])
    index = CodedIndex(vectors, made.encode(vectors)[0], **made.arguments)
    return {k: sum(index.n_rows_read(q[None], k) for q in queries) / len(queries) for k in ks}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    machine = facts(torch.device("cpu"))
    rows = []
    table = [["vectors", "N,D,k,B", "rows read for a query"]]
    for name, make in args.sets:
        vectors, queries = make()
        queries = queries[:N_QUERIES]
        ks = [k for k in args.k if k <= len(vectors)]
        for k, found in count(vectors, queries, ks).items():
            shape = shape_text((*vectors.shape, k, len(queries)))
            row = dict.fromkeys(COLUMNS, "") | machine | {"op": "mips", "provider": "cpp"}
            row |= {"mode": "int8-float32", "dtype": "float32", "shape": shape, "status": "ok"}
            rows.append(row | {"vectors": name, "rows_read": f"{found:.1f}"})
            table.append([name, shape, f"{found:.1f}"])
    if args.csv:
        add_to_csv(args.csv, rows, COLUMNS_HERE)
    print("\n".join(aligned(table, 2)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
