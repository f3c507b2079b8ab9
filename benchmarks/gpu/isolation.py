"""Many small pieces of work, such as tests, in as few processes as survive them.

One process does them all, unless a piece ends it: by a fault on the GPU, after which CUDA answers
only with errors in that process, by a crash, or by taking too long. The next process then continues
with the next piece.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from benchmarks import ROOT
from benchmarks.harness.process import OK, POLL_SECONDS, Process

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
NOT_RUN = "not run"
BUDGET = "the time was over"
# Once it is set, every process ends and none begins.
stopped = threading.Event()
# Between a request to end and the end by force; benchmarks.run ends its children meanwhile.
GRACE_SECONDS = 5.0
TEXT = 4000  # characters of a failure


@dataclass(frozen=True)
class Record:
    """The outcome of one piece."""

    name: str
    outcome: str
    seconds: float = 0.0
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.outcome == FAILED


def seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline`, which is by time.monotonic()."""
    return 0.0 if stopped.is_set() else max(0.0, deadline - time.monotonic())


def why_end(deadline: float, heard: float, patience: float) -> str:
    """Return why to end a process that was last heard then, "" to let it run."""
    if not seconds_left(deadline):
        return BUDGET
    return f"nothing happened for {patience:.0f} s" if time.monotonic() - heard > patience else ""


@contextlib.contextmanager
def end_on_signals() -> Iterator[Callable[[], int]]:
    """Let a signal end the children of this process, so that it can report its results so far.

    Yields a function that returns the signal that came, 0 for none. A second one acts as usual.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        stopped.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Ended:
    """The end of a command, and its output."""

    code: int
    seconds: float
    output: str
    why: str  # the reason to end it, "" if it ended by itself

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it printed nothing"


def run_limited(
    command: Sequence[str],
    deadline: float,
    env: Mapping[str, str] | None = None,
    patience: float = inf,
) -> Ended:
    """Run a command until `deadline`, and only while it prints something every `patience` s."""
    began = heard = time.monotonic()
    size, why = 0, ""
    with tempfile.TemporaryFile() as log:
        # The child shares the session of this process: ending the session ends the child as well.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            while child.poll() is None and not why:
                before, size = size, os.fstat(log.fileno()).st_size
                heard = time.monotonic() if size > before else heard
                why = why_end(deadline, heard, patience)
                time.sleep(POLL_SECONDS)
        finally:
            # The whole group: a grandchild may outlive the child. What hangs in the driver survives
            # even force, and is left behind.
            for force in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, force)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_SECONDS)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Ended(child.returncode, time.monotonic() - began, output, why)


# ----------------------------------------------------------------------------------------- pieces


def cuda_error() -> str:
    """Return what CUDA reports once all launched work is done, "" if nothing.

    The next call would report a fault; here it belongs to the work just done.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def piece(do: Callable[[str], tuple[str, str]], name: str) -> tuple[str, str, bool]:
    """Run a piece in the child; return its outcome and text, and whether CUDA is lost to it."""
    try:
        outcome, text = do(name)
    except Exception as error:
        outcome, text = FAILED, f"{type(error).__name__}: {error}"
    if lost := cuda_error():
        return FAILED, f"{text}\nCUDA is lost to this process: {lost}".strip(), True
    return outcome, text, False


def run_isolated(
    do: Callable[[str], tuple[str, str]],
    names: Sequence[str],
    deadline: float,
    *,
    patience: float,
    env: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    tell: Callable[[Record], None] = lambda record: None,
    hear: Callable[[str], Any] = lambda output: None,
) -> list[Record]:
    """Return a record of every piece.

    Args:
        do: returns outcome and text of a piece, in the child.
        names: the pieces.
        deadline: by time.monotonic().
        patience: seconds that a piece may take.
        env: variables of the child.
        wrapper: the beginning of its command.
        tell: is called with each record at once.
        hear: is called with the output of each process.
    """
    records: list[Record] = []

    def keep(name: str, outcome: str, text: str, began: float) -> None:
        text = text if outcome == PASSED else text[-TEXT:]
        records.append(Record(name, outcome, round(time.monotonic() - began, 3), text))
        tell(records[-1])

    with contextlib.ExitStack() as stack:
        process: Process | None = None
        for name in names:
            began = time.monotonic()
            if not seconds_left(deadline):
                keep(name, NOT_RUN, BUDGET, began)
                continue
            status, found = OK, None
            if process is None:
                process = stack.enter_context(Process(env=env, wrapper=wrapper))
                status, _ = process.ask(int, why_end=lambda: why_end(deadline, inf, inf))
            if status == OK:
                began = time.monotonic()
                end = partial(why_end, deadline, began, patience)
                status, found = process.ask(piece, do, name, why_end=end)
            outcome, text, lost = found or (FAILED, f"{status}\n{process.output()}", True)
            if status.endswith(BUDGET):
                outcome, text = NOT_RUN, BUDGET + " while it ran"
            keep(name, outcome, text, began)
            if lost:
                hear(process.output())
                stack.close()
                process = None
        if process is not None:
            process.pipe.close()  # it ends, and a wrapper prints its findings
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.child.wait(GRACE_SECONDS)
            hear(process.output())
    return records
