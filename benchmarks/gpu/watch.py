"""The child's side of isolation: say what begins and how it ended, and stop when CUDA is lost.

    python -m pytest -p benchmarks.gpu.watch ...

Each line of the file that RECORDS names is JSON: {"names": [...]} of what will run, {"start":
name}, {"end": name, "outcome", "seconds", "text"}. It is written at once, so that whatever ends the
process loses nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

RECORDS = "FASTRAG_RECORDS"
TEXT = 4000  # characters of a failure


class Recorder:
    """Appends to the file of RECORDS, if there is one."""

    def __init__(self) -> None:
        path = os.environ.get(RECORDS)
        self.file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115

    def say(self, **fields: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(fields) + "\n")
            self.file.flush()

    def begin(self, name: str) -> None:
        self.outcome, self.text, self.began = "passed", "", time.perf_counter()
        self.say(start=name)

    def end(self, name: str) -> None:
        seconds = round(time.perf_counter() - self.began, 3)
        text = self.text if self.outcome == "passed" else self.text[-TEXT:]
        self.say(end=name, outcome=self.outcome, seconds=seconds, text=text)


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


def each(names: Sequence[str], do: Callable[[str], str]) -> int:
    """Run pieces of work one by one, recording what each returns or raises.

    Returns 1 if one failed. The first one that loses CUDA is the last.
    """
    recorder, code = Recorder(), 0
    recorder.say(names=list(names))
    for name in names:
        recorder.begin(name)
        try:
            recorder.text = do(name)
        except Exception as error:
            recorder.outcome, recorder.text = "failed", f"{type(error).__name__}: {error}"
        lost = cuda_error()
        if lost:
            recorder.outcome, recorder.text = "failed", lost
        recorder.end(name)
        if recorder.outcome == "failed":
            print(f"failed: {name}: {recorder.text}", flush=True)
            code = 1
        if lost:
            break
    return code


class Watch(Recorder):
    """Records each test of a session of pytest."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not session.testsfailed:  # nothing is known about a file that cannot be imported
            self.say(names=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "passed" or self.outcome == "failed":
            return
        self.outcome, self.text = report.outcome, report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            self.text = str(report.longrepr[2])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield
        lost = cuda_error()
        if lost:
            item.session.shouldstop = lost
            pytest.fail(f"CUDA is lost to this process: {lost}", pytrace=False)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.end(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(), "benchmarks.gpu.watch.Watch")
