"""Many small pieces of work, such as tests, in as few processes as survive them.

One process does them all, unless a piece ends it: by a fault on the GPU, after which CUDA answers
nothing but errors in that process, by a crash, or by doing nothing for too long. Then the next
process goes on with the piece after that. Every process finishes one piece at least, or gives up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.watch import RECORDS
from benchmarks.measure import ROOT

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
NOT_RUN = "not run"
BUDGET = "the time was over"
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
    timed_out: bool = False

    @property
    def tail(self) -> str:
        return self.output[-TAIL:].strip()


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Any, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child with a session of its own, which ends with the context if not before."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
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
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Runs one command for at most so long, and returns what it said."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        timed_out = False
        with process(command, log, env or {}) as child:
            try:
                child.wait(max(0.0, seconds))
            except subprocess.TimeoutExpired:
                timed_out = True
        return Ended(child.returncode, time.monotonic() - began, _read(log), timed_out)


def _read(log: Any) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


@dataclass
class _Seen:
    """What one process said before it ended."""

    ended: Ended
    why: str  # it was ended: "" by itself, else what for
    names: list[str] | None = None
    records: list[Record] = field(default_factory=list)
    started: str = ""  # and not ended

    def ending(self) -> str:
        manner = self.why or f"its process ended with code {self.ended.code}"
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
    if seen.why == BUDGET:
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
    log: a file that what the processes print is added to.
    """
    todo, records = list(names), []
    first = True
    while (first or todo) and time.monotonic() < deadline:
        seen = _one_process(command(todo), deadline, patience, env or {})
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(seen.ended.output)
        if first and not names:
            todo = seen.names or []
        found = list(seen.records)
        if seen.started and seen.why != BUDGET:
            found.append(Record(seen.started, FAILED, seen.ended.seconds, seen.ending()))
        for record in found:
            tell(record)
        records += found
        done = {record.name for record in found}
        todo = [name for name in todo if name not in done]
        if not found and seen.why != BUDGET:
            if todo or seen.names is None:
                records += [Record(name, FAILED, 0.0, seen.ending()) for name in todo or [label]]
            return records
        first = False
    rest = todo or ([] if records else [label])
    return records + [Record(name, NOT_RUN, 0.0, BUDGET) for name in rest]


def _one_process(
    command: Sequence[str], deadline: float, patience: float, env: Mapping[str, str]
) -> _Seen:
    began = time.monotonic()
    why = ""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        path = Path(folder) / "records"
        with process(command, log, {**env, RECORDS: str(path)}) as child:
            said, heard = 0, began
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                size = path.stat().st_size if path.exists() else 0
                if size != said:
                    said, heard = size, now
                if now >= deadline:
                    why = BUDGET
                elif now - heard > patience:
                    why = f"nothing happened for {patience:.0f} s"
                if why:
                    break
        ended = Ended(child.returncode, time.monotonic() - began, _read(log))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    seen = _Seen(ended, why)
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # of a line that was not finished
            _hear(seen, json.loads(line))
    return seen


def _hear(seen: _Seen, said: dict[str, Any]) -> None:
    if "names" in said:
        seen.names = said["names"]
    elif "start" in said:
        seen.started = said["start"]
    elif "end" in said:
        seen.started = ""
        seen.records.append(Record(said["end"], said["outcome"], said["seconds"], said["text"]))
