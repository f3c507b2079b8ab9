"""How vectors are stored: in a floating-point dtype, or as int8 codes with a scale per dimension.

    int8:  x[d] ~ offset[d] + scale[d] * code[d]
           code = round((x - offset) / scale), clamped to [-127, 127]

offset is the mean of a sample of the corpus and scale the sample's largest distance from it over
127. A value of the sample is off by at most scale / 2; one further out is clamped, and counted.

A row starts at a multiple of 64 bytes, a cache line and the width of a vector register, so that no
load of the search straddles two lines. What lies between two rows is zero.
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
    """Between float32 vectors and what is stored of them; never changed once made.

    Args:
        dtype: a key of `DTYPES`.
        scale: `[D]` float32 for int8, else None; None too while there is nothing to measure.
        offset: the same.
    """

    dtype: str
    scale: Tensor | None = None
    offset: Tensor | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of what is stored."""
        return DTYPES[self.dtype]

    @functools.cached_property
    def arguments(self) -> dict[str, Tensor]:
        """Arguments with which operations read stored vectors: scale and offset, or none."""
        if self.scale is None or self.offset is None:
            return {}
        return {"scale": self.scale, "offset": self.offset}

    def to(self, device: torch.device | str) -> Codec:
        """The same on another device."""
        return Codec(self.dtype, **{name: x.to(device) for name, x in self.arguments.items()})

    def encode(self, vectors: Tensor, first_row: int = 0) -> tuple[Tensor, int]:
        """Stores finite float32 vectors `[n, D]`, of which the first is called `first_row`.

        Returns:
            What is stored `[n, D]`, and how many values were clamped.

        Raises:
            ValueError: a number is beyond the range of the dtype (the row is named).
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
        """The float32 vectors that `stored` `[..., D]` stands for."""
        if self.scale is None or self.offset is None:
            return stored.float()
        # In float64 nothing is rounded but the result, as in a fused multiply-add of the search.
        return (self.offset.double() + stored.double() * self.scale.double()).float()


def fit_int8(blocks: Iterable[Tensor]) -> Codec:
    """Finds scale and offset for int8 in one pass over float32 blocks `[n, D]`, n > 0 in all.

    A dimension that does not vary in them takes the scale of the widest one, so that a value that
    comes later is not clamped to the only one seen.
    """
    n = 0
    total = low = high = torch.zeros(())
    for block in blocks:
        if len(block) == 0:
            continue
        smallest, largest = block.amin(dim=0), block.amax(dim=0)  # aminmax takes seven times both
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
        widest = 2 * offset.abs().max() / MAX_CODE  # from -x to x wherever the offset lies
        widest = widest if bool(widest > 0) else torch.ones_like(widest)
    return Codec("int8", scale=torch.where(varies, scale, widest), offset=offset)


def pitch_of(dim: int, dtype: str) -> int:
    """Elements from one row to the next."""
    step = ROW_ALIGNMENT // DTYPES[dtype].itemsize
    return -(-dim // step) * step


def allocate(n: int, dim: int, dtype: str, device: torch.device | str) -> Tensor:
    """Room for n rows `[n, pitch]`: zero between the rows, unknown in them."""
    room = torch.empty(n, pitch_of(dim, dtype), dtype=DTYPES[dtype], device=device)
    workspace.advise(room)
    room[:, dim:] = 0
    return room


def to_numpy(stored: Tensor) -> np.ndarray[Any, Any]:
    """Stored rows as an array on the CPU; bfloat16, which numpy does not know, as uint16."""
    stored = stored.cpu()
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


def put_rows(index_emb: Tensor, rows: Tensor, stored: Tensor) -> None:
    """index_emb[rows] = stored; rows `[n]`, each once."""
    if index_emb.device.type == "cpu":
        # numpy copies row by row, in a half to a tenth of the time of torch's indexing.
        to_numpy(index_emb)[rows.numpy()] = to_numpy(stored)
    else:
        index_emb[rows] = stored


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of the array on disk."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)
