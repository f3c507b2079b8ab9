"""RunningMap: the map of an index, fitted again as passages are encoded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastrag.freshness.maps import MapFit, VectorMap
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.freshness.ledger import RowLedger
    from fastrag.freshness.observations import Fresh
    from fastrag.index.base import Index

FITS_PER_MEAN_AGE = 4  # of the pairs: a fit costs D^3, and they change little in between

Pairs = tuple[Tensor, Tensor]  # stored and fresh vectors, both [n, D]


class RunningMap:
    """Collect pairs of stored and fresh vectors, and fit a map to them every few steps.

    The map itself is the retriever's, which searches through it.

    Attributes:
        fit: the sums over the pairs; None: the policy asks for no map.
        base: step at which the map was last the identity.
    """

    def __init__(self) -> None:
        self.fit: MapFit | None = None
        self.base = 0
        self._warned = False

    def forget(self, base: int | None = None) -> None:
        """Drop the pairs, and with a step, the map is the identity from then on."""
        self.fit = None
        self.base = self.base if base is None else base

    def follow(
        self, settings: tuple[Any, ...], dim: int, step: int, present: VectorMap | None
    ) -> None:
        """Begin a fit with these settings, unless one with them is under way."""
        if self.fit is None or self.fit.settings != settings:
            self.fit = MapFit(dim, *settings)
            if present is None:
                self.base = step

    def pairs(self, fresh: Fresh, index: Index, ledger: RowLedger) -> Pairs:
        """Return the pairs that fresh vectors make with those in the index.

        A row that was encoded since the map was the identity is stored as the inverse of the map of
        then: if that is not long ago, it says that the map is right. Such rows are left out.
        """
        if self.fit is None:
            return fresh.vectors[:0], fresh.vectors[:0]
        oldest = fresh.step - int(ledger.encoded_at.min())
        old = ledger.ages(fresh.step, fresh.rows) >= min(self.fit.mean_age, oldest // 2)
        old |= ledger.encoded_at[fresh.rows] <= self.base
        return index.vectors(fresh.rows[old]), fresh.vectors[old]

    def refitted(
        self, step: int, pairs: Iterable[Pairs], present: VectorMap | None
    ) -> tuple[RunningMap, VectorMap | None]:
        """Return this with further pairs, and its map, which is fitted every few steps.

        A singular fit leaves the map as it is.
        """
        if self.fit is None:
            return self, present
        made = copy.deepcopy(self)
        fit: Any = made.fit
        for each in pairs:
            fit.add(*each)
        if step % max(1, int(fit.mean_age / FITS_PER_MEAN_AGE)) == 0:
            try:
                present = fit.solve() or present
            except ValueError as error:
                if not self._warned:
                    without = "no map" if present is None else "the map of before"
                    warnings.warn(
                        f"refresh: no new map ({error}); the search goes on with {without}",
                        stacklevel=5,
                    )
                self._warned = made._warned = True
        fit.forget()
        return made, present

    def state_dict(self, present: VectorMap | None) -> dict[str, Any]:
        """Return the pairs and the map."""
        return {
            "base": self.base,
            "fit": None if self.fit is None else self.fit.state_dict(),
            "map": None if present is None else present.state_dict(),
        }

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], dim: int
    ) -> tuple[RunningMap, VectorMap | None]:
        """Return the pairs and the map of `state_dict`.

        Raises:
            ValueError: a value is not as expected.
            TypeError, KeyError: the state is no mapping, or something is missing.
        """
        made = cls()
        base, fit, present = state_dict["base"], state_dict["fit"], state_dict["map"]
        if type(base) is not int:
            raise ValueError(f"map: base: expected a number of steps, got {shown(base)}")
        made.base = base
        if fit is not None:
            made.fit = MapFit(dim, *fit["settings"])
            made.fit.load_state_dict(fit)
        return made, None if present is None else VectorMap(**present)
