"""Checks of arguments: a ValueError names the argument, what was expected and what was given.

Checks take a considerable part of the time of a small op. Therefore a check that passes is one call
per argument and makes no tensor.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastrag.messages import shown

# The floating point dtypes that torch computes in.
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Not accepted as numbers: bool and text, and tensors, because reading one may wait for a GPU.
_NO_NUMBERS = (bool, str, bytes, Tensor)


def readable(x: Tensor) -> bool:
    """Return whether the host can read the values of x without waiting for a GPU."""
    return x.device.type == "cpu"


def show(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}"
    if x.is_nested:  # it has no shape
        return f"nested {str(x.dtype).removeprefix('torch.')}"
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def check_tensor(
    name: str,
    x: object,
    layout: str = "",
    sizes: tuple[int | None, ...] = (),
    kind: tuple[str, tuple[torch.dtype, ...]] | None = None,
) -> None:
    """Check that x is a dense, plain tensor of the right dtype and shape.

    Args:
        name: name of the argument.
        x: the argument.
        layout: the shape in messages, such as "[B, K]"; "" allows any shape.
        sizes: the size of each dimension, None for any; () checks only the number of dimensions.
        kind: a description of the allowed dtypes, and these dtypes; None allows any.
    """
    if type(x) is not Tensor and type(x) is not Parameter:
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {show(x)}")
        # Compared by name, because importing torch.distributed.tensor takes long.
        if type(x).__name__ == "DTensor":
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor {show(x)} with placements "
                f"{getattr(x, 'placements', ())}. Call the loss inside the forward of the module "
                f"whose root group holds the head, where FSDP has gathered it, or pass "
                f"{name}.full_tensor()"
            )
    if x.layout is not torch.strided:
        got = str(x.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense tensor, got {show(x)} of layout {got}")
    if kind is not None and x.dtype not in kind[1]:
        raise ValueError(f"{name}: expected {kind[0]}, got {show(x)}")
    if not layout:
        return
    if x.dim() == (len(sizes) or layout.count(",") + 1):
        # a nested tensor has no shape
        for have, want in zip(() if x.is_nested else x.shape, sizes, strict=False):
            if want is not None and have != want:
                break
        else:
            if not (x.is_nested and sizes):
                return
    exactly = ", ".join("*" if want is None else str(want) for want in sizes)
    expected = f"{layout} with sizes [{exactly}]" if sizes else layout
    raise ValueError(f"{name}: expected {expected}, got {show(x)}")


check_floating = functools.partial(check_tensor, kind=("a floating point dtype", _FLOATING))
check_integer = functools.partial(check_tensor, kind=("int64 or int32", (torch.int32, torch.int64)))
check_int64 = functools.partial(check_tensor, kind=("int64", (torch.int64,)))


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
    """Check a head against hidden states [..., H], already checked; return softcap as a float."""
    check_floating("weight", weight, "[V, H]", (None, hidden.shape[-1]))
    if weight.numel() == 0:
        raise ValueError(f"weight: expected V and H of at least 1, got {show(weight)}")
    if bias is not None:
        check_floating("bias", bias, "[V]", (weight.shape[0],))
    # Comparisons, unlike math.isfinite, may be traced with a symbolic number by torch.compile.
    scale = logit_scale if type(logit_scale) is float else _number(logit_scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {shown(logit_scale)}")
    if softcap is None:
        return None
    if not 0.0 < _number(softcap) < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {shown(softcap)}")
    return float(softcap)


def check_label_smoothing(label_smoothing: float) -> None:
    e = label_smoothing if type(label_smoothing) is float else _number(label_smoothing)
    if not 0.0 <= e < 1.0:
        raise ValueError(
            f"label_smoothing: expected a number in [0, 1), got {shown(label_smoothing)}"
        )


def _number(x: object) -> float:
    """Return x as a float; NaN if it is not a number or too large for a float."""
    try:
        return math.nan if isinstance(x, _NO_NUMBERS) else float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def whole(name: str, x: object) -> int:
    """Return x, an integer of Python or numpy, as an int; raise ValueError for anything else.

    A tensor is rejected, since reading it may wait for a GPU.
    """
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
    """Return x as a bool; reject a tensor, since reading it may wait for a GPU."""
    if isinstance(x, Tensor):
        raise ValueError(f"{name}: expected True or False, got {shown(x)}")
    try:
        return bool(x)
    except ValueError:  # an array of several elements
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
    if not 0.0 < (tau if type(tau) is float else _number(tau)) < math.inf:
        raise ValueError(f"tau: expected a positive number, got {shown(tau)}")


def check_no_tangent(op: str, *tensors: Tensor | None) -> None:
    """Reject forward-mode differentiation: an op without a formula would silently drop it."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"fastrag::{op} does not support forward-mode differentiation")


def check_rows(
    rows: Tensor, n: int, name: str = "rows", missing: str = "a missing passage"
) -> None:
    # Reading values would break a compiled graph. The kernels read no memory outside their arrays.
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
    """Reject a scale and offset that do not fit the dtype of the stored passages x."""
    if (type(x) is not Tensor and type(x) is not Parameter) or x.layout is not torch.strided:
        check_tensor(name, x)
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


def check_ids(name: str, ids: Tensor, n_vocab: int | None) -> None:
    """Raise ValueError unless `ids` are token ids [B, S] of a vocabulary.

    Values are only checked on the CPU, because reading them would wait for a GPU.
    """
    check_integer(name, ids, "[B, S]")
    unread = not readable(ids) or torch.compiler.is_compiling()
    if n_vocab is None or unread or ids.numel() == 0:
        return
    low, high = ids.aminmax()
    if low < 0 or high >= n_vocab:
        bad = int(low) if low < 0 else int(high)
        raise ValueError(f"{name}: expected token ids in [0, {n_vocab}), the vocabulary, got {bad}")
