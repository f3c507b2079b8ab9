"""Inner products of a query with its K passages, and log p(z|x), in one op.

    s[b,k] = q_b . d_bk / tau            -inf where the passage is missing (row -1)
    log_prior[b,k] = s[b,k] - logsumexp_k s[b,k]
    ds = g_s + g_a - softmax_k(s) sum_k g_a          (upstream gradients of s and of log_prior)
    dq_b = sum_k ds_bk d_bk / tau,   dd_bk = ds_bk q_b / tau

The maths is in float32 (float64 for float64) for every storage dtype, also under autocast. Passages
are either re-encoded, [B, K, D], or rows of the index matrix [N, D], which gets no gradient. int8
passages are codes c of vectors d = offset + scale c, with scale and offset [D], and get no gradient
either:

    s[b,k] = ((q_b scale) . c_bk + q_b . offset) / tau
    dq_b = (scale sum_k ds_bk c_bk + offset sum_k ds_bk) / tau
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, checks, workspace
from fastrag.ops.autograd import is_plain, once_differentiable
from fastrag.profiling import stage

# Each implementation is a module with doc_scores_fwd and doc_scores_bwd.
backends.register(
    "doc_scores",
    cpp="fastrag.ops.cpp",
    triton="fastrag.kernels.doc_scores",
    torch="fastrag.ops.doc_scores",
)

# One program of the Triton kernel holds all scores of a question.
TRITON_MAX_PASSAGES = 1024


def check_arguments(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not fit together."""
    checks.check_floating("query_emb", query_emb, "[B, D]")
    checks.check_storage("passage_emb", passage_emb, scale, offset)
    n_examples, width = query_emb.shape
    if passage_emb.dim() == 3:
        checks.check_tensor("passage_emb", passage_emb, "[B, K, D]", (n_examples, None, width))
        n_passages = passage_emb.shape[1]
    else:
        layout = "[N, D], or [B, K, D]"
        checks.check_tensor("passage_emb", passage_emb, layout, (None, width))
        if rows is None:
            raise ValueError(
                f"rows: expected [B, K] because passage_emb is the index matrix "
                f"{checks.show(passage_emb)}, got None"
            )
        n_passages = -1
    if rows is not None:
        sizes = (n_examples, None if n_passages < 0 else n_passages)
        checks.check_integer("rows", rows, "[B, K]", sizes)
        n_passages = rows.shape[1]
    if n_passages == 0:
        name = "passage_emb" if passage_emb.dim() == 3 else "rows"
        got = f"query_emb {checks.show(query_emb)}, passage_emb {checks.show(passage_emb)}"
        if rows is not None:
            got += f", rows {checks.show(rows)}"
        raise ValueError(f"{name}: expected at least one passage per question, got K = 0 ({got})")
    if scale is not None:
        checks.check_tensor("scale", scale, "[D]", (width,))
    if offset is not None:
        checks.check_tensor("offset", offset, "[D]", (width,))
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
        return doc_scores_op(*inputs)
    # scale and offset get no gradient; the checks reject them if they require one.
    if torch.is_grad_enabled() and (query_emb.requires_grad or passage_emb.requires_grad):
        return DocScores.apply(*inputs)
    return _forward(*inputs)


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
        backend = _implementation(passage_emb, _dtype(query_emb, passage_emb), n_passages)
        return backend.doc_scores_fwd(query_emb, passage_emb, rows, tau, scale, offset)


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
    """Return the gradients of query_emb and passage_emb [B, K, D], in their dtypes, if needed."""
    upstream = (dscores, dlog_prior, log_prior)
    args = (*upstream, query_emb, passage_emb, rows, tau, need_dq, need_dp, scale, offset)
    with stage("doc_scores_backward"):
        backend = _implementation(passage_emb, log_prior.dtype, log_prior.shape[1])
        return backend.doc_scores_bwd(*args)


def _gradients_or_empty(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Return the gradients as an op has to, with empty tensors in place of None."""
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


def _implementation(passage_emb: Tensor, dtype: torch.dtype, n_passages: int) -> Any:
    """Return the module of the backend that takes this call."""
    unfit = {}
    if passage_emb.dim() == 2:
        unfit["cpp"] = functools.partial(backends.strided, passage_emb)
    if n_passages > TRITON_MAX_PASSAGES:
        unfit["triton"] = functools.partial(_too_many_for_triton, n_passages)
    backend = backends.choose("doc_scores", passage_emb.device, dtype, unfit)
    return backends.load("doc_scores", backend)


def _too_many_for_triton(n_passages: int) -> str:
    return f"its kernel takes K of at most {TRITON_MAX_PASSAGES}, got {n_passages}"


def _dtype(query_emb: Tensor, passage_emb: Tensor) -> torch.dtype:
    return workspace.accumulate_dtype(torch.promote_types(query_emb.dtype, passage_emb.dtype))


def _gather(passage_emb: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the K passages (or codes) of each query, [B, K, D] in `dtype`; zero if missing."""
    if rows is None:
        return passage_emb.to(dtype)
    index = rows.clamp(0, passage_emb.shape[-2] - 1)
    fresh = passage_emb.dim() == 3
    vectors = (passage_emb if fresh else passage_emb[index]).to(dtype)
    return vectors.masked_fill((rows < 0).unsqueeze(2), 0.0)


def doc_scores_fwd(
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
        # A matrix product would be in TF32 or bfloat16 if the user allows that for products.
        scores = (vectors * weights.unsqueeze(1)).sum(2)
        if offset is not None:
            scores += (query * offset).sum(1, keepdim=True)
        scores = scores / tau
        if rows is None:
            return scores, scores.log_softmax(1)
        missing = rows < 0
        if passage_emb.dim() == 2:
            # This can only happen on a GPU; on a CPU the checks reject such rows.
            scores = scores.masked_fill(rows >= passage_emb.shape[0], torch.nan)
        scores = scores.masked_fill(missing, -torch.inf)
        log_prior = scores.log_softmax(1).masked_fill(missing, -torch.inf)
        return scores, log_prior


def doc_scores_bwd(
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
    """The op without the dispatcher; see `is_plain`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
