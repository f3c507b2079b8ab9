"""Exact maximum inner product search on a CPU, in C++ on the memory of the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag import _C
from fastrag.ops.cpp_arrays import array, matrix, options
from fastrag.profiling import stage


def search(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D] float32, index_emb [N, D] not float64 -> scores [B, k], rows [B, k]."""
    scores, rows = _empty_answer(query_emb, k)
    with stage("mips_topk/scan"):
        _C.mips_topk(
            array(query_emb),
            scores=scores.numpy(),
            rows=rows.numpy(),
            **matrix(index_emb, scale, offset),
            **_options(exclude),
        )
    return scores, rows


class CodedIndex:
    """float32 rows with int8 codes of them: the answers of the rows, mostly at the price of codes.

        score[b,n] is in  q_b . offset + t_b (digits_b . codes_n)  +-  a bound of the pair

    Rows that the bounds leave are scored as `search` scores them, so that the answer has its bits.
    Of few queries a search reads a quarter of the bytes, of many it multiplies whole numbers.

    Args:
        index_emb: `[N, D]` float32, read in place.
        codes: `[N, D]` int8, of offset + scale * code ~ index_emb; better codes leave fewer rows.
        scale: `[D]` float32.
        offset: `[D]` float32; the mean of the rows makes better codes than zero.

    Raises:
        ValueError: shapes or dtypes disagree, or a row is not finite.
    """

    def __init__(self, index_emb: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> None:
        self._parts = {
            "index_emb": index_emb.detach(),
            "codes": codes,
            "scale": scale,
            "offset": offset,
            **_measured(index_emb.detach(), codes, scale, offset),
        }

    def arrays(self) -> dict[str, Any]:
        """What a search takes beside queries; made anew, for a copy has memory of its own."""
        return {name: x.numpy() for name, x in self._parts.items()}

    def update(self, rows: Tensor) -> None:
        """Measures rows `[n]` anew whose numbers and codes have changed; no search may run."""
        part = {name: self._parts[name][rows] for name in ("index_emb", "codes")}
        found = _measured(**part, scale=self._parts["scale"], offset=self._parts["offset"])
        for name, values in found.items():
            self._parts[name][rows] = values

    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query_emb [B, D] float32 -> scores [B, k], rows [B, k]."""
        scores, rows, _ = self._search(query_emb, k, exclude)
        return scores, rows

    def n_rows_read(self, query_emb: Tensor, k: int) -> int:
        """How many rows of index_emb a search reads, over all queries."""
        return self._search(query_emb, k, None)[2]

    def _search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        scores, rows = _empty_answer(query_emb, k)
        with stage("mips_topk/by_codes"):
            n_read = _C.mips_topk_by_codes(
                array(query_emb),
                scores=scores.numpy(),
                rows=rows.numpy(),
                **self.arrays(),
                **_options(exclude),
            )
        return scores, rows, n_read


def _measured(index_emb: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """What a search through codes has to know of each row."""
    n = len(index_emb)
    found = {
        "code_norm": torch.empty(n, dtype=torch.float32),
        "rest_norm": torch.empty(n, dtype=torch.float32),
        "code_sum": torch.empty(n, dtype=torch.int32),
    }
    parts = {"index_emb": index_emb, "codes": codes, "scale": scale, "offset": offset, **found}
    arrays = {name: x.numpy() for name, x in parts.items()}
    _C.measure_codes(**arrays, threads=torch.get_num_threads())
    return found


def _empty_answer(query_emb: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query_emb.shape[0], k)
    return torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)


def _options(exclude: Tensor | None) -> dict[str, Any]:
    removed = exclude is not None and exclude.dtype == torch.bool
    return {
        "removed" if removed else "exclude": array(exclude),
        **options(),
    }
