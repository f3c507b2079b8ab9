"""int8 storage as the tests of doc_scores meet it: codes of a random index that lies off centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag import reference


@dataclass
class Codes:
    """Passages d = offset + scale * codes, and what they score in the dtype of an oracle."""

    codes: Tensor  # [N, D] or [B, K, D], int8
    scale: Tensor  # [D]
    offset: Tensor | None  # [D]

    def options(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
        offset = None if self.offset is None else self.offset.to(dtype)
        return {"scale": self.scale.to(dtype), "offset": offset}

    def fresh(self, rows: Tensor) -> Codes:
        return Codes(self.codes[rows.clamp(min=0)], self.scale, self.offset)

    def scores(self, query: Tensor, rows: Tensor | None, tau: float) -> Tensor:
        """The oracle on the dequantised vectors, in the dtype of `query`."""
        codes = self.codes.to(query.dtype)
        return reference.doc_scores(query, codes, rows, tau, **self.options(query.dtype))


def random_codes(n: int, width: int, with_offset: bool = True, device: str = "cpu") -> Codes:
    """All codes from -128 to 127, scales a factor of 30 apart, components off zero by a few."""
    codes = torch.randint(-128, 128, (n, width), dtype=torch.int8, device=device)
    scale = 1e-3 * 30.0 ** torch.rand(width, device=device)
    return Codes(codes, scale, torch.randn(width, device=device) if with_offset else None)
