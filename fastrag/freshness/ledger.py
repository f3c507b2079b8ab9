"""RowLedger: how old each stored vector is, how often it is retrieved, and how fast it drifts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrag.messages import shown

# A retrieval that is this many steps old counts half.
MEMORY_STEPS = 256
# The counts grow by a factor per step instead of all rows shrinking. They are scaled back before
# they leave float32.
_LARGEST = 1e18


class RowLedger:
    """Per row of an index: the weights that made its vector, its retrievals, its drift.

        drift of row i   = 1 - cos(stored vector, vector under the present weights)
        predicted drift  = rate_i * age_i,  rate_i = last measured drift / age at that time

    A row without a measurement has the rate of all measurements together. Memory: 12 bytes a row.

    Args:
        n_rows: N; all rows count as encoded at `step`.
        step: number of optimiser steps done.

    Attributes:
        encoded_at: number of optimiser steps of the weights that made each vector, `[N]` int32.

    Example:
        >>> ledger = RowLedger(3)
        >>> ledger.wrote(torch.tensor([1]), 4)
        >>> ledger.ages(6)
        tensor([6, 2, 6], dtype=torch.int32)
    """

    def __init__(self, n_rows: int, step: int = 0) -> None:
        self.encoded_at = torch.full((n_rows,), step, dtype=torch.int32)
        self._seen = torch.zeros(n_rows)
        self._rate = torch.full((n_rows,), torch.nan)
        self._weight = 1.0  # of a retrieval in the present step
        self._drift = self._age = 0.0  # sums over all measurements

    def __len__(self) -> int:
        return len(self.encoded_at)

    def grow(self, n_rows: int, step: int) -> None:
        """Count rows that were added to the index as encoded at `step`."""
        more = n_rows - len(self)
        if more <= 0:
            return
        new = RowLedger(more, step)
        self.encoded_at = torch.cat([self.encoded_at, new.encoded_at])
        self._seen = torch.cat([self._seen, new._seen])
        self._rate = torch.cat([self._rate, new._rate])

    def ages(self, step: int, rows: Tensor | None = None) -> Tensor:
        """Return the optimiser steps since each vector was made, `[N]` or `[n]` int32."""
        at = self.encoded_at if rows is None else self.encoded_at[rows]
        return step - at

    def wrote(self, rows: Tensor | None, step: int | Tensor) -> None:
        """Record that weights of `step` made the vectors of rows `[n]`; None: of all rows."""
        self.encoded_at[slice(None) if rows is None else rows] = step

    def retrieved(self, rows: Tensor) -> None:
        """Record a step that retrieved rows `[n]`, repeated as often as they were found."""
        if self._weight > _LARGEST:
            self._seen /= self._weight
            self._weight = 1.0
        self._weight *= 2.0 ** (1.0 / MEMORY_STEPS)
        self._seen.index_add_(0, rows, torch.full((len(rows),), self._weight))

    def measured(self, rows: Tensor, drift: Tensor, step: int) -> None:
        """Record the drift `[n]` of the vectors of rows `[n]`, before they are replaced."""
        age = self.ages(step, rows).clamp(min=1).float()
        self._rate[rows] = drift.float() / age
        self._drift += float(drift.sum())
        self._age += float(age.sum())

    def predicted(self, step: int, rows: Tensor | None = None) -> Tensor:
        """Return the predicted drift, `[N]` or `[n]`."""
        rate = self._rate if rows is None else self._rate[rows]
        pooled = self._drift / self._age if self._age else 0.0
        return rate.nan_to_num(nan=pooled) * self.ages(step, rows)

    def priority(self, step: int) -> Tensor:
        """Return weighted retrievals times predicted drift, `[N]`: what staleness costs a row."""
        return self._seen * self.predicted(step)

    @contextlib.contextmanager
    def assuming(self, written: Sequence[tuple[Tensor, int]]) -> Iterator[None]:
        """Count rows `[n]` as encoded at a step within the context."""
        before = [(rows, self.encoded_at[rows]) for rows, _ in written]
        try:
            for rows, step in written:
                self.encoded_at[rows] = step
            yield
        finally:
            for rows, at in reversed(before):
                self.encoded_at[rows] = at

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors and numbers that a resumed run needs."""
        return {
            "encoded_at": self.encoded_at.clone(),
            "seen": self._seen.clone(),
            "rate": self._rate.clone(),
            "sums": [self._weight, self._drift, self._age],
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> RowLedger:
        """Make a ledger of the result of `state_dict`.

        Raises:
            ValueError: something is missing or of another shape or dtype.
        """
        expected = cls(0).state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            raise ValueError(f"rows: expected {', '.join(expected)}, got {shown(state_dict)}")
        at = state_dict["encoded_at"]
        n_rows = len(at) if isinstance(at, Tensor) and at.ndim == 1 else -1
        for name in ("encoded_at", "seen", "rate"):
            got, dtype = state_dict[name], expected[name].dtype
            if not isinstance(got, Tensor) or got.shape != (n_rows,) or got.dtype != dtype:
                raise ValueError(f"rows: {name}: expected {dtype} [N], got {shown(got)}")
        sums = state_dict["sums"]
        if not isinstance(sums, list) or [type(each) for each in sums] != [float] * 3:
            raise ValueError(f"rows: sums: expected three numbers, got {shown(sums)}")
        made = cls(0)
        made.encoded_at, made._seen = at.clone(), state_dict["seen"].clone()
        made._rate = state_dict["rate"].clone()
        made._weight, made._drift, made._age = sums
        return made
