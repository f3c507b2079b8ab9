"""log p(y_t | x, z_k, y_<t) alone, forward, and backward of a vector of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.registry import Op, Provider, Shape, ours
from benchmarks.ops import marginal_loss
from benchmarks.ops.heads import HEADS, PAD, Head, compiled, gather
from benchmarks.ops.marginal_loss import Problem

FORWARD, BOTH = MODES = ("forward", "forward-backward")


def outputs(mode: str, p: Problem, token_logp: Tensor) -> tuple[Tensor, ...]:
    """The value, and the gradients of a sum whose weights differ from row to row."""
    token_logp = torch.where((p.labels != PAD).unsqueeze(1), token_logp, 0.0)
    if mode == FORWARD:
        return (token_logp.detach(),)
    upstream = p.doc_scores.detach().unsqueeze(2).expand_as(token_logp).to(token_logp.dtype)
    grads = torch.autograd.grad(token_logp, (p.hidden, p.weight), upstream)
    return (token_logp.detach(), *grads)


def with_head(head: Head) -> Callable[[str, Problem], tuple[Tensor, ...]]:
    def run(mode: str, p: Problem) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(mode == BOTH):
            return outputs(mode, p, head(p.hidden, p.weight, p.labels))

    return run


@with_head
def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from fastrag import reference

    return reference.token_logp(hidden, weight, labels, ignore_index=PAD)


@with_head
def fastrag_token_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    import fastrag.functional as F

    return F.token_logp(hidden, weight, labels, ignore_index=PAD)


def gemms(mode: str, p: Problem) -> tuple[Tensor, ...]:
    if mode == BOTH:
        return marginal_loss.gemms(mode, p)
    return (p.weight.detach() @ p.hidden.detach().flatten(0, 2).t(),)


def flops(mode: str, shape: Shape) -> float:
    """The logits, or three products; who does not hold the logits until backward makes four."""
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
        Provider("gemms", gemms, "the products alone, logits held", kind="ceiling"),
        ours(
            "cpp",
            fastrag_token_logp,
            "fastrag, passes in C++",
            devices=("cpu",),
            dtypes=("float32",),
        ),
        ours("triton", fastrag_token_logp, "fastrag, passes in Triton", devices=("cuda",)),
        ours("torch", fastrag_token_logp, "fastrag, passes of torch"),
        *(
            Provider(name, with_head(head), about, **limits)
            for name, (head, about, limits) in HEADS.items()
        ),
        Provider(
            "gather-compile", with_head(compiled(gather)), "torch.compile of gather", compiles=True
        ),
    ),
    ceiling="gemms",
    checked=marginal_loss.OP.checked,
    shapes=marginal_loss.OP.shapes,
    small=marginal_loss.OP.small,
    flops=flops,
    bytes=least_bytes,
    workspace=marginal_loss.workspace_bytes,
    curves={"V": marginal_loss.OP.curves["V"]},
    curve_providers=(
        *("gemms", "cpp", "triton", "gather", "linear-cross-entropy", "cce", "liger"),
    ),
)
