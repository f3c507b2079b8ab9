"""Peers of token_logp: log p(y_t | x, z_k, y_<t) from hidden states and head, with gradients.

All have the signature hidden [B, K, T, H], weight [V, H], labels [B, T] -> [B, K, T]. Their value
at a label PAD does not matter, since it is masked later.

Those that run only on a GPU are written from the packages' documented signatures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.registry import HALF, Prepare, Provider, needs, ours

PAD = 0
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def gather(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).log_softmax(-1)
    gold = labels[:, None, :, None].expand(*logp.shape[:3], 1)
    return logp.gather(-1, gold).squeeze(-1)


def checkpointed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return checkpoint(gather, hidden, weight, labels, use_reentrant=False)


def autocast(head: Head) -> Head:
    """Return the head under torch.autocast in the dtype of hidden, with softmax in float32."""

    @functools.wraps(head)
    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=hidden.dtype):
            return head(hidden, weight, labels)

    return run


def per_row(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Head:
    """Return the head of a function of rows [R, H], weight and targets [R] to -log p, [R]."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        targets = labels.unsqueeze(1).expand(hidden.shape[:3]).reshape(-1)
        return -cross_entropy(hidden.flatten(0, 2), weight, targets).view(hidden.shape[:3])

    return run


@per_row
def torch_linear_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # In chunks on a GPU only: on a CPU they have so few rows that they take thirty times as long.
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
    if reason := needs("liger_kernel")():
        return reason
    import liger_kernel.ops

    if hasattr(liger_kernel.ops, "LigerFusedLinearScaledCrossEntropyFunction"):
        return ""
    return "this liger_kernel has no scaled linear cross entropy"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a function for one shape at a time, built at its first call."""

    build = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args: build()(*args)


def providers(fastrag: Prepare, with_head: Callable[[Head], Prepare]) -> tuple[Provider, ...]:
    """Return ours, and the peers that are made of a head."""

    def peer(name: str, head: Head, **limits: Any) -> Provider:
        return Provider(name, with_head(head), **limits)

    def on_gpu(name: str, head: Head, missing: Callable[[], str], **limits: Any) -> Provider:
        return peer(name, head, devices=("cuda",), missing=missing, **limits)

    lce = torch_linear_cross_entropy
    return (
        ours("cpp", fastrag, devices=("cpu",)),
        ours("triton", fastrag, devices=("cuda",)),
        ours("torch", fastrag),
        peer("gather", gather),
        peer("gather-checkpoint", checkpointed),
        peer("gather-autocast", autocast(gather), dtypes=HALF),
        peer("linear-cross-entropy", lce, missing=no_torch_linear_cross_entropy),
        on_gpu("cce", cce, needs("cut_cross_entropy"), dtypes=HALF),
        on_gpu("liger", liger, needs("liger_kernel")),
        on_gpu("liger-scaled", liger_scaled, no_liger_scaled, dtypes=("bfloat16",)),
    )
