"""What a hand-written backward may do: never be differentiated, and sometimes work in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def needs_grad(x: Tensor | None) -> bool:
    """Whether a backward will ask for the gradient of x."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


class _Refusal(torch.autograd.Function):
    """Passes gradients through; stands between them and the op's inputs, and raises backwards."""

    @staticmethod
    def forward(ctx: Any, op: str, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in tensors[n_inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"fastrag::{ctx.op} does not support double backward")


def once_differentiable(op: str) -> Callable[[Backward], Backward]:
    """Decorates a backward so that differentiating its gradients raises RuntimeError.

    `torch.autograd.function.once_differentiable` raises only where the upstream gradient requires
    grad, and is silent for a loss whose upstream gradient is the constant 1. Here the gradients
    are tied to every input that requires grad; the op must therefore save those inputs.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grad_outputs)
            # Before the backward, which may overwrite what it saved.
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


# Ours to ask since torch 2.6, and torch's own check of the buffers that a compiled graph donates.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def graph_is_freed(saved: Tensor) -> bool:
    """True in a backward after which nobody reads its saved tensors: no retain_graph, no tracing.

    What the backward saved is then its own, to overwrite and to return.
    """
    # A traced graph runs again, and its tensors are of a subclass, as fake ones are.
    if _keeps_graph is None or type(saved) is not Tensor or torch.compiler.is_compiling():
        return False
    return not _keeps_graph()


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * scale in `dtype`: the product in the dtype of grad, rounded once.

    In place where the graph is freed behind this backward, so that nobody needs grad again: a copy
    of dW would cost more than the passes over the logits. A GPU rounds as it multiplies; a CPU
    would hold the product before it is rounded, another dW, if it were not in place.
    """
    if (grad.dtype == dtype or not grad.is_cuda) and graph_is_freed(grad):
        return grad.mul_(scale).to(dtype)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
