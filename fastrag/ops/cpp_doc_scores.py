"""Scores of given rows and their log-softmax on a CPU, in C++ on the memory of the tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag import _C
from fastrag.ops.cpp_arrays import array, matrix, options


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
    scores = query_emb.new_empty(shape, dtype=torch.float32)
    log_prior = torch.empty_like(scores)
    _C.doc_scores(**arguments, scores=scores.numpy(), log_prior=log_prior.numpy())
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
) -> tuple[Tensor, Tensor]:
    """As the op: gradients of query_emb and of fresh passage_emb; empty where not needed."""
    dquery = log_prior.new_empty(query_emb.shape if need_dq else 0)
    dpassage = log_prior.new_empty(passage_emb.shape if need_dp else 0)
    _C.doc_scores_backward(
        **_arguments(query_emb, passage_emb, rows, tau, scale, offset),
        log_prior=array(log_prior),
        dscores=array(dscores, torch.float32),
        dlog_prior=array(dlog_prior, torch.float32),
        dquery=dquery.numpy() if need_dq else None,
        dpassage=dpassage.numpy() if need_dp else None,
    )
    return dquery.to(query_emb.dtype), dpassage.to(passage_emb.dtype)


def _arguments(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> dict[str, Any]:
    """Fresh passages as rows b * K + k of a matrix [B * K, D]."""
    index_emb = passage_emb
    if passage_emb.dim() == 3:
        shape = passage_emb.shape[:2]
        place = torch.arange(shape.numel(), device=passage_emb.device).view(shape)
        rows = place if rows is None else place.masked_fill(rows < 0, -1)
        index_emb = passage_emb.contiguous().view(shape.numel(), passage_emb.shape[2])
    return {
        "query_emb": array(query_emb, torch.float32),
        "rows": array(rows),
        "tau": tau,
        **matrix(index_emb, scale, offset),
        **options(),
    }
