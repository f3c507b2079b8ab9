"""Which steps fit the time, in the order of their importance."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.isolation import seconds_left, stopped

# A step that is not likely to be half done is not begun.
LEAST_SHARE = 0.4


@dataclass(frozen=True)
class Step:
    """One part of the suite.

    `run(deadline)` returns how it went, in a line; the deadline is by time.monotonic(). `estimate`
    and `most` are seconds. A step in the background takes no time of the others, and is waited for
    at the end.
    """

    name: str
    about: str
    run: Callable[[float], str]
    estimate: float
    most: float
    background: bool = False


@dataclass(frozen=True)
class Done:
    name: str
    how: str
    seconds: float


class Run:
    """Runs steps one after another until `deadline`, and says what became of each."""

    def __init__(self, deadline: float, changed: Callable[[Sequence[Done]], None]) -> None:
        self.deadline, self.changed = deadline, changed
        self.done: list[Done] = []
        self.lock = threading.Lock()

    def all(self, steps: Sequence[Step]) -> list[Done]:
        threads = [
            threading.Thread(target=self._one, args=(step,), daemon=True)
            for step in steps
            if step.background
        ]
        for thread in threads:
            thread.start()
        for step in steps:
            if not step.background:
                self._one(step)
        for thread in threads:
            thread.join()
        return self.done

    def _one(self, step: Step) -> None:
        began, left = time.monotonic(), seconds_left(self.deadline)
        if stopped.is_set():
            how = "not run: the suite was stopped"
        elif left < LEAST_SHARE * step.estimate:
            how = f"not run: budget ({left:.0f} s left, about {step.estimate:.0f} needed)"
        else:
            try:
                how = step.run(min(self.deadline, began + step.most))
            except Exception as error:  # the other steps are worth running all the same
                how = f"failed: {type(error).__name__}: {error}"
        with self.lock:
            self.done.append(Done(step.name, how, time.monotonic() - began))
            self.changed(self.done)


def table(steps: Sequence[Step], budget: float) -> str:
    """The plan in lines: what would begin when, if the estimates are right."""
    lines, at = [f"plan for {budget:.0f} s, most important first:"], 0.0
    for step in steps:
        fits = step.background or budget - at >= LEAST_SHARE * step.estimate
        when = "beside" if step.background else f"{at:5.0f} s" if fits else "budget"
        lines.append(
            f"  {when:>7}  {step.name:<24} about {step.estimate:4.0f} s, at most "
            f"{step.most:4.0f}  {step.about}"
        )
        if fits and not step.background:
            at += min(step.estimate, budget - at)
    return "\n".join(lines)
