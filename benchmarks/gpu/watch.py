"""The child's side of isolation: says what begins and how it ended, and stops where CUDA is lost.

    python -m pytest -p benchmarks.gpu.watch ...

A line of JSON each: {"names": [...]} of what will run, {"start": name}, {"end": name, "outcome",
"seconds", "text"}. They are in the file that RECORDS names as soon as they are said, so that what
ends the process ends nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest

RECORDS = "FASTRAG_RECORDS"
TEXT = 4000  # characters of a failure


class Recorder:
    """Appends to the file of RECORDS; to nothing where there is none."""

    def __init__(self) -> None:
        path = os.environ.get(RECORDS)
        self.file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115

    def say(self, **fields: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(fields) + "\n")
            self.file.flush()


def cuda_error() -> str:
    """What CUDA says once all that was launched is done, "" if nothing.

    A fault is told by whichever call comes next. Told here, it is that of the work just done.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Watch:
    def __init__(self) -> None:
        self.recorder = Recorder()
        self.outcome, self.text, self.began = "passed", "", 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not session.testsfailed:  # of a file that cannot be imported nothing is known
            self.recorder.say(names=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.text, self.began = "passed", "", time.perf_counter()
        self.recorder.say(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "passed" or self.outcome == "failed":
            return
        self.outcome = report.outcome
        self.text = report.longreprtext
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
        seconds = round(time.perf_counter() - self.began, 3)
        self.recorder.say(end=nodeid, outcome=self.outcome, seconds=seconds, text=self.text[-TEXT:])


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(), "benchmarks.gpu.watch.Watch")
