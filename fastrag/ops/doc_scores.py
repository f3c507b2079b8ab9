"""Inner products of a query with its K passages, and log p(z|x), in one op.

    s[b,k] = q_b . d_bk / tau            -inf where the passage is missing (row -1)
    log_prior[b,k] = s[b,k] - logsumexp_k s[b,k]
    ds = g_s + g_a - softmax_k(s) sum_k g_a          (upstream gradients of s and of log_prior)
    dq_b = sum_k ds_bk d_bk / tau,   dd_bk = ds_bk q_b / tau

Maths in float32 (float64 for float64), whatever the storage dtype and under autocast. Passages are
either fresh, [B, K, D], or rows of the index matrix [N, D], which gets no gradient. int8 passages
are codes c of vectors d = offset + scale c, scale and offset [D]; none of the three gets one:

    s[b,k] = ((q_b scale) . c_bk + q_b . offset) / tau
    dq_b = (scale sum_k ds_bk c_bk + offset sum_k ds_bk) / tau
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, checks, cpp_arrays, workspace
from fastrag.ops.eager import is_plain
from fastrag.ops.grads import needs_grad, once_differentiable
from fastrag.profiling import stage

backends.register("doc_scores", ("cpp", "triton", "torch"))

Implementation = Callable[..., tuple[Any, Any]]

# One program of the Triton kernel holds all the scores of a question.
TRITON_MAX_PASSAGES = 1024


def check_arguments(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> None:
    """Raises ValueError where shapes, dtypes or devices do not make a call of the op."""
    checks.check_floating("query_emb", query_emb)
    checks.check_ndim("query_emb", query_emb, "[B, D]")
    checks.check_storage("passage_emb", passage_emb, scale, offset)
    n_examples, width = query_emb.shape
    if passage_emb.dim() == 3:
        checks.check_shape("passage_emb", passage_emb, (n_examples, None, width), "[B, K, D]")
        n_passages = passage_emb.shape[1]
    else:
        checks.check_shape("passage_emb", passage_emb, (None, width), "[N, D], or [B, K, D]")
        if rows is None:
            raise ValueError(
                f"rows: expected [B, K] because passage_emb is the index matrix "
                f"{checks.show(passage_emb)}, got None"
            )
        n_passages = -1
    if rows is not None:
        checks.check_integer("rows", rows)
        expected = (n_examples, None if n_passages < 0 else n_passages)
        checks.check_shape("rows", rows, expected, "[B, K]")
        n_passages = rows.shape[1]
    if n_passages == 0:
        name = "passage_emb" if passage_emb.dim() == 3 else "rows"
        sizes = f"query_emb {checks.show(query_emb)}, passage_emb {checks.show(passage_emb)}"
        if rows is not None:
            sizes += f", rows {checks.show(rows)}"
        raise ValueError(f"{name}: expected at least one passage per question, got K = 0 ({sizes})")
    if scale is not None:
        checks.check_shape("scale", scale, (width,), "[D]")
    if offset is not None:
        checks.check_shape("offset", offset, (width,), "[D]")
    device = query_emb.device
    if (
        passage_emb.device != device
        or (rows is not None and rows.device != device)
        or (scale is not None and scale.device != device)
        or (offset is not None and offset.device != device)
    ):
        checks.check_device(
            query_emb=query_emb, passage_emb=passage_emb, rows=rows, scale=scale, offset=offset
        )


def doc_scores(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D]; passage_emb [B, K, D], or [N, D] with rows -> s, log_prior [B, K]."""
    inputs = (query_emb, passage_emb, rows, tau, scale, offset)
    if not is_plain(query_emb, passage_emb, rows, scale, offset):
        scores, log_prior = doc_scores_op(*inputs)
    elif any(map(needs_grad, (query_emb, passage_emb, scale, offset))):
        scores, log_prior = DocScores.apply(*inputs)
    else:
        scores, log_prior = _forward(*inputs)
    return scores, log_prior


def _forward(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n_passages = passage_emb.shape[1] if rows is None else rows.shape[1]
    with stage("doc_scores"):
        backend = _backend(passage_emb, _dtype(query_emb, passage_emb), n_passages)
        forward, _ = _implementation(backend)
        return forward(query_emb, passage_emb, rows, tau, scale, offset)


doc_scores_op = torch.library.custom_op(
    "fastrag::doc_scores",
    _forward,
    mutates_args=(),
    schema="(Tensor query_emb, Tensor passage_emb, Tensor? rows, float tau, Tensor? scale=None, "
    "Tensor? offset=None) -> (Tensor, Tensor)",
)


@doc_scores_op.register_fake
def _(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = passage_emb.shape[:2] if rows is None else rows.shape
    scores = query_emb.new_empty(shape, dtype=_dtype(query_emb, passage_emb))
    return scores, torch.empty_like(scores)


def _gradients(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of query_emb and of fresh passage_emb, in their dtypes; None where not needed."""
    upstream = (dscores, dlog_prior, log_prior)
    args = (*upstream, query_emb, passage_emb, rows, tau, need_dq, need_dp, scale, offset)
    with stage("doc_scores_backward"):
        backend = _backend(passage_emb, log_prior.dtype, log_prior.shape[1])
        _, backward = _implementation(backend)
        return backward(*args)


def _gradients_or_empty(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """As an op has to return them."""
    dq, dp = _gradients(dscores, dlog_prior, log_prior, query_emb, passage_emb, *rest)
    return (
        query_emb.new_empty(0) if dq is None else dq,
        passage_emb.new_empty(0) if dp is None else dp,
    )


doc_scores_backward_op = torch.library.custom_op(
    "fastrag::doc_scores_backward",
    _gradients_or_empty,
    mutates_args=(),
    schema="(Tensor? dscores, Tensor? dlog_prior, Tensor log_prior, Tensor query_emb, "
    "Tensor passage_emb, Tensor? rows, float tau, bool need_dq, bool need_dp, "
    "Tensor? scale=None, Tensor? offset=None) -> (Tensor, Tensor)",
)


@doc_scores_backward_op.register_fake
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
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        query_emb.new_empty(query_emb.shape if need_dq else 0),
        passage_emb.new_empty(passage_emb.shape if need_dp else 0),
    )


def _backend(passage_emb: Tensor, dtype: torch.dtype, n_passages: int) -> str:
    unfit = {}
    if passage_emb.dim() == 2:
        unfit["cpp"] = cpp_arrays.unfit(passage_emb)
    if n_passages > TRITON_MAX_PASSAGES:
        unfit["triton"] = f"its kernel takes K of at most {TRITON_MAX_PASSAGES}, got {n_passages}"
    return backends.choose("doc_scores", passage_emb.device, dtype, unfit)


def _implementation(backend: str) -> tuple[Implementation, Implementation]:
    """Forward and backward."""
    if backend == "cpp":
        return _cpp().forward, _cpp().backward
    if backend == "triton":
        from fastrag.kernels.doc_scores import doc_scores_bwd, doc_scores_fwd

        return doc_scores_fwd, doc_scores_bwd
    return _torch_forward, _torch_backward


@functools.cache  # an import statement takes as long as scores of a few passages
def _cpp() -> ModuleType:
    from fastrag.ops import cpp_doc_scores

    return cpp_doc_scores


def _dtype(query_emb: Tensor, passage_emb: Tensor) -> torch.dtype:
    return workspace.accumulate_dtype(torch.promote_types(query_emb.dtype, passage_emb.dtype))


def _gather(passage_emb: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The K passages (or codes) of each query [B, K, D] in `dtype`, zero where missing."""
    if rows is None:
        return passage_emb.to(dtype)
    index = rows.clamp(0, passage_emb.shape[-2] - 1)
    fresh = passage_emb.dim() == 3
    vectors = (passage_emb if fresh else passage_emb[index]).to(dtype)
    return vectors.masked_fill((rows < 0).unsqueeze(2), 0.0)


def _torch_forward(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _dtype(query_emb, passage_emb)
    with workspace.without_autocast(query_emb.device):
        vectors = _gather(passage_emb, rows, dtype)
        query = query_emb.to(dtype)
        weights = query if scale is None else query * scale
        # No matrix product: one would round to TF32 or bfloat16 where the user allows that.
        scores = (vectors * weights.unsqueeze(1)).sum(2)
        if offset is not None:
            scores += (query * offset).sum(1, keepdim=True)
        scores = scores / tau
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
    scale: Tensor | None,
    offset: Tensor | None,
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
            dq = (ds.unsqueeze(2) * vectors).sum(1)
            if scale is not None:
                dq *= scale
            if offset is not None:
                dq += ds.sum(1, keepdim=True) * offset
            dq = dq.to(query_emb.dtype)
        if need_dp:
            dp = (ds.unsqueeze(2) * query_emb.to(dtype).unsqueeze(1)).to(passage_emb.dtype)
        return dq, dp


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_emb, passage_emb, rows, ctx.tau, scale, offset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], query_emb, passage_emb, rows, scale, offset)


@once_differentiable("doc_scores")
def _backward(
    ctx: Any, dscores: Tensor | None, dlog_prior: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dscores is None and dlog_prior is None:
        return (None,) * 6
    log_prior, query_emb, passage_emb, rows, scale, offset = ctx.saved_tensors
    need_dq, need_dp = ctx.needs_input_grad[:2]
    if need_dp and passage_emb.dim() == 2:
        raise RuntimeError("fastrag::doc_scores gives no gradient to the index matrix")
    if any(ctx.needs_input_grad[4:]):
        raise RuntimeError("fastrag::doc_scores gives no gradient to scale and offset")
    tensors = (dscores, dlog_prior, log_prior, query_emb, passage_emb, rows)
    gradients = _gradients if is_plain(*tensors, scale, offset) else doc_scores_backward_op
    dq, dp = gradients(*tensors, ctx.tau, need_dq, need_dp, scale, offset)
    return dq if need_dq else None, dp if need_dp else None, None, None, None, None


doc_scores_op.register_autograd(_backward, setup_context=_setup_context)


class DocScores(torch.autograd.Function):
    """The op as a plain call has it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
