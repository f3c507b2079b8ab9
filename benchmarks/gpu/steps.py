"""The steps of the suite: what each runs, and what it keeps."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.gpu import sanitizer as tool_output
from benchmarks.gpu import toolkit
from benchmarks.gpu.isolation import (
    BUDGET,
    FAILED,
    NOT_RUN,
    PASSED,
    Record,
    collect,
    run_isolated,
    run_limited,
    seconds_left,
)
from benchmarks.harness import rows as csv_rows
from benchmarks.harness.measure import ROOT

# A test may compile a dozen kernels before it says that it is done, and a benchmark prepares its
# providers one after another before it times the first. What hangs costs the time of its own step.
PATIENCE = 150.0
# Whatever else is installed there, tests run with pytest alone.
PYTEST_ENV = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm"
QUERY += ",clocks.max.mem,power.draw,power.limit,temperature.gpu,ecc.mode.current,compute_mode"


@dataclass(frozen=True)
class Bench:
    """One command of benchmarks.run, and how long it may be silent."""

    op: str
    mode: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    providers: str = ""
    patience: float = PATIENCE

    def command(self, rounds: int, path: Path) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.run", "--op", self.op, "--device", "cuda"]
        words += ["--rounds", str(rounds), "--csv", str(path)]
        for option, values in (("--mode", self.mode), ("--shape", self.shapes)):
            words += [option, *values] if values else []
        return [*words, *(["--providers", self.providers] if self.providers else [])]


@dataclass
class Results:
    """What is known so far; every step adds its results."""

    out: Path
    rounds: int
    jobs: int
    tests: list[Record] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    sanitizer: dict[str, list[Record]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # what else makes the suite fail
    lock: threading.Lock = field(default_factory=threading.Lock)


# ------------------------------------------------------------------------------ machine, extension


def environment(results: Results, deadline: float) -> str:
    commands = {
        "nvidia-smi": ["nvidia-smi"],
        "gpu": ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"],
        "nvcc": [toolkit.find("nvcc") or "nvcc", "--version"],
        "fastrag": [
            sys.executable,
            "-c",
            "import json; from fastrag.info import collect; print(json.dumps(collect()))",
        ],
    }
    found: dict[str, Any] = {}
    for name, command in commands.items():
        try:
            ended = run_limited(command, min(time.monotonic() + 60.0, deadline))
        except OSError as error:
            found[name] = str(error)
            continue
        found[name] = ended.output.strip().splitlines()
        if name == "fastrag" and ended.code == 0:
            found[name] = json.loads(found[name][-1])
    (results.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    gpu = found["gpu"]
    return f"ok: {gpu[-1]}" if isinstance(gpu, list) and gpu else f"ok, but: {gpu}"


def build(results: Results, deadline: float) -> str:
    """Build the extension for a CPU, unless it is as new as its sources.

    An older one may lack functions that the package calls. No step on the GPU waits for it.
    """
    ended = run_limited(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        deadline,
        env={"FASTRAG_BUILD_EXT": "1"},
    )
    return "ok" if ended.code == 0 else f"failed: {_last_line(ended.output)}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


# -------------------------------------------------------------------------------------------- tests


def test_files() -> list[str]:
    """Return the files with tests for a GPU: collecting others is slow and needs more packages."""
    marked = re.compile(r"\bmark\.gpu\b")
    found = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(p.relative_to(ROOT)) for p in found if marked.search(p.read_text()))


def pytest_command(names: Sequence[str], *more: str) -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.watch"]
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *plugins, *more, *names]


def tests(results: Results, deadline: float) -> str:
    """Run each function in processes of its own, some at a time: compilation takes most time."""
    # With little time left, a test that hangs is still recognised as one.
    patience = min(PATIENCE, 0.5 * seconds_left(deadline))
    limits: dict[str, Any] = {"patience": patience, "env": PYTEST_ENV}

    def look_into(file: str) -> list[str] | Record:
        found: list[str] | Record = collect(
            pytest_command([file], "--collect-only"), file, deadline, **limits
        )
        return found

    path = results.out / "tests.txt"  # in its final form when all is done
    path.unlink(missing_ok=True)

    def keep(record: Record) -> None:
        with results.lock, path.open("a", encoding="utf-8") as file:
            results.tests.append(record)
            file.write(f"{record.outcome} {record.name}\n{record.text}".rstrip() + "\n")

    def one(names: list[str]) -> list[Record]:
        return run_isolated(pytest_command, names[0], deadline, names=names, tell=keep, **limits)

    with ThreadPoolExecutor(results.jobs) as pool:
        found = list(pool.map(look_into, test_files()))
        lost = [record for record in found if isinstance(record, Record)]
        names = [name for part in found if isinstance(part, list) for name in part]
        done = list(pool.map(one, in_turn(names)))
    results.tests = lost + [record for records in done for record in records]
    return _count(results.tests)


def in_turn(names: Sequence[str]) -> list[list[str]]:
    """Return the tests of each function, the files taking turns.

    If the time is over before all of them ran, some of every file did.
    """
    files: dict[str, dict[str, list[str]]] = {}
    for name in names:
        function = name.partition("[")[0]
        files.setdefault(name.partition("::")[0], {}).setdefault(function, []).append(name)
    turns = zip_longest(*(functions.values() for functions in files.values()))
    return [tests for turn in turns for tests in turn if tests]


def _count(records: Sequence[Record]) -> str:
    kinds = (PASSED, FAILED, "skipped", NOT_RUN)
    counts = {kind: sum(record.outcome == kind for record in records) for kind in kinds}
    word = "failed" if counts[FAILED] else "not all ran" if counts[NOT_RUN] else "ok"
    return f"{word}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


# --------------------------------------------------------------------------------------- benchmarks


def benchmark(results: Results, bench: Bench, deadline: float) -> str:
    path = results.out / "benchmarks.part.csv"  # of this step; it outlives the process
    path.unlink(missing_ok=True)
    seconds = seconds_left(deadline)
    command = bench.command(results.rounds, path)
    if not bench.shapes:  # the most important first, and an end in time
        command += ["--budget-minutes", f"{seconds / 60:.2f}"]
    ended = run_limited(command, deadline, patience=bench.patience)
    rows = csv_rows.read(path) if path.exists() else []
    results.rows += rows
    if results.rows:
        columns = list(dict.fromkeys(name for row in results.rows for name in row))
        csv_rows.write(results.out / "benchmarks.csv", results.rows, columns)
    path.unlink(missing_ok=True)
    if ended.why == BUDGET:
        return f"cut off after {ended.seconds:.0f} s, {len(rows)} rows"
    if ended.why:
        results.broken.append(bench.op)
        return f"failed: {ended.why}, {len(rows)} rows, then: {_last_line(ended.output)}"
    if ended.code != 0:
        results.broken.append(bench.op)
        told = "; ".join(_bad(rows)[:3]) or _last_line(ended.output)
        return f"failed with code {ended.code}, {len(rows)} rows: {told}"
    return f"ok: {len(rows)} rows"


def _bad(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return what went wrong according to the rows."""
    fine = ("ok", "unavailable")
    return [
        f"{row['provider']} {row['mode']} {row['shape']} {status[:160]}"
        for row in rows
        if (status := row.get("status", "")) and not status.startswith(fine)
    ]


# ---------------------------------------------------------------------------------------- sanitizer


def sanitizer(results: Results, tool: str, deadline: float) -> str:
    """Run each kernel at a small shape, all in one process as long as it lives."""
    program = toolkit.find("compute-sanitizer")
    if program is None:
        return "not run: there is no compute-sanitizer"
    from benchmarks.gpu.cases import CASES

    log = results.out / f"sanitizer-{tool}.log"
    records = run_isolated(
        lambda names: tool_output.command(
            program, tool, [sys.executable, "-m", "benchmarks.gpu.cases", *names]
        ),
        tool,
        deadline,
        patience=PATIENCE,
        names=list(CASES),
        env=tool_output.ENV,
        log=log,
    )
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    results.sanitizer[tool] = tool_output.attribute(records, said)
    _write_sanitizer(results.out / "sanitizer.txt", results.sanitizer, said)
    more = tool_output.unexplained(results.sanitizer[tool], said)
    return "; ".join(filter(None, (_count(results.sanitizer[tool]), more)))


def _write_sanitizer(path: Path, by_tool: dict[str, list[Record]], said: str) -> None:
    lines = []
    for tool, records in by_tool.items():
        lines.append(f"{tool}: {_count(records)}")
        for record in records:
            lines.append(f"  {record.outcome:<8} {record.seconds:6.1f} s  {record.name}")
            lines += [f"      {line}" for line in record.text.splitlines() if record.bad]
    before = path.read_text() if path.exists() else ""
    kept = before.partition(_LOG)[2]
    path.write_text("\n".join(lines) + f"\n\n{_LOG}{kept}\n{said[-200_000:]}")


_LOG = "what the tool said\n"


# ------------------------------------------------------------------------------------------- tuning


def tune(results: Results, deadline: float) -> str:
    seconds = seconds_left(deadline)
    command = [sys.executable, "-m", "benchmarks.tune", "--out", str(results.out / "tuned.json")]
    ended = run_limited([*command, "--seconds", f"{0.9 * seconds:.0f}"], deadline)
    if ended.code != 0:
        (results.out / "tune.txt").write_text(ended.output)
        return f"failed: {_last_line(ended.output)}"
    return f"ok: {_last_line(ended.output)}"
