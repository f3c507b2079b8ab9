"""Exact maximum inner product search on a CPU, in C++ on the memory of the tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastrag import _C
from fastrag.ops import backends


def search(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D] float32, index_emb [N, D] not float64 -> scores [B, k], rows [B, k]."""
    if scale is not None and offset is None:
        offset = torch.zeros_like(scale)
    scores = torch.empty(query_emb.shape[0], k)
    rows = torch.empty(query_emb.shape[0], k, dtype=torch.int64)
    removed = exclude is not None and exclude.dtype == torch.bool
    _C.mips_topk(
        _array(query_emb),
        _stored(index_emb.detach()),
        scores.numpy(),
        rows.numpy(),
        removed=_array(exclude) if removed else None,
        exclude=None if removed else _array(exclude),
        scale=_array(scale),
        offset=_array(offset),
        threads=torch.get_num_threads(),
        isa=os.environ.get(backends.ISA_VARIABLE, ""),
    )
    return scores, rows


def _stored(index_emb: Tensor) -> Any:
    """In place; numpy has no bfloat16, whose bits go as uint16."""
    if index_emb.dtype == torch.bfloat16:
        return index_emb.view(torch.uint16).numpy()
    return index_emb.numpy()


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()
