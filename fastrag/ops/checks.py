"""Checks of arguments: a ValueError names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def show(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}"
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {show(x)}")


def check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating point dtype, got {show(x)}")


def check_integer(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int64 or int32, got {show(x)}")


def check_ndim(name: str, x: Tensor, layout: str) -> None:
    check_tensor(name, x)
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got {show(x)}")


def check_shape(name: str, x: Tensor, expected: tuple[int | None, ...], layout: str) -> None:
    check_tensor(name, x)
    agree = x.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(x.shape, expected, strict=True)
    )
    if not agree:
        sizes = ", ".join("*" if want is None else str(want) for want in expected)
        raise ValueError(f"{name}: expected {layout} with sizes [{sizes}], got {show(x)}")


def check_device(**tensors: Tensor | None) -> None:
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {listed}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> float | None:
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_shape("weight", weight, (None, hidden.shape[-1]), "[V, H]")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one vocabulary entry, got {show(weight)}")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "[V]")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")
    if softcap is None:
        return None
    if not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    return float(softcap)


def check_labels(labels: Tensor, n_examples: int, n_tokens: int) -> None:
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {show(labels)}")
    check_shape("labels", labels, (n_examples, n_tokens), "[B, T]")


def check_normalizer(normalizer: float | Tensor, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"normalizer: expected None with reduction {reduction!r}, got a value")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.dim() > 1:
            raise ValueError(
                f"normalizer: expected a number or a 0-d tensor, got {show(normalizer)}"
            )
    elif not (normalizer >= 0 and math.isfinite(normalizer)):
        raise ValueError(f"normalizer: expected a number of at least 0, got {normalizer}")


def check_rows(rows: Tensor, n: int) -> None:
    # A value check breaks a compiled graph; the kernels then guard memory, not the user.
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (rows < -1) | (rows >= n)
    if bool(bad.any()):
        b, k = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"rows: expected values in [0, {n}), or -1 for a missing passage, "
            f"got {int(rows[b, k])} at [{b}, {k}]"
        )
