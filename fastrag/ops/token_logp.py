"""log p(y_t | x, z_k, y_<t) from hidden states, never holding [B, K, T, V].

    token_logp[b,k,t] = logits[b,k,t,y_bt] - logsumexp_v logits[b,k,t,v]
    d logits[b,k,t,v] = g[b,k,t] * (1[v = y_bt] - softmax_v)

Forward and backward run over the same chunks of positions. The backward recomputes the logits of a
chunk, because the weight g of a row is not known while the forward holds them: four GEMMs where
`marginal_nll`, which knows its weights, needs three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, workspace
from fastrag.ops.chunk_logits import ChunkLogits, chunk_logits
from fastrag.ops.grads import once_differentiable
from fastrag.ops.linear_head import HeadGradients, LinearHead, dhidden_dtype
from fastrag.ops.positions import Chunk, Positions, check_labels

backends.register("token_logp", ("cpp", "triton", "torch"))


@torch.library.custom_op(
    "fastrag::token_logp",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float? softcap, "
    "float logit_scale, int ignore_index) -> Tensor",
)
def token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    """hidden [B, K, T, H], labels [B, T] -> [B, K, T], zero where the label is ignored."""
    with workspace.without_autocast(hidden.device):
        walk = _Walk(hidden, weight, bias, labels, softcap, logit_scale, ignore_index)
        out = hidden.new_zeros(walk.n_rows + 1, dtype=walk.head.dtype)
        # Backward makes its logits anew, so that the forward may do without any.
        for part in walk.parts(walk.open_chunk.token_logp_bytes(walk.head, walk.n_passages)):
            walk.forward(part, out)
    return out[:-1].view(hidden.shape[:-1])


@token_logp.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1], dtype=workspace.accumulate_dtype(hidden.dtype))


@torch.library.custom_op(
    "fastrag::token_logp_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "float? softcap, float logit_scale, int ignore_index, bool need_dx, bool need_dw, "
    "bool need_db) -> (Tensor, Tensor, Tensor)",
)
def token_logp_backward(
    grad: Tensor,
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
    """Gradients of hidden, weight and bias given grad [B, K, T]; empty where not needed."""
    with workspace.without_autocast(hidden.device):
        walk = _Walk(hidden, weight, bias, labels, softcap, logit_scale, ignore_index)
        sums = HeadGradients(walk.head, hidden, need_dx=need_dx, need_dw=need_dw, need_db=need_db)
        padded = torch.nn.functional.pad(grad.reshape(-1).to(walk.head.dtype), (0, 1))
        row_bytes = walk.open_chunk.row_bytes(walk.head, walk.n_passages, mixture=False)
        for part in walk.parts(row_bytes):
            walk.backward(part, padded, sums)
        return sums.results()


@token_logp_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_head_gradients(hidden, weight, *rest[-3:])


def fake_head_gradients(
    hidden: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns empty tensors shaped as HeadGradients.results() returns them."""
    dtype = workspace.accumulate_dtype(hidden.dtype)
    empty = [weight.new_empty(0, dtype=dtype) for _ in range(3)]
    if need_dx:
        empty[0] = hidden.new_empty(hidden.shape, dtype=dhidden_dtype(hidden.dtype))
    if need_dw:
        empty[1] = weight.new_empty(weight.shape, dtype=dtype)
    if need_db:
        empty[2] = weight.new_empty(weight.shape[0], dtype=dtype)
    return empty[0], empty[1], empty[2]


class _Walk:
    """The chunks of one call: what forward and backward share."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float | None,
        logit_scale: float,
        ignore_index: int,
    ) -> None:
        dtype = workspace.accumulate_dtype(hidden.dtype)
        self.open_chunk = chunk_logits(backends.choose("token_logp", hidden.device, hidden.dtype))
        operand = self.open_chunk.operand_dtype(hidden.dtype)
        self.head = LinearHead(weight, bias, softcap, logit_scale, dtype, operand)
        self.n_rows, self.n_passages = hidden.shape[:-1].numel(), hidden.shape[1]
        counted = labels != ignore_index
        bad = check_labels(labels, counted, weight.shape[0])
        labels = torch.where(bad, 0, labels)
        self.bad = torch.nn.functional.pad(bad.reshape(-1), (0, 1))
        self.positions = Positions(hidden, labels, counted, None, None, operand)

    def parts(self, row_bytes: float) -> list[slice]:
        """Chunks of positions whose rows take row_bytes of workspace each."""
        limit = workspace.rows_per_chunk(self.n_passages * row_bytes, self.positions.hidden.device)
        return workspace.even_slices(len(self.positions), limit)

    # A chunk's logits are local to one call, so that they are gone before the next chunk's exist.

    def forward(self, part: slice, out: Tensor) -> None:
        chunk = self.positions.gather(part)
        logp = self.open_chunk.token_logp(self.head, chunk.x, chunk.gold)
        logp = logp.masked_fill(self.per_row(self.bad[chunk.position]), torch.nan)
        out[chunk.row] = torch.where(self.per_row(chunk.counts), logp, 0.0)

    def backward(self, part: slice, grad: Tensor, sums: HeadGradients) -> None:
        chunk = self.positions.gather(part)
        logits = self._open(chunk)
        logits.statistics()
        row_weight = torch.where(self.per_row(chunk.counts), -grad[chunk.row], 0.0)
        row_weight = row_weight.masked_fill(self.per_row(self.bad[chunk.position]), torch.nan)
        sums.add(logits.gradient(row_weight), chunk.x, chunk.row)

    def _open(self, chunk: Chunk) -> ChunkLogits:
        return self.open_chunk(self.head, chunk.x, chunk.gold)

    def per_row(self, per_position: Tensor) -> Tensor:
        """[G] -> [G * K]."""
        return per_position.repeat_interleave(self.n_passages)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, labels, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels)


@once_differentiable("token_logp")
def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if grad is None:
        return nothing
    hidden, weight, bias, labels = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    found = token_logp_backward(grad, hidden, weight, bias, labels, *ctx.settings, *need)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
    grads = [
        dx.to(dtype) if wanted else None
        for dx, dtype, wanted in zip(found, dtypes, need, strict=True)
    ]
    return (*grads, *nothing[3:])


token_logp.register_autograd(_backward, setup_context=_setup_context)
