"""Inner products of a query with its K passages, and log p(z|x), in one op.

    s[b,k] = q_b . d_bk / tau            -inf where the passage is missing (row -1)
    log_prior[b,k] = s[b,k] - logsumexp_k s[b,k]
    ds = g_s + g_a - softmax_k(s) sum_k g_a          (upstream gradients of s and of log_prior)
    dq_b = sum_k ds_bk d_bk / tau,   dd_bk = ds_bk q_b / tau

Maths in float32 (float64 for float64), whatever the storage dtype and under autocast. Passages are
either fresh, [B, K, D], or rows of the index matrix [N, D], which gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, workspace
from fastrag.ops.grads import once_differentiable

backends.register("doc_scores", ("triton", "torch"))

# One program of the Triton kernel holds all the scores of a question.
TRITON_MAX_PASSAGES = 1024


@torch.library.custom_op(
    "fastrag::doc_scores",
    mutates_args=(),
    schema="(Tensor query_emb, Tensor passage_emb, Tensor? rows, float tau) -> (Tensor, Tensor)",
)
def doc_scores(
    query_emb: Tensor, passage_emb: Tensor, rows: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D]; passage_emb [B, K, D], or [N, D] with rows -> s, log_prior [B, K]."""
    n_passages = passage_emb.shape[1] if rows is None else rows.shape[1]
    if _backend(query_emb.device, _dtype(query_emb, passage_emb), n_passages) == "triton":
        from fastrag.kernels.doc_scores import doc_scores_fwd

        return doc_scores_fwd(query_emb, passage_emb, rows, tau)
    return _torch_forward(query_emb, passage_emb, rows, tau)


@doc_scores.register_fake
def _(
    query_emb: Tensor, passage_emb: Tensor, rows: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    shape = passage_emb.shape[:2] if rows is None else rows.shape
    scores = query_emb.new_empty(shape, dtype=_dtype(query_emb, passage_emb))
    return scores, torch.empty_like(scores)


@torch.library.custom_op(
    "fastrag::doc_scores_backward",
    mutates_args=(),
    schema="(Tensor? dscores, Tensor? dlog_prior, Tensor log_prior, Tensor query_emb, "
    "Tensor passage_emb, Tensor? rows, float tau, bool need_dq, bool need_dp) -> (Tensor, Tensor)",
)
def doc_scores_backward(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query_emb and of fresh passage_emb, in their dtypes; empty where not needed."""
    args = (dscores, dlog_prior, log_prior, query_emb, passage_emb, rows, tau, need_dq, need_dp)
    if _backend(query_emb.device, log_prior.dtype, log_prior.shape[1]) == "triton":
        from fastrag.kernels.doc_scores import doc_scores_bwd

        return doc_scores_bwd(*args)
    return _torch_backward(*args)


@doc_scores_backward.register_fake
def _(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor]:
    return (
        query_emb.new_empty(query_emb.shape if need_dq else 0),
        passage_emb.new_empty(passage_emb.shape if need_dp else 0),
    )


def _backend(device: torch.device, dtype: torch.dtype, n_passages: int) -> str:
    unfit = {}
    if n_passages > TRITON_MAX_PASSAGES:
        unfit["triton"] = f"its kernel takes K of at most {TRITON_MAX_PASSAGES}, got {n_passages}"
    return backends.choose("doc_scores", device, dtype, unfit)


def _dtype(query_emb: Tensor, passage_emb: Tensor) -> torch.dtype:
    return workspace.accumulate_dtype(torch.promote_types(query_emb.dtype, passage_emb.dtype))


def _gather(passage_emb: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The K passages of each query [B, K, D] in `dtype`, zero where missing."""
    if rows is None:
        return passage_emb.to(dtype)
    index = rows.clamp(0, passage_emb.shape[-2] - 1)
    fresh = passage_emb.dim() == 3
    vectors = (passage_emb if fresh else passage_emb[index]).to(dtype)
    return vectors.masked_fill((rows < 0).unsqueeze(2), 0.0)


def _torch_forward(
    query_emb: Tensor, passage_emb: Tensor, rows: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    dtype = _dtype(query_emb, passage_emb)
    with workspace.without_autocast(query_emb.device):
        vectors = _gather(passage_emb, rows, dtype)
        query = query_emb.to(dtype)
        # No matrix product: one would round to TF32 or bfloat16 where the user allows that.
        scores = (vectors * query.unsqueeze(1)).sum(2) / tau
        if rows is None:
            return scores, scores.log_softmax(1)
        missing = rows < 0
        if passage_emb.dim() == 2:
            # Only a GPU gets here with such a row: a CPU has refused it.
            scores = scores.masked_fill(rows >= passage_emb.shape[0], torch.nan)
        scores = scores.masked_fill(missing, -torch.inf)
        log_prior = scores.log_softmax(1).masked_fill(missing, -torch.inf)
        return scores, log_prior


def _torch_backward(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
) -> tuple[Tensor, Tensor]:
    dtype = log_prior.dtype
    with workspace.without_autocast(query_emb.device):
        present = log_prior != -torch.inf
        ds = torch.zeros_like(log_prior)
        if dscores is not None:
            ds += dscores
        if dlog_prior is not None:
            upstream = torch.where(present, dlog_prior.to(dtype), 0.0)
            ds += upstream - log_prior.exp() * upstream.sum(1, keepdim=True)
        ds = torch.where(present, ds, 0.0) / tau
        dq, dp = query_emb.new_empty(0), passage_emb.new_empty(0)
        if need_dq:
            vectors = _gather(passage_emb, rows, dtype)
            dq = (ds.unsqueeze(2) * vectors).sum(1).to(query_emb.dtype)
        if need_dp:
            dp = (ds.unsqueeze(2) * query_emb.to(dtype).unsqueeze(1)).to(passage_emb.dtype)
        return dq, dp


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_emb, passage_emb, rows, ctx.tau = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], query_emb, passage_emb, rows)


@once_differentiable("doc_scores")
def _backward(
    ctx: Any, dscores: Tensor | None, dlog_prior: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dscores is None and dlog_prior is None:
        return None, None, None, None
    log_prior, query_emb, passage_emb, rows = ctx.saved_tensors
    need_dq, need_dp = ctx.needs_input_grad[:2]
    if need_dp and passage_emb.dim() == 2:
        raise RuntimeError("fastrag::doc_scores gives no gradient to the index matrix")
    dq, dp = doc_scores_backward(
        dscores, dlog_prior, log_prior, query_emb, passage_emb, rows, ctx.tau, need_dq, need_dp
    )
    return dq if need_dq else None, dp if need_dp else None, None, None


doc_scores.register_autograd(_backward, setup_context=_setup_context)
