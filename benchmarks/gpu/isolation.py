"""Many small pieces of work, such as tests, in as few processes as survive them.

One process does them all, unless a piece ends it: by a fault on the GPU, after which CUDA answers
nothing but errors in that process, by a crash, or by doing nothing for too long. Then the next
process goes on with the piece after that. Every process finishes one piece at least, or gives up.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.watch import RECORDS
from benchmarks.harness.measure import ROOT

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
NOT_RUN = "not run"
BUDGET = "the time was over"
# Once it is set the time of everything is over: every process ends, none begins.
stopped = threading.Event()
POLL_SECONDS = 0.1
# From a request to end to the end by force; benchmarks.run ends its workers meanwhile.
GRACE_SECONDS = 5.0
TAIL = 3000


@dataclass(frozen=True)
class Record:
    """What became of one piece."""

    name: str
    outcome: str
    seconds: float = 0.0
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.outcome == FAILED


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    code: int | None
    seconds: float
    output: str
    why: str = ""  # it was ended: "" by itself, else what for

    @property
    def tail(self) -> str:
        return self.output[-TAIL:].strip()


def seconds_left(deadline: float) -> float:
    """Until `deadline`, which is by time.monotonic()."""
    return 0.0 if stopped.is_set() else max(0.0, deadline - time.monotonic())


@contextlib.contextmanager
def end_on_signals() -> Iterator[Callable[[], int]]:
    """Within it a request to end this process ends its children, and lets it say what is known.

    Yields a function that tells which signal came, 0 for none. A second one acts as ever.
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


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Any, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child with a group of its own, which ends with the context if not before.

    The session is that of this process: who ends a session ends the children with it.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        yield child
    finally:
        # The whole group, of which the child may be gone and a grandchild not. What hangs in the
        # driver outlives even force, and is left behind.
        for force in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, force)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)


def run_limited(
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str] | None = None,
    patience: float = math.inf,
) -> Ended:
    """Runs one command for at most so long, and not on when it has said nothing for `patience`."""
    began = heard = time.monotonic()
    said, why = 0, ""
    with tempfile.TemporaryFile() as log:
        with process(command, log, env or {}) as child:
            while child.poll() is None and not why:
                size = os.fstat(log.fileno()).st_size
                if size > said:
                    said, heard = size, time.monotonic()
                why = _why_end(began + seconds, heard, patience)
                time.sleep(POLL_SECONDS)
        return Ended(child.returncode, time.monotonic() - began, _read(log), why)


def _why_end(deadline: float, heard: float, patience: float) -> str:
    """Why to end what was last heard then, "" to let it run."""
    if not seconds_left(deadline):
        return BUDGET
    return f"nothing happened for {patience:.0f} s" if time.monotonic() - heard > patience else ""


def _read(log: Any) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


@dataclass
class _Seen:
    """What one process said before it ended."""

    ended: Ended
    names: list[str] | None = None
    records: list[Record] = field(default_factory=list)
    started: str = ""  # and not ended
    since: float = 0.0  # by time.monotonic()

    def ending(self) -> str:
        manner = self.ended.why or f"its process ended with code {self.ended.code}"
        return f"{manner}\n{self.ended.tail}"


def collect(
    command: Sequence[str],
    label: str,
    *,
    deadline: float,
    patience: float,
    env: Mapping[str, str] | None = None,
) -> list[str] | Record:
    """Returns the names that a command says there are, or why it says none, in the label's name."""
    seen = _one_process(command, deadline, patience, env or {})
    if seen.names is not None:
        return seen.names
    if seen.ended.why == BUDGET:
        return Record(label, NOT_RUN, 0.0, BUDGET)
    return Record(label, FAILED, seen.ended.seconds, seen.ending())


def run_isolated(
    command: Callable[[Sequence[str]], Sequence[str]],
    label: str,
    *,
    deadline: float,
    patience: float,
    names: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    tell: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Returns a record of every piece.

    `command(names)` gives the command for some pieces, or, for none, that for all there are, which
    says itself what those are. deadline: by time.monotonic(). patience: seconds without a word
    after which a process is ended. label: what to call the whole where no piece can be named.
    log: a file that what the processes print is added to. tell: is told of each record at once.
    """
    todo, records = list(names), []
    first = True
    while (first or todo) and seconds_left(deadline):
        seen = _one_process(command(todo), deadline, patience, env or {}, tell)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(seen.ended.output)
        if first and not names:
            todo = seen.names or []
        found = list(seen.records)
        over = seen.ended.why == BUDGET
        if seen.started:
            seconds = time.monotonic() - seen.since
            how, text = (NOT_RUN, BUDGET + " while it ran") if over else (FAILED, seen.ending())
            found.append(Record(seen.started, how, seconds, text))
            tell(found[-1])
        records += found
        done = {record.name for record in found}
        todo = [name for name in todo if name not in done]
        if not found and not over:
            if todo or seen.names is None:
                records += [Record(name, FAILED, 0.0, seen.ending()) for name in todo or [label]]
            return records
        first = False
    rest = todo or ([] if records else [label])
    return records + [Record(name, NOT_RUN, 0.0, BUDGET) for name in rest]


def _one_process(
    command: Sequence[str],
    deadline: float,
    patience: float,
    env: Mapping[str, str],
    tell: Callable[[Record], None] = lambda record: None,
) -> _Seen:
    began = heard = time.monotonic()
    seen, why = _Seen(Ended(None, 0.0, "")), ""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder) / "records"
        path.touch()
        with (
            path.open(encoding="utf-8") as said,
            process(command, log, {**env, RECORDS: str(path)}) as child,
        ):
            running = True
            while running and not why:
                running = child.poll() is None  # before the last look at what it said
                if _hear(seen, said, tell):
                    heard = time.monotonic()
                if running:
                    time.sleep(POLL_SECONDS)
                    why = _why_end(deadline, heard, patience)
        seen.ended = Ended(child.returncode, time.monotonic() - began, _read(log), why)
    return seen


def _hear(seen: _Seen, said: TextIO, tell: Callable[[Record], None]) -> bool:
    """Takes in the lines that are new, and whole; returns whether there are any."""
    found = False
    while True:
        place = said.tell()
        line = said.readline()
        if not line.endswith("\n"):
            said.seek(place)
            return found
        found = True
        words = json.loads(line)
        if "names" in words:
            seen.names = words["names"]
        elif "start" in words:
            seen.started, seen.since = words["start"], time.monotonic()
        elif "end" in words:
            seen.started = ""
            record = Record(words["end"], words["outcome"], words["seconds"], words["text"])
            seen.records.append(record)
            tell(record)
