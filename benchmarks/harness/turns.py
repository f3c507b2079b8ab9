"""Workers that take turns: no two providers ever run at once, and none shares a process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import shared
from benchmarks.harness.measure import ROOT, Turn
from benchmarks.harness.worker import LONG_SECONDS, OK

# Threads of the last provider may spin for some milliseconds after their work.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """What one worker is asked to time."""

    op: str
    provider: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    seed: int = 0


@dataclass
class Result:
    case: Case
    status: str = OK
    extra_bytes: int | None = None
    turns: list[Turn] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == OK and bool(self.turns)


class Worker:
    """A child process for one case, as long as the context lasts."""

    def __init__(self, case: Case, log: Any, tree: Path | None) -> None:
        self.result, self.log = Result(case), log
        self.first = self.spent = 0.0  # seconds of its first call, and of its turns
        command = [sys.executable, "-m", "benchmarks.harness.worker"]
        if tree is not None:
            command += ["--fastrag", str(tree)]
        # A session of its own: what it starts ends with it, and Ctrl-C reaches the parent alone.
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            pass_fds=shared.descriptors(),
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply, or a status that says how the worker ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1][:200]}" if said else ""
        return {"status": f"failed: its process ended with code {code}{last}"}

    def prepare(self) -> None:
        handed = {"shared": shared.handles()}
        reply = self.ask({"do": "prepare", **handed, **asdict(self.result.case)})
        self.result.status = reply["status"]
        self.result.extra_bytes = reply.get("extra_bytes")
        self.first = reply.get("seconds", 0.0)

    def go(self, count: bool) -> None:
        time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        reply = self.ask({"do": "go"})
        self.spent += time.perf_counter() - start
        self.result.status = reply["status"]
        if count and reply["status"] == OK:
            self.result.turns.append(Turn(reply["wall"], reply["processor"]))

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of a request that its death left half-written
                    pipe.close()


@contextmanager
def started(case: Case, tree: Path | None) -> Iterator[Worker]:
    with tempfile.TemporaryFile() as log:
        worker = Worker(case, log, tree)
        try:
            yield worker
        finally:
            worker.end()


def time_cases(
    cases: Sequence[Case],
    rounds: int,
    trees: Sequence[Path | None] | None = None,
    *,
    together: bool = True,
    patience: float = math.inf,
    until: float = math.inf,
) -> list[Result]:
    """Returns one result per case: `rounds` turns each, after one round that is not counted.

    Every round begins with another worker. `trees` are the checkouts to take fastrag from, one per
    case. A worker whose provider is wrong or fails takes no turns. Not `together`: each one has all
    its turns and ends before the next begins. Who has spent `patience` seconds on turns takes no
    more, and whose first call was long needs no turn that is not counted; both have one at least.
    Nobody takes more than that one when `time.monotonic()` is past `until`.
    """
    placed = list(zip(cases, trees or [None] * len(cases), strict=True))
    groups = [placed] if together else [[one] for one in placed]
    return [result for group in groups for result in _take_turns(group, rounds, patience, until)]


def _take_turns(
    placed: Sequence[tuple[Case, Path | None]], rounds: int, patience: float, until: float
) -> list[Result]:
    with ExitStack() as stack:
        workers = [stack.enter_context(started(case, tree)) for case, tree in placed]
        for worker in workers:
            worker.prepare()
        for turn in range(rounds + 1):
            for i in range(len(workers)):
                worker = workers[(turn + i) % len(workers)]
                if worker.result.status == OK and not _is_done(worker, turn, patience, until):
                    worker.go(count=turn > 0)
        return [worker.result for worker in workers]


def _is_done(worker: Worker, turn: int, patience: float, until: float) -> bool:
    if turn == 0:
        return patience < math.inf and worker.first > LONG_SECONDS
    is_over = worker.spent > patience or time.monotonic() > until
    return is_over and bool(worker.result.turns)
