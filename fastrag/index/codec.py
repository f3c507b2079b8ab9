"""Storage of vectors: in a floating-point dtype, or as int8 codes with a scale per dimension.

    int8:  x[d] ~ offset[d] + scale[d] * code[d]
           code = round((x - offset) / scale), clamped to [-127, 127]

In each dimension, offset is the mean of a sample of the vectors, and scale is the largest distance
of the sample from it, divided by 127. The error of a value within that distance is at most
scale / 2; a value further away is clamped and counted.

A row starts at a multiple of 64 bytes, which is a cache line and the width of a vector register, so
that no load of the search straddles two cache lines. The padding between rows is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrag.ops import workspace

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
ROW_ALIGNMENT = 64
MAX_CODE = 127


@dataclass(frozen=True)
class Codec:
    """Convert between float32 vectors and their stored form.

    Args:
        dtype: a key of `DTYPES`.
        scale: `[D]` float32 for int8 codes; None for other dtypes and in an index without rows.
        offset: like `scale`.
    """

    dtype: str
    scale: Tensor | None = None
    offset: Tensor | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the stored numbers."""
        return DTYPES[self.dtype]

    @functools.cached_property
    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of operations that read stored vectors: scale and offset, if any."""
        if self.scale is None or self.offset is None:
            return {}
        return {"scale": self.scale, "offset": self.offset}

    def to(self, device: torch.device | str) -> Codec:
        """Return this codec with its tensors on another device."""
        return Codec(self.dtype, **{name: x.to(device) for name, x in self.arguments.items()})

    def encode(self, vectors: Tensor, first_row: int = 0) -> tuple[Tensor, int]:
        """Convert finite float32 vectors to their stored form.

        Args:
            vectors: `[n, D]` float32.
            first_row: row number of the first vector, for messages.

        Returns:
            The stored numbers `[n, D]`, and how many values were clamped.

        Raises:
            ValueError: a number is beyond the range of the dtype (the message names the row).
        """
        if self.scale is None or self.offset is None:
            stored = vectors.to(self.torch_dtype)
            if self.torch_dtype != torch.float32:
                self._check_range(vectors, stored, first_row)
            return stored, 0
        codes = (vectors - self.offset).div_(self.scale).round_()
        n_clamped = 0
        if codes.numel() and bool(torch.maximum(codes.max(), -codes.min()) > MAX_CODE):
            n_clamped = int((codes.abs() > MAX_CODE).sum())
            codes.clamp_(-MAX_CODE, MAX_CODE)
        return codes.to(torch.int8), n_clamped

    def _check_range(self, vectors: Tensor, stored: Tensor, first_row: int) -> None:
        beyond = ~stored.isfinite()
        if bool(beyond.any()):
            row, column = (int(i) for i in beyond.nonzero()[0])
            raise ValueError(
                f"vectors: expected numbers up to {torch.finfo(self.torch_dtype).max:g}, the "
                f"largest of {self.dtype}, got {vectors[row, column].item():g} in row "
                f"{first_row + row}"
            )

    def decode(self, stored: Tensor) -> Tensor:
        """Return the float32 vectors that stored numbers `[..., D]` represent."""
        if self.scale is None or self.offset is None:
            return stored.float()
        # In float64 only the result is rounded, as by the fused multiply-add of the search.
        return (self.offset.double() + stored.double() * self.scale.double()).float()


def fit_int8(blocks: Iterable[Tensor]) -> Codec:
    """Choose scale and offset of int8 codes in one pass over float32 blocks `[n, D]`.

    A dimension in which the vectors do not vary takes the scale of the widest dimension, so that
    other values can be stored later.

    Raises:
        ValueError: the blocks have no rows.
    """
    n = 0
    total = low = high = torch.zeros(())
    for block in blocks:
        if len(block) == 0:
            continue
        smallest, largest = block.amin(dim=0), block.amax(dim=0)  # aminmax takes 7 times as long
        low = torch.minimum(low, smallest) if n else smallest
        high = torch.maximum(high, largest) if n else largest
        total = total.to(block.device) + block.sum(dim=0, dtype=torch.float64)
        n += len(block)
    if n == 0:
        raise ValueError("vectors: expected at least one row to measure, got none")
    offset = (total / n).float()
    scale = (torch.maximum(high.double() - offset, offset - low.double()) / MAX_CODE).float()
    varies = scale > torch.finfo(torch.float32).tiny
    if bool(varies.any()):
        widest = scale.max()
    else:
        # All rows are equal. This range reaches from -x to x for the largest |x|.
        widest = 2 * offset.abs().max() / MAX_CODE
        widest = widest if bool(widest > 0) else torch.ones_like(widest)
    return Codec("int8", scale=torch.where(varies, scale, widest), offset=offset)


def pitch_of(dim: int, dtype: str) -> int:
    """Return the number of elements from one row to the next."""
    step = ROW_ALIGNMENT // DTYPES[dtype].itemsize
    return -(-dim // step) * step


def allocate(n: int, dim: int, dtype: str, device: torch.device | str) -> Tensor:
    """Allocate n rows `[n, pitch]`. The padding is zero, the rows themselves are uninitialised."""
    room = torch.empty(n, pitch_of(dim, dtype), dtype=DTYPES[dtype], device=device)
    workspace.advise(room)
    room[:, dim:] = 0
    return room


def to_numpy(stored: Tensor) -> np.ndarray[Any, Any]:
    """Return stored rows as an array on the CPU; bfloat16, which numpy lacks, becomes uint16."""
    stored = stored.cpu()
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def put_rows(index_emb: Tensor, rows: Tensor, stored: Tensor) -> None:
    """Compute index_emb[rows] = stored for rows `[n]` without repetition."""
    if index_emb.device.type == "cpu":
        # numpy copies whole rows and takes a half to a tenth of the time of torch's indexing.
        to_numpy(index_emb)[rows.numpy()] = to_numpy(stored)
    else:
        index_emb[rows] = stored


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the dtype of the array on disk."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
