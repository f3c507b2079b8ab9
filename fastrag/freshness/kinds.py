"""The policies by name.

frozen      nothing, as in Lewis et al. 2020, who train only the question encoder
every:n     all passages every n steps
rolling:r   r passages in each step, so that no vector is older than N / r steps
sweep:r     all passages with the same weights, r in each step
drift:x     all passages when the mean drift 1 - cos(stored, fresh) exceeds x
map         nothing, but questions are searched through a running fit of the drift
write-back  nothing, but the passages that a step has encoded anyway are stored
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from fastrag.freshness.policies import Frozen, MapSettings, RefreshPolicy, Rows, View
from fastrag.messages import shown

_BLOCK_ROWS = 1 << 16
__all__ = ["Drift", "Every", "Frozen", "Map", "Rolling", "Sweep", "WriteBack"]


class Every(RefreshPolicy, word="every"):
    """Encode all passages every n steps.

    Args:
        n: number of steps, at least 1.
    """

    usage = "every:n"
    observes = False

    def __init__(self, n: int) -> None:
        self.n = _at_least_one(n, "step")

    def choose(self, view: View) -> Rows:
        """Choose all passages if some are older than the last multiple of n."""
        return "all" if view.oldest < view.step // self.n * self.n else None


class Rolling(RefreshPolicy, word="rolling"):
    """Encode r passages in each step.

    No vector becomes older than P = ceil(N / r) steps. If older vectors are there at the start,
    this holds after P steps. With

        cum(h) = number of rows that have to be encoded within h steps,

    the smallest number of rows to take in order of age is max_h (cum(h) - r h). The other slots go
    to the rows that are retrieved most and have drifted furthest. Such slots exist with
    `write-back`, whose rows need no slot of their own.

    Args:
        n: r, at least 1.
    """

    usage = "rolling:r"
    samples = 4

    def __init__(self, n: int) -> None:
        self.n = _at_least_one(n, "passage")

    def choose(self, view: View) -> Rows:
        """Choose the rows that would otherwise become too old, then those of highest priority."""
        live = None if view.removed is None else (~view.removed).nonzero()[:, 0]
        age, priority = view.ledger.ages(view.step), view.ledger.priority(view.step)
        if live is not None:
            age, priority = age[live], priority[live]
        n = len(age)
        places = torch.arange(n) if n <= self.n else self._places(age, priority)
        return None if n == 0 else places if live is None else live[places]

    def _places(self, age: Tensor, priority: Tensor) -> Tensor:
        """Choose among rows of these ages and priorities `[n]`, more than r."""
        period = -(-len(age) // self.n)
        left = (period - age).clamp_(0, period)  # steps within which a row is due
        due = left.bincount(minlength=period + 1)[:period].cumsum(0)
        forced = int((due - self.n * torch.arange(period)).max().clamp(0, self.n))
        taken = torch.zeros(len(age), dtype=torch.bool)
        taken[_soonest(left, priority, forced)] = True
        if forced < self.n:
            wanted = ((priority > 0) & ~taken).nonzero()[:, 0]
            taken[_highest_first(wanted, priority)[: self.n - forced]] = True
            missing = self.n - int(taken.sum())
            if missing:
                left = left.masked_fill_(taken, period + 1)
                taken[_soonest(left, priority, missing)] = True
        return taken.nonzero()[:, 0]


def _soonest(left: Tensor, priority: Tensor, n: int) -> Tensor:
    """Return the n places that are due first, of equals those of highest priority."""
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    last = int(torch.searchsorted(left.bincount().cumsum(0), n))
    before, equal = (left < last).nonzero()[:, 0], left == last
    # Most rows have never been retrieved: they stay in order and are not sorted.
    sought = equal & (priority > 0)
    first = _highest_first(sought.nonzero()[:, 0], priority)[: n - len(before)]
    rest = _first(equal & ~sought, n - len(before) - len(first))
    return torch.cat([before, first, rest])


def _first(mask: Tensor, n: int) -> Tensor:
    """Return the first n places of a mask, and look no further."""
    found, start = [torch.empty(0, dtype=torch.int64)], 0
    for block in mask.split(_BLOCK_ROWS):
        if n <= 0:
            break
        found.append(start + block.nonzero()[:n, 0])
        n -= len(found[-1])
        start += len(block)
    return torch.cat(found)


def _highest_first(places: Tensor, priority: Tensor) -> Tensor:
    return places[priority[places].argsort(descending=True, stable=True)]


class Sweep(RefreshPolicy, word="sweep"):
    """Encode all passages with one copy of the weights, r in each step, and store them together.

    All vectors have the same age, between P = ceil(N / r) and 2 P steps, once the first sweep is
    complete. Unlike `every`, no step takes longer than the others; unlike with `rolling`, vectors
    of different weights are never compared.

    Args:
        n: r, at least 1.
    """

    usage = "sweep:r"
    samples = 4

    def __init__(self, n: int) -> None:
        self.n = _at_least_one(n, "passage")
        self.sweep = self.n

    def choose(self, view: View) -> Rows:
        """Choose all passages, as soon as they have been stored."""
        return "all" if view.oldest < view.step else None


class Drift(RefreshPolicy, word="drift"):
    """Encode all passages when the mean drift exceeds x.

        drift = mean over all passages of 1 - cos(stored vector, vector under the present weights)

    Args:
        x: the limit, above 0 and below 2.
    """

    usage = "drift:x"
    samples = 8

    def __init__(self, x: float) -> None:
        if not 0.0 < x < 2.0:
            raise ValueError(f"x: expected a drift above 0 and below 2, got {x}")
        self.x = float(x)

    @classmethod
    def from_argument(cls, argument: str | None) -> RefreshPolicy | None:
        """Make the policy from a decimal number."""
        fits = argument is not None and re.fullmatch(r"[0-9]+(\.[0-9]+)?(e-[0-9]{1,3})?", argument)
        x = float(argument or 0) if fits else 0.0
        return cls(x) if 0.0 < x < 2.0 else None

    def choose(self, view: View) -> Rows:
        """Choose all passages if the drift is known and above the limit."""
        return "all" if view.drift is not None and view.drift > self.x else None

    def __str__(self) -> str:
        return f"drift:{self.x!r}"


class Map(RefreshPolicy, word="map"):
    """Search through a running fit of the drift, and encode no passages for it.

        d_fresh = A d_stored + b,   q . d_fresh = (A^T q) . d_stored + const

    Args:
        kind: `"affine"`, least squares with a ridge; `"orthogonal"`, Procrustes.
        half_life: number of steps after which a pair of vectors counts half; None: as many as the
            width of the vectors asks for, see `MapFit`.
    """

    usage = "map"
    samples = 8

    def __init__(
        self, kind: Literal["affine", "orthogonal"] = "affine", half_life: int | None = None
    ) -> None:
        if kind not in ("affine", "orthogonal"):
            raise ValueError(f"kind: expected 'affine' or 'orthogonal', got {shown(kind)}")
        if half_life is not None:
            _at_least_one(half_life, "step", "half_life")
        self.map = MapSettings(kind, half_life)

    @classmethod
    def from_argument(cls, argument: str | None) -> RefreshPolicy | None:
        """Make the policy from `orthogonal`, a half-life, or both with a colon between them."""
        if argument is None:
            return cls()
        found = re.fullmatch(r"(orthogonal)?(?:(?:^|:)([1-9][0-9]{0,17}))?", argument)
        if not argument or found is None:
            return None
        kind: Any = found[1] or "affine"
        return cls(kind, None if found[2] is None else int(found[2]))

    def choose(self, view: View) -> Rows:
        """Choose nothing."""
        return None

    def __str__(self) -> str:
        written = [
            str(ours)
            for ours, default in zip(self.map or (), MapSettings(), strict=True)
            if ours != default
        ]
        return ":".join([self.word, *written])


class WriteBack(RefreshPolicy, word="write-back"):
    """Store the vectors of the passages that a step has encoded anyway, and encode none for it.

    They are free and fresh, but of the passages that training moves most. Next to older vectors
    they are found more often, or more rarely, than they should be, and train again.
    """

    writes_back = True

    def choose(self, view: View) -> Rows:
        """Choose nothing."""
        return None


def _at_least_one(n: int, of: str, name: str = "n") -> int:
    if n < 1:
        raise ValueError(f"{name}: expected at least 1 {of}, got {n}")
    return n
