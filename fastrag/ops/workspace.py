"""Vocabulary-sized memory: the size of a chunk, and a buffer that is reused between chunks.

On a CPU, the first access to new pages costs as much as several passes over them. Therefore `take`
returns a buffer that the thread keeps from one chunk to the next, and `advise` requests huge pages.
"""

from __future__ import annotations

import functools
import math
import os
import threading

import torch
from torch import Tensor

from fastrag.ops import backends

WORKSPACE_VARIABLE = "FASTRAG_WORKSPACE_BYTES"
# Each chunk reads and writes all of dW once, so a chunk should have thousands of rows on a GPU. On
# a CPU, the first access to new pages costs more than this traffic, hence the smaller default.
DEFAULT_WORKSPACE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
# A weight in another dtype than the operands of products is converted slice by slice, at most so
# many bytes each. On a CPU, the thread keeps as many bytes; smaller slices make slower products.
WEIGHT_SLICE_BYTES = {"cuda": 32 << 20, "cpu": 12 << 20}
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is ARM's
# Smaller tensors have too few pages for `advise` to pay.
_ADVISED_BYTES = 8 << 20


class _Kept(threading.local):
    buffer: Tensor | None = None
    block: Tensor | None = None


_kept = _Kept()


def workspace_bytes(device: torch.device) -> int:
    """Return the limit in bytes: `FASTRAG_WORKSPACE_BYTES` if set, else the device's default.

    Raises:
        ValueError: the variable is not a positive integer.
    """
    text = os.environ.get(WORKSPACE_VARIABLE, "")
    if not text:
        return DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES["cpu"])
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{WORKSPACE_VARIABLE}: expected a positive number of bytes, got {text!r}")
    return int(text)


def rows_per_chunk(row_bytes: float, device: torch.device) -> int:
    """Return how many rows of `row_bytes` fit the workspace, at least one."""
    return max(1, int(workspace_bytes(device) // row_bytes))


def even_slices(total: int, limit: int) -> list[slice]:
    """Cut range(total) into the fewest slices of at most `limit`, of nearly equal length."""
    if total == 0:
        return []
    starts = range(0, total, math.ceil(total / math.ceil(total / limit)))
    return list(map(slice, starts, (*starts[1:], total)))


@functools.cache
def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the maths for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies numbers of `dtype`, a type of 16 bits, itself.

    For bfloat16 these are AMX or AVX512-BF16 on x86, which torch uses through oneDNN. Without them,
    a product of bfloat16 in torch takes many times as long as converting the operands and
    multiplying float32. float16 is always converted: in its range, small gradients would be lost.
    """
    if dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in BF16_INSTRUCTIONS)


def without_autocast(device: torch.device) -> torch.autocast:
    """Return a context without autocast, since an op chooses the dtype of its maths itself."""
    # There is no autocast for meta tensors, of which only shapes are computed.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def take(numel: int) -> Tensor:
    """Return an uninitialised flat float32 buffer on the CPU of at least `numel` numbers.

    It belongs to the caller until `give_back`. Then the thread keeps it, so that its pages are
    mapped already for the next chunk. Sizes are powers of two up to the limit, so that batches of
    different sizes use one buffer.
    """
    kept, _kept.buffer = _kept.buffer, None
    if kept is not None and kept.numel() >= numel:
        return kept
    del kept  # freed before the larger buffer is allocated
    limit = workspace_bytes(torch.device("cpu")) // torch.float32.itemsize
    size = max(numel, min(1 << (numel - 1).bit_length(), limit))
    return advise(torch.empty(size, dtype=torch.float32))


def give_back(buffer: Tensor) -> None:
    """Return a buffer from `take`; the thread keeps it unless it is larger than the limit."""
    if buffer.nbytes <= workspace_bytes(buffer.device):
        _kept.buffer = buffer


def rows_per_slice(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows [width] of `dtype` a slice of WEIGHT_SLICE_BYTES has, at least one."""
    limit = WEIGHT_SLICE_BYTES.get(device.type, WEIGHT_SLICE_BYTES["cpu"])
    return max(1, limit // (width * dtype.itemsize))


def block(n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised block [n_rows, width] on the CPU, valid until the next call.

    The thread keeps its memory, since new pages cost more than the conversion of a block.
    """
    size = n_rows * width * dtype.itemsize
    if _kept.block is None or _kept.block.nbytes < size:
        _kept.block = None
        _kept.block = torch.empty(size, dtype=torch.uint8)
    return _kept.block[:size].view(dtype).view(n_rows, width)


def release() -> None:
    """Free the buffers that this thread keeps between chunks, if any.

    Example:
        >>> from fastrag.ops import workspace
        >>> workspace.give_back(workspace.take(100))
        >>> workspace.release()
    """
    _kept.buffer = _kept.block = None


def advise(fresh: Tensor) -> Tensor:
    """Request huge pages for a large tensor that has not been written yet, and return it."""
    # A subclass may have no memory, for example the fake tensors of torch.compile.
    plain = type(fresh) is Tensor and fresh.device.type == "cpu" and fresh.is_contiguous()
    if plain and fresh.nbytes >= _ADVISED_BYTES and not backends.why_not("cpp"):
        from fastrag import _C

        _C.advise_huge_pages(fresh.detach().view(-1).view(torch.uint8).numpy())
    return fresh
