"""log p(y_t | x, z_k, y_<t) alone, forward, and backward of a vector of gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.registry import Call, Op, Outputs, Prepare, Provider, Shape, directly
from benchmarks.ops import marginal_loss
from benchmarks.ops.heads import PAD, Head, compiled, gather, providers
from benchmarks.ops.marginal_loss import Problem

FORWARD, BOTH = MODES = ("forward", "forward-backward")


def outputs(mode: str, p: Problem, token_logp: Tensor) -> Outputs:
    """Return the value, and the gradients of a sum whose weights differ for each passage."""
    token_logp = torch.where((p.labels != PAD).unsqueeze(1), token_logp, 0.0)
    if mode == FORWARD:
        return (token_logp.detach(),)
    upstream = p.doc_scores.detach().unsqueeze(2).expand_as(token_logp).to(token_logp.dtype)
    grads = torch.autograd.grad(token_logp, (p.hidden, p.weight), upstream)
    return (token_logp.detach(), *grads)


def run_of(head: Head) -> Callable[[str, Problem], Outputs]:
    def run(mode: str, p: Problem) -> Outputs:
        with torch.set_grad_enabled(mode == BOTH):
            return outputs(mode, p, head(p.hidden, p.weight, p.labels))

    return run


def with_head(head: Head) -> Prepare:
    return directly(run_of(head))


@run_of
def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from fastrag import reference

    return reference.token_logp(hidden, weight, labels, ignore_index=PAD)


@with_head
def fastrag_token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    import fastrag.functional as F

    return F.token_logp(hidden, weight, labels, ignore_index=PAD)


def gemms(mode: str, p: Problem) -> Call:
    p = marginal_loss.multiplied(p)
    if mode == BOTH:
        return partial(marginal_loss.products, p)
    return lambda: (p.weight.detach() @ p.hidden.detach().flatten(0, 2).t(),)


def flops(mode: str, shape: Shape) -> float:
    """Count the logits, or three products; a provider that does not keep the logits makes four."""
    return marginal_loss.flops(mode, shape) / (1 if mode == BOTH else 3)


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    return marginal_loss.least_bytes(mode, shape, itemsize) / (1 if mode == BOTH else 2)


OP = Op(
    name="token_logp",
    about="log-probability of each label under each passage from hidden states",
    dims=marginal_loss.OP.dims,
    modes=MODES,
    outputs=("token_logp", "dhidden", "dweight"),
    make=marginal_loss.make,
    make_checked=marginal_loss.make_checked,
    oracle=oracle,
    providers=(
        Provider("gemms", gemms, "ceiling"),
        *providers(fastrag_token_logp, with_head),
        Provider("gather-compile", with_head(compiled(gather)), compiles=True),
    ),
    ceiling="gemms",
    checked=marginal_loss.OP.checked,
    shapes=marginal_loss.OP.shapes,
    small=marginal_loss.OP.small,
    flops=flops,
    bytes=least_bytes,
    workspace=marginal_loss.workspace_bytes,
    curves={"V": marginal_loss.OP.curves["V"]},
    curve_providers=marginal_loss.CURVE_PROVIDERS,
)
