"""Scores of given rows and their log-softmax on a CPU, in C++ on the memory of the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from fastrag import _C
from fastrag.ops.cpp_arrays import capsule, options


def forward(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the op: query_emb [B, D]; passage_emb [B, K, D], or [N, D] with rows."""
    arguments = _arguments(query_emb, passage_emb, rows, tau, scale, offset)
    shape = passage_emb.shape[:2] if rows is None else rows.shape
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    log_prior = torch.empty_like(scores)
    _C.doc_scores(*arguments, to_dlpack(scores), to_dlpack(log_prior))
    return scores, log_prior


def backward(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As the op: gradients of query_emb and of fresh passage_emb; None where not needed."""
    dquery = dpassage = None
    if need_dq:
        dquery = torch.empty(query_emb.shape, dtype=torch.float32, device="cpu")
    if need_dp:
        dpassage = torch.empty(passage_emb.shape, dtype=torch.float32, device="cpu")
    _C.doc_scores_backward(
        *_arguments(query_emb, passage_emb, rows, tau, scale, offset),
        capsule(log_prior),
        capsule(dscores, torch.float32),
        capsule(dlog_prior, torch.float32),
        capsule(dquery),
        capsule(dpassage),
    )
    return (
        None if dquery is None else dquery.to(query_emb.dtype),
        None if dpassage is None else dpassage.to(passage_emb.dtype),
    )


def _arguments(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Any, Any, Any, float, Any, Any, int, str]:
    """What both take first. Fresh passages are rows b * K + k of a matrix [B * K, D]."""
    index_emb = passage_emb
    if passage_emb.dim() == 3:
        shape = passage_emb.shape[:2]
        place = torch.arange(shape.numel(), device="cpu").view(shape)
        rows = place if rows is None else place.masked_fill(rows < 0, -1)
        index_emb = passage_emb.contiguous().view(shape.numel(), passage_emb.shape[2])
    if scale is not None and offset is None:
        offset = torch.zeros_like(scale)
    how = options()
    return (
        capsule(query_emb, torch.float32),
        to_dlpack(index_emb),
        capsule(rows),
        tau,
        capsule(scale),
        capsule(offset),
        how["threads"],
        how["isa"],
    )
