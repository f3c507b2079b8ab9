"""Helpers of all ops for autograd and the dispatcher.

A hand-written backward rejects double differentiation and may scale saved gradients in place. A
small op may be called without torch's dispatcher, which costs a custom op about ten microseconds in
forward and backward each: little compared with a product with the head, but several times as much
as scoring a few passages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Backward = Callable[..., tuple[Tensor | None, ...]]

# Each condition means that a tracer, a transform or a mode must see the dispatched op. If none
# holds, its implementation may be called directly.
_MODES, _TRANSFORMS, _TRACES = (
    getattr(torch._C, name, lambda: True)
    for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_is_tracing")
)


def is_plain(*tensors: Tensor | None) -> bool:
    """Return True if nothing traces, transforms or intercepts a call with these tensors.

    The implementation of an op may then be called directly, or by a `torch.autograd.Function` if a
    gradient is needed.
    """
    if torch.compiler.is_compiling() or _MODES() or _TRANSFORMS() or _TRACES():
        return False
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not Parameter and x is not None:
            return False
    return True


class _Refusal(torch.autograd.Function):
    """Pass gradients through and raise in backward; tied to the inputs of the op."""

    @staticmethod
    def forward(ctx: Any, op: str, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in tensors[n_inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"fastrag::{ctx.op} does not support double backward")


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Decorate a backward so that differentiating its gradients raises a RuntimeError.

    `torch.autograd.function.once_differentiable` raises only if the upstream gradient requires
    grad, and so not for a loss, whose upstream gradient is the constant 1. Here the gradients
    depend on every saved input that requires grad, so the op must save its inputs.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grad_outputs)
            # Read before the backward, which may overwrite saved tensors.
            sources = (*ctx.saved_tensors, *grad_outputs)
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            inputs = [x for x in sources if isinstance(x, Tensor) and x.requires_grad]
            places = [i for i, grad in enumerate(grads) if grad is not None]
            if not inputs or not places:
                return grads
            tied = _Refusal.apply(op, len(inputs), *inputs, *(grads[i] for i in places))
            result = list(grads)
            for place, grad in zip(places, tied, strict=True):
                result[place] = grad
            return tuple(result)

        return guarded

    return decorate


# Available since torch 2.6, which calls it itself for the donated buffers of compiled graphs.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * scale in `dtype`: multiplied in the dtype of grad and rounded once.

    A backward calls this on a gradient that the forward saved. If the graph is freed after this
    backward (no retain_graph, no tracing), nothing reads `grad` again, so the product overwrites
    it: a copy of dW would cost more than the passes over the logits. On a GPU, a product in another
    dtype goes directly to its own tensor. On a CPU, torch would need a temporary of the size of dW
    for the unrounded product, so it is computed in place too and then rounded.
    """
    freed = (
        _keeps_graph is not None
        # A traced graph runs again. Its tensors are of a subclass, such as fake tensors.
        and type(grad) is Tensor
        and not torch.compiler.is_compiling()
        and not _keeps_graph()
    )
    if freed and (grad.dtype == dtype or not grad.is_cuda):
        return grad.mul_(scale).to(dtype)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
