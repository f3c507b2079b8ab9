"""Many small pieces of work, such as tests, in as few processes as survive them.

One process does them all, unless a piece ends it: by a fault on the GPU, after which CUDA answers
only with errors in that process, by a crash, or by doing nothing for too long. The next process
then continues after that piece. Every process finishes at least one piece, or the rest is given up.
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
# Once it is set, the time of everything is over: every process ends and none begins.
stopped = threading.Event()
POLL_SECONDS = 0.1
# Between a request to end and the end by force; benchmarks.run ends its children meanwhile.
GRACE_SECONDS = 5.0
TAIL = 3000


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


@dataclass
class Ended:
    """What one process said, and how it ended."""

    code: int | None = None
    seconds: float = 0.0
    output: str = ""
    why: str = ""  # the reason to end it, "" if it ended by itself
    names: list[str] | None = None
    records: list[Record] = field(default_factory=list)
    started: str = ""  # the piece that has not ended
    since: float = 0.0  # when that piece began, by time.monotonic()

    @property
    def ending(self) -> str:
        manner = self.why or f"its process ended with code {self.code}"
        return f"{manner}\n{self.output[-TAIL:].strip()}"

    def hear(self, said: TextIO, tell: Callable[[Record], None]) -> bool:
        """Read the new lines that are complete; return whether there are any."""
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
                self.names = words["names"]
            elif "start" in words:
                self.started, self.since = words["start"], time.monotonic()
            elif "end" in words:
                self.started = ""
                record = Record(words["end"], words["outcome"], words["seconds"], words["text"])
                self.records.append(record)
                tell(record)


def seconds_left(deadline: float) -> float:
    """Return the seconds until `deadline`, which is by time.monotonic()."""
    return 0.0 if stopped.is_set() else max(0.0, deadline - time.monotonic())


@contextlib.contextmanager
def end_on_signals() -> Iterator[Callable[[], int]]:
    """Let a request to end this process end its children, so that it can report what is known.

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


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Any, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child with a process group of its own, which ends with the context at the latest.

    The session is that of this process: whoever ends a session ends the children with it.
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
        # The whole group: a grandchild may outlive the child. What hangs in the driver survives
        # even force, and is left behind.
        for force in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, force)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)


def run_limited(
    command: Sequence[str],
    deadline: float,
    *,
    env: Mapping[str, str] | None = None,
    patience: float = math.inf,
    by_records: bool = False,
    tell: Callable[[Record], None] = lambda record: None,
) -> Ended:
    """Run one command until `deadline` at most, and while it is not silent for `patience` seconds.

    It breaks the silence by output, or `by_records` only by the lines of benchmarks.gpu.watch.
    """
    began = heard = time.monotonic()
    ended, size = Ended(), 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder) / "records"
        path.touch()
        with (
            path.open(encoding="utf-8") as said,
            process(command, log, {**(env or {}), RECORDS: str(path)}) as child,
        ):
            running = True
            while running and not ended.why:
                running = child.poll() is None  # before the last look at its records
                before, size = size, os.fstat(log.fileno()).st_size
                if ended.hear(said, tell) or (size > before and not by_records):
                    heard = time.monotonic()
                if running:
                    time.sleep(POLL_SECONDS)
                    ended.why = _why_end(deadline, heard, patience)
        ended.code, ended.seconds = child.returncode, time.monotonic() - began
        log.seek(0)
        ended.output = log.read().decode(errors="replace")
    return ended


def _why_end(deadline: float, heard: float, patience: float) -> str:
    """Return why to end a process that was last heard then, "" to let it run."""
    if not seconds_left(deadline):
        return BUDGET
    return f"nothing happened for {patience:.0f} s" if time.monotonic() - heard > patience else ""


def collect(command: Sequence[str], label: str, deadline: float, **limits: Any) -> Any:
    """Return the names that a command lists, or a Record called `label` of why it lists none."""
    ended = run_limited(command, deadline, by_records=True, **limits)
    if ended.names is not None:
        return ended.names
    if ended.why == BUDGET:
        return Record(label, NOT_RUN, 0.0, BUDGET)
    return Record(label, FAILED, ended.seconds, ended.ending)


def run_isolated(
    command: Callable[[Sequence[str]], Sequence[str]],
    label: str,
    deadline: float,
    *,
    names: Sequence[str] = (),
    log: Path | None = None,
    tell: Callable[[Record], None] = lambda record: None,
    **limits: Any,
) -> list[Record]:
    """Return a record of every piece.

    Args:
        command: returns the command for some pieces, or, for none, the command for all there are,
            which lists them itself.
        label: name of the record if no piece can be named.
        deadline: by time.monotonic().
        names: the pieces; default: all that the command lists.
        log: a file to which the output of the processes is added.
        tell: is called with each record at once.
        limits: environment and patience, see `run_limited`.
    """
    todo, records = list(names), []
    first = True
    while (first or todo) and seconds_left(deadline):
        ended = run_limited(command(todo), deadline, by_records=True, tell=tell, **limits)
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(ended.output)
        if first and not names:
            todo = ended.names or []
        found = list(ended.records)
        over = ended.why == BUDGET
        if ended.started:
            seconds = time.monotonic() - ended.since
            how, text = (NOT_RUN, BUDGET + " while it ran") if over else (FAILED, ended.ending)
            found.append(Record(ended.started, how, seconds, text))
            tell(found[-1])
        records += found
        done = {record.name for record in found}
        todo = [name for name in todo if name not in done]
        if not found and not over:
            if todo or ended.names is None:
                records += [Record(name, FAILED, 0.0, ended.ending) for name in todo or [label]]
            return records
        first = False
    rest = todo or ([] if records else [label])
    return records + [Record(name, NOT_RUN, 0.0, BUDGET) for name in rest]
