"""The tests marked `gpu`, one by one in a child of the suite; nothing but pytest is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import zip_longest

import pytest

from benchmarks import ROOT
from benchmarks.gpu.isolation import FAILED, PASSED

# Whatever else is installed there, tests run with pytest alone.
ENV = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
OPTIONS = ["-q", "-m", "gpu", "-p", "no:cacheprovider"]


class Watch:
    """Collects the tests of a session and the outcome of the last one."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.outcome, self.text = PASSED, ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome, self.text = FAILED, str(report.longrepr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == PASSED or self.outcome == FAILED:
            return
        self.outcome, self.text = report.outcome, report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            self.text = str(report.longrepr[2])


def _session(*words: str) -> Watch:
    watch = Watch()
    code = pytest.main([*OPTIONS, *words], plugins=[watch])
    if watch.outcome == PASSED and code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        watch.outcome, watch.text = FAILED, f"pytest: {code!r}"
    return watch


def collect(file: str) -> tuple[str, str]:
    """Return the names of the tests in a file, as JSON."""
    watch = _session(file, "--collect-only")
    return watch.outcome, watch.text or json.dumps(watch.names)


def run(name: str) -> tuple[str, str]:
    watch = _session(name)
    return (watch.outcome, watch.text) if watch.names else (FAILED, watch.text or "no such test")


def files() -> list[str]:
    """Return the files with tests for a GPU: collecting others is slow and needs more packages."""
    marked = re.compile(r"\bmark\.gpu\b")
    found = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(p.relative_to(ROOT)) for p in found if marked.search(p.read_text()))


def by_function(names: Sequence[str]) -> list[list[str]]:
    """Return the tests of each function, the files taking turns.

    If the time is over before all of them ran, some of every file did.
    """
    functions: dict[str, dict[str, list[str]]] = {}
    for name in names:
        function = name.partition("[")[0]
        functions.setdefault(name.partition("::")[0], {}).setdefault(function, []).append(name)
    turns = zip_longest(*(of_file.values() for of_file in functions.values()))
    return [tests for turn in turns for tests in turn if tests]
