"""Score and row of a hit in one int64 key, so that the largest keys are the best hits.

The upper half of a key holds the bits of the score in a form that sorts like the scores, the lower
half the complement of the row. All keys differ, so selecting the largest is unambiguous, and among
equal scores the lowest row wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).min  # no hit
_ROW_MASK = 0xFFFFFFFF


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """Return the keys of float32 scores [B, n] of rows [n]."""
    # Adding zero turns -0.0 into +0.0: the two compare equal, so their keys must tie.
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of int32 = order of float32
    return (bits.long() << 32) | (_ROW_MASK - rows)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and rows of keys; -inf and -1 for `NOTHING`."""
    nothing = keys == NOTHING
    bits = (keys >> 32).to(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    scores = bits.view(torch.float32).masked_fill(nothing, -torch.inf)
    rows = (_ROW_MASK - (keys & _ROW_MASK)).masked_fill(nothing, -1)
    return scores, rows
