"""The steps of the suite: what each runs, and what it keeps."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import sanitizer as tool_output
from benchmarks.gpu import summary, tests
from benchmarks.gpu.isolation import (
    BUDGET,
    PASSED,
    Record,
    run_isolated,
    run_limited,
    seconds_left,
)
from benchmarks.harness import rows
from benchmarks.harness.rows import Row
from benchmarks.profiling import toolkit

# A test may compile a dozen kernels, and a benchmark prepares its providers one after another
# before it times the first. What hangs costs the time of its own step.
PATIENCE = 150.0
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
    """Results of the steps that have run; each step adds its own."""

    out: Path
    rounds: int
    jobs: int
    tests: list[Record] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sanitizer: dict[str, list[Record]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # what else makes the suite fail
    lock: threading.Lock = field(default_factory=threading.Lock)


def environment(results: Results, deadline: float) -> str:
    collect = "import json; from fastrag.info import collect; print(json.dumps(collect()))"
    commands = {
        "nvidia-smi": ["nvidia-smi"],
        "gpu": ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"],
        "nvcc": [toolkit.find("nvcc") or "nvcc", "--version"],
        "fastrag": [sys.executable, "-c", collect],
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
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ended = run_limited(command, deadline, {"FASTRAG_BUILD_EXT": "1"})
    return "ok" if ended.code == 0 else f"failed: {_last_line(ended.output)}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def run_tests(results: Results, deadline: float) -> str:
    """Run each function in processes of its own, some at a time: compilation takes most time."""
    # With little time left, a test that hangs is still recognised as one.
    patience = min(PATIENCE, 0.5 * seconds_left(deadline))

    def keep(record: Record) -> None:
        with results.lock:
            results.tests.append(record)
            summary.write_tests(results.out, results.tests)

    def one(names: Sequence[str]) -> None:
        run_isolated(tests.run, names, deadline, patience=patience, env=tests.ENV, tell=keep)

    files = run_isolated(tests.collect, tests.files(), deadline, patience=patience, env=tests.ENV)
    names: list[str] = []
    for record in files:
        if record.outcome == PASSED:
            names += json.loads(record.text)
        else:
            keep(record)
    with ThreadPoolExecutor(results.jobs) as pool:
        list(pool.map(one, tests.by_function(names)))
    return summary.count(results.tests)


def benchmark(results: Results, bench: Bench, deadline: float) -> str:
    path = results.out / "benchmarks.part.csv"  # of this step; it outlives the process
    path.unlink(missing_ok=True)
    command = bench.command(results.rounds, path)
    if not bench.shapes:  # the most important first, and an end in time
        command += ["--budget-minutes", f"{seconds_left(deadline) / 60:.2f}"]
    ended = run_limited(command, deadline, patience=bench.patience)
    found = rows.read(path) if path.exists() else []
    results.rows += found
    if results.rows:
        columns = list(dict.fromkeys(name for row in results.rows for name in row))
        rows.write(results.out / "benchmarks.csv", results.rows, columns)
    path.unlink(missing_ok=True)
    if ended.why == BUDGET:
        return f"cut off after {ended.seconds:.0f} s, {len(found)} rows"
    if ended.why:
        results.broken.append(bench.op)
        return f"failed: {ended.why}, {len(found)} rows, then: {_last_line(ended.output)}"
    if ended.code != 0:
        results.broken.append(bench.op)
        bad = [
            f"{row['provider']} {row['mode']} {row['shape']} {status[:160]}"
            for row in found
            if (status := row.get("status", "")) and not status.startswith(("ok", "unavailable"))
        ]
        told = "; ".join(bad[:3]) or _last_line(ended.output)
        return f"failed with code {ended.code}, {len(found)} rows: {told}"
    return f"ok: {len(found)} rows"


def sanitizer(results: Results, tool: str, deadline: float) -> str:
    """Run each kernel at a small shape, all in one process as long as it lives."""
    program = toolkit.find("compute-sanitizer")
    if program is None:
        return "not run: there is no compute-sanitizer"
    from benchmarks.gpu import cases

    outputs: list[str] = []
    records = run_isolated(
        cases.run,
        list(cases.CASES),
        deadline,
        patience=PATIENCE,
        env={**tool_output.ENV, **cases.ENV},
        wrapper=tool_output.wrapper(program, tool),
        hear=outputs.append,
    )
    said = "\n".join(outputs)
    results.sanitizer[tool] = tool_output.attribute(records, said)
    with (results.out / "sanitizer.txt").open("a", encoding="utf-8") as file:
        file.write(f"{tool}\n{summary.tests_text(results.sanitizer[tool])}\n")
        file.write(f"what it said\n{said[-200_000:]}\n\n")
    more = tool_output.unexplained(results.sanitizer[tool], said)
    return "; ".join(filter(None, (summary.count(results.sanitizer[tool]), more)))


def tune(results: Results, deadline: float) -> str:
    seconds = 0.9 * seconds_left(deadline)
    command = [sys.executable, "-m", "benchmarks.tune", "--out", str(results.out / "tuned.json")]
    ended = run_limited([*command, "--seconds", f"{seconds:.0f}"], deadline)
    if ended.code != 0:
        (results.out / "tune.txt").write_text(ended.output)
    return f"{'failed' if ended.code else 'ok'}: {_last_line(ended.output)}"
