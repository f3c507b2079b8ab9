"""Exact search of float32 rows that reads int8 codes of all rows but only few of the rows.

The code of a row and its rounding error give a lower and an upper bound of the row's score. A row
whose upper bound is below the k-th best lower bound cannot be a hit. The remaining rows are scored
from their float32 numbers with the operations of a search of all rows, so the results have the same
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fastrag import functional
from fastrag.index import codec, inputs, rotation
from fastrag.index.codec import Codec
from fastrag.ops import backends

# Besides reading the codes, a search through codes has a cost for each query that grows with k and
# log N. On a CPU, a search of the float32 rows is faster if the index has fewer numbers than the
# first limit, or fewer rows for each hit of all queries than the second. The time per query no
# longer falls beyond the third, so further queries do not count.
LEAST_NUMBERS = 1 << 23
LEAST_ROWS_PER_HIT = 64
MOST_QUERIES = 64
# Codes of leading coordinates save reading. With more questions than this, a search through codes
# waits for its arithmetic: on an AMD EPYC, one of 100,000 x 768 with leading coordinates takes .58
# of the time without for one question, .92 for two, and 1.03 for three, four and eight.
MOST_BY_LEADS = 2


def pay(query: Tensor, index_emb: Tensor, k: int) -> bool:
    """Return whether a search for the k best of these rows is faster with codes."""
    n_hits = min(len(query), MOST_QUERIES) * k
    large = index_emb.numel() >= LEAST_NUMBERS and len(index_emb) >= LEAST_ROWS_PER_HIT * n_hits
    return index_emb.is_cuda or large


class RowCodes:
    """int8 codes of the rows of an index; scale and offset come from all rows and then stay.

    Args:
        index_emb: `[N, D]` float32, N > 0; kept as a reference, not copied.
        room: `[N, D]` int8 for the codes, such as a mapped file; allocated if None. With it, there
            are no codes of leading coordinates, which would take memory.
    """

    def __init__(self, index_emb: Tensor, room: Tensor | None = None) -> None:
        n, dim = index_emb.shape
        size = max(1, inputs.BLOCK_BYTES // (dim * index_emb.itemsize))
        chosen = codec.fit_int8(index_emb.split(size))
        codes = codec.allocate(n, dim, "int8", index_emb.device)[:, :dim] if room is None else room
        for rows in torch.arange(n, device=index_emb.device).split(size):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            codes[part] = chosen.encode(index_emb[part])[0]
        self._set(index_emb, {"codes": codes, **chosen.arguments})
        self._may_lead = room is None

    @classmethod
    def from_arrays(cls, index_emb: Tensor, arrays: Mapping[str, Tensor]) -> Self:
        """Make the codes of the same rows from what `arrays` returned; nothing is computed.

        Args:
            index_emb: as for the class.
            arrays: on the device of `index_emb`; kept as references, and `update` writes to them.
        """
        made = cls.__new__(cls)
        made._set(index_emb, arrays)
        return made

    def _set(self, index_emb: Tensor, arrays: Mapping[str, Tensor]) -> None:
        self.index_emb = index_emb
        self._arrays = dict(arrays)
        self._codes = self._arrays["codes"]
        self._codec = Codec("int8", self._arrays["scale"], self._arrays["offset"])
        self._coded: Any = None  # the CodedIndex of the C++ backend, made by the first search
        self._may_lead = True

    def arrays(self) -> dict[str, Tensor]:
        """Return everything that a search needs apart from the rows, as views of these codes.

        On a CPU with the C++ backend, norms of each row are part of it.
        """
        if backends.choose("mips_topk", self.index_emb.device, torch.float32) == "cpp":
            self._coded_index()
        return dict(self._arrays)

    def search(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the results of `functional.mips_topk` on the float32 rows, bit for bit."""
        backend = backends.choose("mips_topk", query.device, torch.float32)
        if backend == "cpp":
            leads = len(query) <= MOST_BY_LEADS
            return self._coded_index().search(query, k, exclude, leads=leads)
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
        """Recompute the codes of rows `[n]`; no search may run at the same time."""
        self._codes[rows] = self._codec.encode(self.index_emb[rows])[0]
        if self._coded is not None or "code_norm" in self._arrays:  # or of a saved index
            self._coded_index().update(rows)

    def _coded_index(self) -> Any:
        if self._coded is None:
            from fastrag.ops.cpp import CodedIndex

            if "code_norm" not in self._arrays and self._may_lead:
                self._arrays |= rotation.fit(self.index_emb, self._arrays["offset"])
            self._coded = CodedIndex(self.index_emb, **self._arrays)
            self._arrays = {k: x for k, x in self._coded.tensors.items() if k != "index_emb"}
        return self._coded
