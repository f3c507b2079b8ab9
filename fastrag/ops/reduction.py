"""From one number per example to the loss: example weights, sum, mean over counted labels."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_examples(
    values: Tensor,
    reduction: str,
    *,
    normalizer: float | Tensor,
    example_weight: Tensor | None = None,
) -> Tensor:
    """Weighs values [B] by example; "none" keeps them, "sum" adds them, "mean" divides the sum.

    "mean" divides by `normalizer`, the number of labels that count, and not by B.
    """
    weighted = values if example_weight is None else values * example_weight.to(values.dtype)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total if reduction == "sum" else divide(total, normalizer)


def divide(total: Tensor, normalizer: float | Tensor) -> Tensor:
    """total / normalizer, and 0 with gradient 0 where the normalizer is 0."""
    if not isinstance(normalizer, Tensor):
        # torch takes no integer of more than 64 bits
        return total / float(normalizer) if normalizer > 0 else total * 0.0
    # To a GPU without waiting; back from one the host has to wait anyhow.
    normalizer = normalizer.to(total.device, total.dtype, non_blocking=total.is_cuda).reshape(())
    empty = normalizer == 0
    return torch.where(empty, 0.0, total) / torch.where(empty, 1.0, normalizer)
