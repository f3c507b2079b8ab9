"""How large a chunk may be: the byte limit of the buffers that hold vocabulary-sized rows."""

from __future__ import annotations

import math
import os

import torch

WORKSPACE_VARIABLE = "FASTRAG_WORKSPACE_BYTES"
# Each chunk reads and writes all of dW once, so a chunk wants thousands of rows on a GPU. On a CPU
# first-touching fresh pages costs more than that traffic, hence the smaller default.
DEFAULT_WORKSPACE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# A weight stored in another dtype than the maths is converted by slices of at most this size.
WEIGHT_SLICE_BYTES = 32 << 20


def workspace_bytes(device: torch.device) -> int:
    """Returns the limit in bytes: `FASTRAG_WORKSPACE_BYTES` if set, else the device's default.

    Raises:
        ValueError: the variable is not a positive whole number.
    """
    text = os.environ.get(WORKSPACE_VARIABLE, "")
    if not text:
        return DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES["cpu"])
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{WORKSPACE_VARIABLE}: expected a positive number of bytes, got {text!r}")
    return int(text)


def rows_per_chunk(row_bytes: float, device: torch.device) -> int:
    """Returns how many rows of `row_bytes` fit the workspace, at least one."""
    return max(1, int(workspace_bytes(device) // row_bytes))


def even_slices(total: int, limit: int) -> list[slice]:
    """Cuts range(total) into the fewest slices of at most `limit`, as equal as possible."""
    if total == 0:
        return []
    size = math.ceil(total / math.ceil(total / limit))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the maths for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which autocast is off: the maths of an op has the dtype that the op chose."""
    return torch.autocast(device.type, enabled=False)
