"""Checks of arguments: a ValueError names the argument, what was expected and what came.

Of a small op they are a good part: where all is well, each is one frame, and makes no tensor.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrag.messages import shown

# The floating point dtypes that torch computes in.
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Flags and text are no numbers; a tensor is refused because reading it would wait for the GPU.
_NO_NUMBERS = (bool, str, bytes, Tensor)


def readable(x: Tensor) -> bool:
    """Whether the host may look at the values of x: those of a GPU would have to be waited for."""
    return x.device.type == "cpu"


def show(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}"
    if x.is_nested:  # which has no shape
        return f"nested {str(x.dtype).removeprefix('torch.')}"
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {show(x)}")
    # By name, because importing torch.distributed.tensor takes long.
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor {show(x)} with placements "
            f"{getattr(x, 'placements', ())}. Call the loss inside the forward of the module whose "
            f"root group holds the head, where FSDP has gathered it, or pass {name}.full_tensor()"
        )
    if x.layout is not torch.strided:
        _refuse_layout(name, x)


def _refuse_layout(name: str, x: Tensor) -> None:
    layout = str(x.layout).removeprefix("torch.")
    raise ValueError(f"{name}: expected a dense tensor, got {show(x)} of layout {layout}")


def check_floating(name: str, x: Tensor) -> None:
    if type(x) is not Tensor:
        check_tensor(name, x)
    if x.layout is not torch.strided:
        _refuse_layout(name, x)
    if x.dtype not in _FLOATING:
        raise ValueError(f"{name}: expected a floating point dtype, got {show(x)}")


def check_integer(name: str, x: Tensor) -> None:
    if type(x) is not Tensor:
        check_tensor(name, x)
    if x.layout is not torch.strided:
        _refuse_layout(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int64 or int32, got {show(x)}")


def check_ndim(name: str, x: Tensor, layout: str) -> None:
    if type(x) is not Tensor:
        check_tensor(name, x)
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got {show(x)}")


def check_shape(name: str, x: Tensor, expected: tuple[int | None, ...], layout: str) -> None:
    if type(x) is not Tensor:
        check_tensor(name, x)
    try:
        shape = x.shape
    except RuntimeError:  # a nested tensor has none
        shape = torch.Size()
    if len(shape) == len(expected):
        for have, want in zip(shape, expected, strict=True):
            if want is not None and have != want:
                break
        else:
            return
    sizes = ", ".join("*" if want is None else str(want) for want in expected)
    raise ValueError(f"{name}: expected {layout} with sizes [{sizes}], got {show(x)}")


def check_device(**tensors: Tensor | None) -> None:
    first = None
    for x in tensors.values():
        if x is None:
            continue
        if first is None:
            first = x.device
        elif x.device != first:
            break
    else:
        return
    devices = {name: x.device for name, x in tensors.items() if x is not None}
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
    if weight.numel() == 0:
        raise ValueError(f"weight: expected V and H of at least 1, got {show(weight)}")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "[V]")
    # Comparisons, unlike math.isfinite, may be traced with a symbolic number by torch.compile.
    if not -math.inf < _number(logit_scale) < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {shown(logit_scale)}")
    if softcap is None:
        return None
    if not 0.0 < _number(softcap) < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {shown(softcap)}")
    return float(softcap)


def check_labels(labels: Tensor, n_examples: int, n_tokens: int) -> None:
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {show(labels)}")
    check_shape("labels", labels, (n_examples, n_tokens), "[B, T]")


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= _number(label_smoothing) < 1.0:
        raise ValueError(
            f"label_smoothing: expected a number in [0, 1), got {shown(label_smoothing)}"
        )


def _number(x: object) -> float:
    """x as a float, NaN where it is no number, or one that no float can hold."""
    if type(x) is float:
        return x
    try:
        return math.nan if isinstance(x, _NO_NUMBERS) else float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def whole(name: str, x: object) -> int:
    """x as an int; numpy's whole numbers too, but no tensor, which a GPU would be waited for."""
    if type(x) is not int:
        try:
            if isinstance(x, _NO_NUMBERS):
                raise TypeError
            x = operator.index(x)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"{name}: expected a whole number, got {shown(x)}") from None
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{name}: expected a whole number of 64 bits, got {shown(x)}")
    return x


def flag(name: str, x: object) -> bool:
    """x as a bool; no tensor, whose truth a GPU would be waited for."""
    if isinstance(x, Tensor):
        raise ValueError(f"{name}: expected True or False, got {shown(x)}")
    try:
        return bool(x)
    except ValueError:  # an array has as many truths as elements
        raise ValueError(f"{name}: expected True or False, got {shown(x)}") from None


def check_normalizer(normalizer: float | Tensor, reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(
            f"normalizer: expected None with reduction {shown(reduction)}, got a value"
        )
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer)
        if normalizer.numel() != 1 or normalizer.dim() > 1 or normalizer.is_complex():
            raise ValueError(
                f"normalizer: expected a number or a 0-d tensor, got {show(normalizer)}"
            )
        if torch.compiler.is_compiling() or not readable(normalizer):
            return
        normalizer = float(normalizer.detach())
    if not 0.0 <= _number(normalizer) < math.inf:
        raise ValueError(f"normalizer: expected a number of at least 0, got {shown(normalizer)}")


def check_tau(tau: float | Tensor) -> None:
    if isinstance(tau, Tensor):
        check_tensor("tau", tau)
        if tau.dim() or not tau.is_floating_point():
            raise ValueError(f"tau: expected a positive number or a 0-d tensor, got {show(tau)}")
        if torch.compiler.is_compiling() or not readable(tau):
            return
        tau = float(tau.detach())
    if not 0.0 < _number(tau) < math.inf:
        raise ValueError(f"tau: expected a positive number, got {shown(tau)}")


def check_no_tangent(op: str, *tensors: Tensor | None) -> None:
    """Refuses forward-mode differentiation, which an op without a formula for it drops silently."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"fastrag::{op} does not support forward-mode differentiation")


def check_rows(
    rows: Tensor, n: int, name: str = "rows", missing: str = "a missing passage"
) -> None:
    # A value check breaks a compiled graph; the kernels then guard memory, not the user.
    if torch.compiler.is_compiling() or not readable(rows):
        return
    if rows.numel() == 0:
        return
    lowest, highest = torch.aminmax(rows)
    if lowest.item() >= -1 and highest.item() < n:
        return
    b, k = (int(i) for i in ((rows < -1) | (rows >= n)).nonzero()[0])
    raise ValueError(
        f"{name}: expected values in [0, {n}), or -1 for {missing}, "
        f"got {int(rows[b, k])} at [{b}, {k}]"
    )


def check_storage(name: str, x: Tensor, scale: Tensor | None, offset: Tensor | None) -> None:
    """Refuses scale and offset that do not go with how the passages are stored."""
    if type(x) is not Tensor:
        check_tensor(name, x)
    if x.layout is not torch.strided:
        _refuse_layout(name, x)
    if scale is None and offset is None and x.dtype in _FLOATING:
        return
    factors = {"scale": scale, "offset": offset}
    if x.dtype != torch.int8:
        if x.dtype not in _FLOATING:
            raise ValueError(f"{name}: expected a floating point dtype or int8, got {show(x)}")
        for factor, given in factors.items():
            if given is not None:
                raise ValueError(
                    f"{factor}: expected None, since only int8 passages have one, "
                    f"got {show(given)} with {name} {show(x)}"
                )
        return
    if scale is None:
        raise ValueError(f"scale: expected [D] float32 for the codes of {name} {show(x)}, got None")
    for factor, given in factors.items():
        if given is None:
            continue
        check_tensor(factor, given)
        if given.dtype != torch.float32:
            raise ValueError(f"{factor}: expected float32, got {show(given)}")
        if given.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{factor}: expected a tensor without requires_grad, since int8 storage is not "
                f"trained, got {show(given)} with requires_grad=True"
            )
