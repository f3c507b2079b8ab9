"""Check, measure and time the providers of an operation, each in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure, shared
from benchmarks.harness.measure import Call, Turn
from benchmarks.harness.process import OK, Process, Refusal
from benchmarks.harness.registry import DTYPES, Op, Provider, Shape, error_of
from benchmarks.ops import OPS

# A call that takes longer is a turn by itself and needs no second call to be warm.
LONG_SECONDS = 1.0
# Threads of the last provider may spin for some milliseconds after their work.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """One provider on one problem."""

    op: str
    provider: str
    mode: str
    shape: Shape
    dtype: str
    device: str

    @property
    def entry(self) -> tuple[Op, Provider]:
        return OPS[self.op], OPS[self.op].provider(self.provider)

    def why_not(self) -> str:
        """Return the reason why the provider cannot run here, "" if it can."""
        return self.entry[1].why_not(self.device, self.dtype, self.mode)

    def problem(self) -> Any:
        """Return the inputs of a provider that can run here and is correct at the tiny shape."""
        if reason := self.why_not():
            raise Refusal(f"unavailable: {reason}")
        self.check(self.entry[0].checked[0])
        return self.inputs()

    def inputs(self) -> Any:
        return self.entry[0].make(self.shape, DTYPES[self.dtype], torch.device(self.device))

    def check(self, shape: Shape) -> None:
        device = torch.device(self.device)
        if wrong := error_of(*self.entry, self.mode, shape, self.dtype, device):
            raise Refusal(f"wrong: {wrong}")


@dataclass
class Result:
    case: Case
    status: str = OK
    extra_bytes: int | None = None
    turns: list[Any] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == OK and bool(self.turns)


class Timed:
    """Takes the turns of one provider, in its process: checked, and warm as soon as it is made.

    `extra` is the bytes of a call, None if unknown, and `seconds` the time of the first call.
    """

    def __init__(self, case: Case) -> None:
        op, provider = case.entry
        # The check at the tiny shape also loads whatever is loaded once. The other checks follow
        # the measurement of memory: they could leave a buffer behind that the timed call reuses.
        problem = case.problem()
        self.device = torch.device(case.device)
        self.call: Call = provider.prepare(case.mode, problem)
        if provider.compiles:
            self.call()
        start = time.perf_counter()
        self.extra = measure.extra_bytes(self.call, self.device)
        self.seconds = time.perf_counter() - start
        for shape in op.checked[1:]:
            case.check(shape)
        long = self.seconds > LONG_SECONDS
        self.n_calls = 1 if long else measure.calls_per_turn(self.call, self.device)

    def turn(self) -> Turn:
        return measure.one_turn(self.call, self.device, self.n_calls)


_timed: Any  # a Timed, or a replacement, in the process of one provider


def start(make: Callable[[Case], Any], case: Case, handed: dict[str, Any]) -> tuple[Any, float]:
    """Make what takes the turns; return its extra bytes and the seconds of its first call."""
    global _timed
    shared.take(handed)
    _timed = make(case)
    return _timed.extra, _timed.seconds


def turn() -> Any:
    return _timed.turn()


def peak_of_first_call(case: Case) -> float:
    """Return the bytes of the first call, infinite where memory does not suffice.

    Raises:
        OSError: the system does not tell.
    """
    call = case.entry[1].prepare(case.mode, case.problem())
    try:
        found = measure.extra_bytes(call, torch.device(case.device))
    except (torch.OutOfMemoryError, MemoryError):
        return math.inf
    if found is None:
        raise OSError("this system does not tell the peak of a process")
    return found


class Worker:
    """Takes the turns of one case, in a process of its own if the provider can run here."""

    def __init__(self, stack: ExitStack, case: Case, tree: Path | None) -> None:
        self.result, self.first, self.spent = Result(case), 0.0, 0.0
        if reason := case.why_not():
            self.result.status = f"unavailable: {reason}"
        else:
            self.process = stack.enter_context(Process(tree, module="benchmarks.ops"))

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.result.status != OK:
            return None
        self.result.status, found = self.process.ask(function, *args)
        return found

    def prepare(self, make: Callable[[Case], Any]) -> None:
        found = self.ask(start, make, self.result.case, shared.handles())
        self.result.extra_bytes, self.first = found or (None, 0.0)

    def go(self, count: bool) -> None:
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        found = self.ask(turn)
        self.spent += time.perf_counter() - began
        if count and found is not None:
            self.result.turns.append(found)

    def is_done(self, round_: int, patience: float, until: float) -> bool:
        if self.result.status != OK:
            return True
        if round_ == 0:
            return patience < math.inf and self.first > LONG_SECONDS
        is_over = self.spent > patience or time.monotonic() > until
        return is_over and bool(self.result.turns)


def time_cases(
    cases: Sequence[Case],
    rounds: int,
    trees: Sequence[Path | None] | None = None,
    *,
    together: bool = True,
    patience: float = math.inf,
    until: float = math.inf,
    make: Callable[[Case], Any] = Timed,
) -> list[Result]:
    """Return one result for each case: `rounds` turns, after a first round that does not count.

    Args:
        cases: what to time. A provider that is unavailable, wrong or fails takes no turns.
        rounds: each begins with another worker. No two workers ever run at once.
        trees: the checkouts to take fastrag from, one for each case.
        together: keep all processes alive; otherwise each ends before the next begins.
        patience: seconds of turns after which a worker takes no more, but at least one. A worker
            whose first call was long skips the round that does not count.
        until: `time.monotonic()` after which a worker takes only the one turn that it needs.
        make: what takes the turns.
    """
    placed = list(zip(cases, trees or [None] * len(cases), strict=True))
    results = []
    for group in [placed] if together else [[one] for one in placed]:
        with ExitStack() as stack:
            workers = [Worker(stack, case, tree) for case, tree in group]
            for worker in workers:
                worker.prepare(make)
            able = [worker for worker in workers if worker.result.status == OK]
            for round_ in range(rounds + 1):
                for i in range(len(able)):
                    worker = able[(round_ + i) % len(able)]
                    if not worker.is_done(round_, patience, until):
                        worker.go(count=round_ > 0)
            results += [worker.result for worker in workers]
    return results
