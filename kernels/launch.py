"""What every launcher does: make the device of its tensors the current one."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """The device of x, which need not be the current one; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
