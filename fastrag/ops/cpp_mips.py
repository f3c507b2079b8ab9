"""Exact maximum inner product search on a CPU, in C++ on the memory of the tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastrag import _C
from fastrag.ops import backends


def search(
    query_emb: Tensor, index_emb: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D], index_emb [N, D], both float32 -> scores [B, k], rows [B, k]."""
    scores = torch.empty(query_emb.shape[0], k)
    rows = torch.empty(query_emb.shape[0], k, dtype=torch.int64)
    removed = exclude is not None and exclude.dtype == torch.bool
    _C.mips_topk(
        _array(query_emb),
        index_emb.detach().numpy(),
        scores.numpy(),
        rows.numpy(),
        removed=_array(exclude) if removed else None,
        exclude=None if removed else _array(exclude),
        threads=torch.get_num_threads(),
        isa=os.environ.get(backends.ISA_VARIABLE, ""),
    )
    return scores, rows


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()
