"""int8 codes beside float32 rows: the answers of the rows, most of which are never read.

A code and what rounding left of its row bound the score of the row from both sides. Rows whose
upper bound lies below the k best lower bounds are out; the others are scored from their float32
numbers, as a search of all rows scores them, so that the answer has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag import functional
from fastrag.index import codec, inputs
from fastrag.ops import backends

# What a search through codes does beside reading them grows with k and the logarithm of N, for each
# query: below so many numbers on a CPU, or rows for each hit of all queries, it takes longer than
# one of the float32 rows. From some number of queries on both take as long for each one.
LEAST_NUMBERS = 1 << 23
LEAST_ROWS_PER_HIT = 64
MOST_QUERIES = 64


def pay(query: Tensor, index_emb: Tensor, k: int) -> bool:
    """Whether codes of these rows make a search for the k best of them faster."""
    n_hits = min(len(query), MOST_QUERIES) * k
    large = index_emb.numel() >= LEAST_NUMBERS and len(index_emb) >= LEAST_ROWS_PER_HIT * n_hits
    return index_emb.is_cuda or large


class RowCodes:
    """Codes of an index's rows, made from all of them; scale and offset stand from then on.

    Args:
        index_emb: `[N, D]` float32, N > 0, read in place as long as this object lives.
    """

    def __init__(self, index_emb: Tensor) -> None:
        self.index_emb = index_emb
        n, dim = index_emb.shape
        size = max(1, inputs.BLOCK_BYTES // (dim * index_emb.itemsize))
        self._codec = codec.fit_int8(index_emb.split(size))
        self._codes = codec.allocate(n, dim, "int8", index_emb.device)[:, :dim]
        for rows in torch.arange(n, device=index_emb.device).split(size):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            self._codes[part] = self._codec.encode(index_emb[part])[0]
        self._coded: Any = None  # a CodedIndex, once one was searched

    def search(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `functional.mips_topk` of the float32 rows, to the bit."""
        backend = backends.choose("mips_topk", query.device, torch.float32)
        if backend == "cpp":
            return self._coded_index().search(query, k, exclude)
        if backend == "triton":
            from fastrag.ops import triton_mips

            if not triton_mips.unfit(self._codes, k, exclude) and triton_mips.pays(
                query, self._codes, k, exclude
            ):
                factors = self._codec.scale, self._codec.offset
                return triton_mips.search(
                    query, self._codes, k, exclude, *factors, exact=self.index_emb
                )
        return functional.mips_topk(query, self.index_emb, k, exclude=exclude)

    def update(self, rows: Tensor) -> None:
        """Makes the codes of rows `[n]` anew; no search runs meanwhile."""
        self._codes[rows] = self._codec.encode(self.index_emb[rows])[0]
        if self._coded is not None:
            self._coded.update(rows)

    def _coded_index(self) -> Any:
        if self._coded is None:
            from fastrag.ops.cpp import CodedIndex

            factors = self._codec.arguments
            self._coded = CodedIndex(self.index_emb, self._codes, **factors)
        return self._coded
