"""log p(y_t | x, z_k, y_<t) from hidden states, without a tensor [B, K, T, V].

    token_logp[b,k,t] = logits[b,k,t,y_bt] - logsumexp_v logits[b,k,t,v]
    d logits[b,k,t,v] = g[b,k,t] * (1[v = y_bt] - softmax_v)

The upstream gradient g is not known in the forward, when the logits exist. Therefore the forward
keeps log Z of each row, and the backward recomputes the logits slice by slice of the vocabulary
(`vocab_major`). This takes four GEMMs; `marginal_nll`, which knows its weights, takes three.

If the head is frozen, the forward computes dX for g = 1, and the backward multiplies its rows by g.
This takes two GEMMs instead of three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, vocab_major, workspace
from fastrag.ops.autograd import once_differentiable, scaled
from fastrag.ops.chunks import (
    ChunkLogits,
    HeadGradients,
    LinearHead,
    dhidden_dtype,
    dweight_dtype,
)
from fastrag.ops.positions import Chunk, Positions, check_label_values
from fastrag.profiling import stage

backends.register(
    "token_logp",
    cpp="fastrag.ops.cpp:CppChunkLogits",
    triton="fastrag.ops.triton_chunks:TritonChunkLogits",
    torch="fastrag.ops.chunks:TorchChunkLogits",
)


@torch.library.custom_op(
    "fastrag::token_logp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float? softcap, "
    "float logit_scale, int ignore_index, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor, Tensor, Tensor)",
)
def token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, K, T, H], labels [B, T] -> token_logp, log_z, dhidden.

    token_logp [B, K, T] is zero where the label is ignored. log_z [2, B, K, T] are the two parts of
    log Z (RowStats) if the head needs a gradient, else empty. dhidden is the gradient of the sum of
    token_logp if only hidden needs a gradient, else empty.
    """
    at_once = need_dx and not (need_dw or need_db)
    with stage("token_logp"), workspace.without_autocast(hidden.device):
        walk = _Walk(hidden, weight, bias, labels, softcap, logit_scale, ignore_index)
        sums = HeadGradients(walk.head, hidden, need_dx=at_once, need_dw=False, need_db=False)
        logp = hidden.new_zeros(walk.n_rows + 1, dtype=walk.head.dtype)
        log_z = logp.new_zeros(2, walk.n_rows + 1)
        for part in walk.parts(at_once):
            walk.forward(part, logp, log_z, sums)
    keep = need_dw or need_db
    return (
        logp[:-1].view(hidden.shape[:-1]),
        log_z[:, :-1].contiguous().view(2, *hidden.shape[:-1]) if keep else logp.new_empty(0),
        sums.results()[0],
    )


@token_logp.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dw, need_db = rest[-3:]
    logp = hidden.new_empty(hidden.shape[:-1], dtype=workspace.accumulate_dtype(hidden.dtype))
    keep = need_dw or need_db
    dhidden, *_ = fake_head_gradients(hidden, weight, need_dx and not keep, False, False)
    return logp, logp.new_empty((2, *logp.shape) if keep else (0,)), dhidden


@torch.library.custom_op(
    "fastrag::token_logp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor log_z, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? present, Tensor? valid_rows, float? softcap, float logit_scale, "
    "float label_smoothing, int ignore_index, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor, Tensor, Tensor)",
)
def token_logp_backward(
    grad: Tensor,
    log_z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    present: Tensor | None,
    valid_rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in their dtypes; empty if not needed.

    grad [B, K, T] is the gradient of (1 - label_smoothing) log p(y) + label_smoothing mean_v log p.
    present [B, K] bool: passages that exist (None: all). valid_rows: as in Positions.
    """
    with stage("token_logp_backward"), workspace.without_autocast(hidden.device):
        settings = (softcap, logit_scale, ignore_index)
        walk = _Walk(hidden, weight, bias, labels, *settings, present, valid_rows)
        need = {"need_dx": need_dx, "need_dw": need_dw, "need_db": need_db}
        sums = HeadGradients(walk.head, hidden, **need, late=False)
        chunk = walk.positions.everything()
        padded = torch.nn.functional.pad(grad.reshape(-1).to(walk.head.dtype), (0, 1))
        log_z = torch.nn.functional.pad(log_z.reshape(2, -1), (0, 1))[:, chunk.chunk_rows]
        row_weight = walk.mask(chunk, -padded[chunk.chunk_rows])
        vocab_major.add_gradients(sums, walk.open_chunk, chunk, log_z, row_weight, label_smoothing)
        dhidden, dweight, dbias = sums.results()
        bias_dtype = weight.dtype if bias is None else bias.dtype
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias.to(bias_dtype)


@token_logp_backward.register_fake
def _(
    grad: Tensor, log_z: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dw, need_db = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dw else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need_db else 0),
    )


def fake_head_gradients(
    hidden: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised tensors in the shapes of HeadGradients.results with `late`."""
    dtype = workspace.accumulate_dtype(hidden.dtype)
    empty = [weight.new_empty(0, dtype=dtype) for _ in range(3)]
    if need_dx:
        empty[0] = hidden.new_empty(hidden.shape, dtype=dhidden_dtype(hidden.dtype))
    if need_dw:
        kind = dweight_dtype(weight.dtype, weight.device, dtype)
        empty[1] = weight.new_empty(weight.shape, dtype=kind)
    if need_db:
        empty[2] = weight.new_empty(weight.shape[0], dtype=dtype)
    return empty[0], empty[1], empty[2]


class _Walk:
    """Backend, head and positions of one call, for forward and backward."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
        ignore_index: int,
        present: Tensor | None = None,
        valid_rows: Tensor | None = None,
    ) -> None:
        dtype = workspace.accumulate_dtype(hidden.dtype)
        backend = backends.choose("token_logp", hidden.device, hidden.dtype)
        self.open_chunk: type[ChunkLogits] = backends.load("token_logp", backend)
        operand = self.open_chunk.operand_dtype(hidden.dtype)
        self.head = LinearHead(weight, bias, softcap, logit_scale, dtype, operand)
        self.n_rows, self.n_passages = hidden.shape[:-1].numel(), hidden.shape[1]
        counted = labels != ignore_index
        bad = check_label_values(labels, counted, weight.shape[0])
        labels = torch.where(bad, 0, labels)
        self.bad = torch.nn.functional.pad(bad.reshape(-1), (0, 1))
        self.positions = Positions(hidden, labels, counted, present, valid_rows, operand)

    def parts(self, with_gradient: bool) -> list[slice]:
        """Return the slices of positions that the forward visits one at a time."""
        if with_gradient:
            row_bytes = self.open_chunk.row_bytes(self.head, self.n_passages, mixture=False)
        else:
            row_bytes = self.open_chunk.forward_bytes(self.head, self.n_passages, with_mean=False)
        limit = workspace.rows_per_chunk(self.n_passages * row_bytes, self.positions.hidden.device)
        return workspace.even_slices(self.positions.n_visited, limit)

    # A method of its own, so that the logits of a chunk are freed before the next chunk's exist.
    def forward(self, part: slice, logp: Tensor, log_z: Tensor, sums: HeadGradients) -> None:
        chunk = self.positions.gather(part)
        if sums.wanted:
            with stage("token_logp/logits"):
                logits = self.open_chunk(self.head, chunk.x, chunk.gold)
            with stage("token_logp/statistics"):
                stats = logits.statistics()
            weight = self.mask(chunk, torch.full_like(stats.logp, -1.0))
            with stage("token_logp/gradient"):
                draw = logits.gradient(weight)
            with stage("token_logp/products"):
                sums.add(draw, chunk.x, chunk.chunk_rows)
        else:
            with stage("token_logp/statistics"):
                stats = self.open_chunk.forward(self.head, chunk.x, chunk.gold)
        logp[chunk.chunk_rows] = self.mask(chunk, stats.logp)
        log_z[:, chunk.chunk_rows] = stats.log_z

    def mask(self, chunk: Chunk, per_row: Tensor) -> Tensor:
        """Return per_row [n]: 0 where the label does not count, NaN where it is not in [0, V)."""
        bad = self.bad[chunk.position].repeat_interleave(self.n_passages)
        counted = chunk.counted.repeat_interleave(self.n_passages)
        return torch.where(counted, per_row.masked_fill(bad, torch.nan), 0.0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *ctx.settings = inputs
    _, log_z, dhidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(log_z, dhidden)
    ctx.save_for_backward(hidden, weight, bias, labels, log_z, dhidden)


@once_differentiable("token_logp")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    softcap, logit_scale, ignore_index, *asked = ctx.settings
    result: list[Tensor | None] = [None] * (4 + len(ctx.settings))
    if grad is None:
        return tuple(result)
    hidden, weight, bias, labels, log_z, dhidden = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    for place, (needed, was_asked) in enumerate(zip(need, asked, strict=True)):
        if needed and not was_asked:
            raise RuntimeError(f"fastrag::token_logp was told not to differentiate input {place}")
    if asked[1] or asked[2]:
        head = (softcap, logit_scale, 0.0, ignore_index)
        inputs = (hidden, weight, bias, labels, None, None)
        found = token_logp_backward(grad, log_z, *inputs, *head, *need)
        result[:3] = [x if needed else None for x, needed in zip(found, need, strict=True)]
    elif need[0]:
        result[0] = scaled(dhidden, grad.unsqueeze(-1), hidden.dtype)
    return tuple(result)


token_logp.register_autograd(_backward, setup_context=_setup_context)
