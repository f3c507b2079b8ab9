"""The points that a run times, their order, and which of them fit its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import NamedTuple

from benchmarks.harness.registry import Op, Shape

# Assumed least cost of a point of an op of which none was timed yet.
FIRST_SECONDS = 60.0


class Point(NamedTuple):
    op: Op
    mode: str
    shape: Shape


def by_importance(op: Op, device: str) -> list[Point]:
    """Return the op's sweep: its headlines, then all modes of one shape after the other."""
    sweeps = ([Point(op, mode, shape) for shape in op.sweep(device, mode)] for mode in op.modes)
    sweep = [point for points in zip_longest(*sweeps) for point in points if point]
    headlines = [Point(op, mode, shape) for mode, shape in op.headlines]
    first = [point for point in headlines if point in sweep]
    return first + [point for point in sweep if point not in first]


def in_turn(ops: Iterable[Op], device: str) -> list[Point]:
    """Return the most important point of each op, then the second of each, and so on."""
    each = (by_importance(op, device) for op in ops)
    return [point for point in chain.from_iterable(zip_longest(*each)) if point]


class Budget:
    """Seconds for a whole run over `n_ops`.

    A point is started if the longest one of its op would still fit, or the longest of any op if its
    own has none; it may then take its op's share of the time left. On a busy machine all ops have
    fewer turns then, and the first one does not have them all.
    """

    def __init__(
        self, seconds: float, n_ops: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self.n_ops = clock, n_ops
        self.until = clock() + seconds
        self.longest: dict[str, float] = {}

    def fits(self, op: Op) -> bool:
        of_any = max([FIRST_SECONDS, *self.longest.values()])
        return self.clock() + self.longest.get(op.name, of_any) <= self.until

    @contextmanager
    def spent_on(self, op: Op) -> Iterator[float]:
        """Yield the time after which turns should end."""
        start = self.clock()
        yield start + (self.until - start) / self.n_ops
        self.longest[op.name] = max(self.longest.get(op.name, 0.0), self.clock() - start)
