"""Helper of all launchers: make the device of the tensors the current one."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the device of x is current; it does nothing on a CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
