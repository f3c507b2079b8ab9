"""Peers of token_logp: log p(y_t | x, z_k, y_<t) from hidden states and head, with gradients.

All have the signature hidden [B, K, T, H], weight [V, H], labels [B, T] -> [B, K, T]. Their value
where a label is PAD does not matter: what is made of them masks it.

What runs on a GPU only is written from the packages' documented signatures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.registry import HALF, needs

PAD = 0
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def gather(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1)
    gold = labels[:, None, :, None].expand(*logp.shape[:3], 1)
    return logp.gather(-1, gold).squeeze(-1)


def checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return checkpoint(gather, hidden, weight, labels, use_reentrant=False)


def autocast(head: Head) -> Head:
    """The head under torch.autocast in the dtype of hidden: softmax in float32."""

    @functools.wraps(head)
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=hidden.dtype):
            return head(hidden, weight, labels)

    return run


def per_row(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    """A head from a function of rows [R, H], weight and targets [R] that gives -log p, [R]."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        targets = labels.unsqueeze(1).expand(hidden.shape[:3]).reshape(-1)
        return -cross_entropy(hidden.flatten(0, 2), weight, targets).view(hidden.shape[:3])

    return run


@per_row
def torch_linear_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # By chunks where that pays: on a CPU they have so few rows that they take thirty times as long.
    options = torch.nn.LinearCrossEntropyOptions() if rows.is_cuda else None
    return nnf.linear_cross_entropy(
        rows, weight, targets, ignore_index=PAD, reduction="none", options=options
    )


def no_torch_linear_cross_entropy() -> str:
    if hasattr(nnf, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return ""
    return f"torch {torch.__version__} has no linear_cross_entropy with options"


@per_row
def cce(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(rows, weight, targets, ignore_index=PAD, reduction="none")


@per_row
def liger(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        rows, weight, targets, ignore_index=PAD, reduction="none", accum_dtype=torch.float32
    )


@per_row
def liger_scaled(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(rows, weight, targets, 1.0, PAD)


def no_liger_scaled() -> str:
    reason = needs("liger_kernel")()
    if reason:
        return reason
    import liger_kernel.ops

    if hasattr(liger_kernel.ops, "LigerFusedLinearScaledCrossEntropyFunction"):
        return ""
    return "this liger_kernel has no scaled linear cross entropy"


# name -> head, what it is, and the limits of a Provider
HEADS: dict[str, tuple[Head, str, dict[str, Any]]] = {
    "gather": (gather, "torch: logits, log_softmax, gather", {}),
    "gather-checkpoint": (checkpointed, "the same under activation checkpointing", {}),
    "gather-autocast": (autocast(gather), "the same under torch.autocast", {"dtypes": HALF}),
    "linear-cross-entropy": (
        torch_linear_cross_entropy,
        "torch's linear_cross_entropy of each token",
        {"missing": no_torch_linear_cross_entropy},
    ),
    "cce": (
        cce,
        "Cut Cross-Entropy of each token",
        {"devices": ("cuda",), "dtypes": HALF, "missing": needs("cut_cross_entropy")},
    ),
    "liger": (
        liger,
        "Liger's fused linear cross entropy of each token",
        {"devices": ("cuda",), "missing": needs("liger_kernel")},
    ),
    "liger-scaled": (
        liger_scaled,
        "Liger's fused linear scaled cross entropy",
        {"devices": ("cuda",), "dtypes": ("bfloat16",), "missing": no_liger_scaled},
    ),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one shape at a time, when it is first called."""

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    def run(*args: Any) -> Any:
        return build()(*args)

    return run
