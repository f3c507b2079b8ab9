"""Run everything that needs an NVIDIA GPU: tests, benchmarks, sanitizers, tuning.

    python -m benchmarks.gpu_suite [--budget-minutes 8] [--out runs/gpu_suite] [--only tests mips]

Needs a checkout, python3 with torch, triton, transformers and pytest, and no network. Every part
runs in processes of its own with a limit of time, the most important first. Results are written at
once, and steps that did not fit the time are listed. Exit code: 0 if nothing failed and every test
ran, 1 if not, 2 for a bad argument or a machine that cannot run this, 143 when it was ended early
(130 by Ctrl-C), with a summary all the same. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import cases, summary, tests
from benchmarks.gpu.isolation import (
    BUDGET,
    NOT_RUN,
    PASSED,
    Record,
    end_on_signals,
    run_isolated,
    run_limited,
    seconds_left,
    stopped,
)
from benchmarks.harness import results
from benchmarks.harness.arguments import Parser, at_least_one, folder, positive
from benchmarks.harness.registry import needs
from benchmarks.harness.results import Row
from benchmarks.ops import OPS
from benchmarks.profiling import ncu

DEFAULT_OUT = Path("runs/gpu_suite")
NEEDED = ("torch", "triton", "transformers", "pytest")
# Fewer turns if everything has to fit some minutes.
FEW_ROUNDS, MANY_ROUNDS, MANY_FROM_MINUTES = 8, 20, 15
TESTS_SHARE = 0.5
LEAST_SHARE = 0.4  # a step that is not likely to be half done is not begun
# Tests at a time: each process compiles, and all share the memory of the GPU.
MOST_JOBS, CPUS_PER_JOB = 8, 2
# A test may compile a dozen kernels, and a benchmark prepares its providers one after another
# before it times the first. A process that hangs costs the time of its own step.
PATIENCE = 150.0
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm"
QUERY += ",clocks.max.mem,power.draw,power.limit,temperature.gpu,ecc.mode.current,compute_mode"
COLLECT = "import json; from fastrag.info import collect; print(json.dumps(collect()))"

LOSS_SHAPES = ("8,5,64,1024,50265", "4,8,256,2048,128256", "8,10,128,1024,50265")
SEARCHES = tuple(f"21000000,768,10,{n}" for n in (1, 1024, 64, 256))
NEAR = "gemms,triton,torch,gather"


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


# name of the step, what it runs, and the seconds it may take
BENCHES: tuple[tuple[str, Bench, float], ...] = (
    ("marginal_loss", Bench("marginal_loss", ("token",), LOSS_SHAPES, NEAR), 120),
    ("mips", Bench("mips", ("bfloat16",), SEARCHES, "read,triton,mm-tiled"), 150),
    ("doc_scores", Bench("doc_scores", providers="copy,triton,torch,bmm"), 70),
    ("token_logp", Bench("token_logp", (), LOSS_SHAPES[:1], NEAR), 60),
    ("rag_step", Bench("rag_step"), 90),
    ("sequence", Bench("marginal_loss", ("sequence",), LOSS_SHAPES, NEAR), 120),
)
# torch.compile is silent for minutes.
PEERS = ("peers", Bench("marginal_loss", ("token",), LOSS_SHAPES[:1], patience=math.inf), 120)


@dataclass(frozen=True)
class Step:
    """One part of the suite.

    `run(deadline)` returns the outcome in a line; the deadline is by time.monotonic(). `estimate`
    and `most` are seconds. A step in the background takes no time from the others, and is waited
    for at the end.
    """

    name: str
    about: str
    run: Callable[[float], str]
    estimate: float
    most: float
    background: bool = False


@dataclass
class Suite:
    """The steps, and the results of those that have run."""

    out: Path
    rounds: int
    jobs: int
    done: list[summary.Done] = field(default_factory=list)
    tests: list[Record] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sanitizer: dict[str, list[Record]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # benchmarks that failed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def steps(self, budget: float) -> list[Step]:
        """Return the steps, the most important first."""

        def timed(name: str, bench: Bench, estimate: float) -> Step:
            about = " ".join(bench.command(self.rounds, Path("..."))[2:])
            return Step(name, about, partial(self.benchmark, bench), estimate, 2.0 * estimate)

        def checked(tool: str, estimate: float) -> Step:
            about, run = f"compute-sanitizer --tool {tool}", partial(self.sanitize, tool)
            return Step(tool, about, run, estimate, 3.0 * estimate)

        named = {bench.op for _, bench, _ in BENCHES}
        of_tests = min(180.0, TESTS_SHARE * budget), max(120.0, TESTS_SHARE * budget)
        return [
            Step("environment", "versions", self.environment, 15, 60),
            Step("build", "setup.py", self.build, 120, 600, background=True),
            Step("tests", "pytest -m gpu, a process for each function", self.run_tests, *of_tests),
            *(timed(*bench) for bench in BENCHES),
            *(timed(name, Bench(name), 90.0) for name in OPS if name not in named),
            checked("memcheck", 90),
            checked("racecheck", 120),
            timed(*PEERS),
            Step("tune", "benchmarks.tune", self.tune, 240, 1200),
        ]

    def run(self, steps: Sequence[Step], deadline: float) -> None:
        """Run steps one after another, and those in the background at the same time."""
        with ThreadPoolExecutor() as pool:
            for step in steps:
                if step.background:
                    pool.submit(self._one, step, deadline)
            for step in steps:
                if not step.background:
                    self._one(step, deadline)

    def _one(self, step: Step, deadline: float) -> None:
        began, left = time.monotonic(), seconds_left(deadline)
        if stopped.is_set():
            how = "not run: the suite was stopped"
        elif left < LEAST_SHARE * step.estimate:
            how = f"not run: budget ({left:.0f} s left, about {step.estimate:.0f} needed)"
        else:
            try:
                how = step.run(min(deadline, began + step.most))
            except Exception as error:  # the other steps are worth running all the same
                how = f"failed: {type(error).__name__}: {error}"
        with self.lock:
            self.done.append((step.name, how, time.monotonic() - began))
            summary.write(self, complete=False)
            print(summary.line(self.done[-1]), flush=True)

    def code(self, tests_asked: bool) -> int:
        records = [*self.tests, *(r for cases in self.sanitizer.values() for r in cases)]
        failed = any(record.bad for record in records) or bool(self.broken)
        failed |= any(how.startswith("failed") for _, how, _ in self.done)
        unknown = not self.tests or any(r.outcome == NOT_RUN for r in self.tests)
        return int(failed or (tests_asked and unknown))

    # ----------------------------------------------------------------------------------- steps

    def environment(self, deadline: float) -> str:
        commands = {
            "nvidia-smi": ["nvidia-smi"],
            "gpu": ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"],
            "nvcc": [ncu.find("nvcc") or "nvcc", "--version"],
            "fastrag": [sys.executable, "-c", COLLECT],
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
        (self.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
        gpu = found["gpu"]
        return f"ok: {gpu[-1]}" if isinstance(gpu, list) and gpu else f"ok, but: {gpu}"

    def build(self, deadline: float) -> str:
        """Build the extension for a CPU, unless it is as new as its sources.

        An older one may lack functions that the package calls. No step on the GPU waits for it.
        """
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        ended = run_limited(command, deadline, {"FASTRAG_BUILD_EXT": "1"})
        return "ok" if ended.code == 0 else f"failed: {ended.last_line}"

    def run_tests(self, deadline: float) -> str:
        """Run each function in processes of its own, some at a time: most time is compilation."""
        # With little time left, a test that hangs is still recognised as one.
        patience = min(PATIENCE, 0.5 * seconds_left(deadline))
        limits: dict[str, Any] = {"patience": patience, "env": tests.ENV}

        def keep(record: Record) -> None:
            with self.lock:
                self.tests.append(record)
                summary.write_tests(self.out, self.tests)

        def one(names: Sequence[str]) -> None:
            run_isolated(tests.run, names, deadline, tell=keep, **limits)

        names: list[str] = []
        for record in run_isolated(tests.collect, tests.files(), deadline, **limits):
            if record.outcome == PASSED:
                names += json.loads(record.text)
            else:
                keep(record)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, tests.by_function(names)))
        return summary.count(self.tests)

    def benchmark(self, bench: Bench, deadline: float) -> str:
        path, n_before = self.out / "benchmarks.csv", len(self.rows)
        command = bench.command(self.rounds, path)
        if not bench.shapes:  # the most important first, and an end in time
            command += ["--budget-minutes", f"{seconds_left(deadline) / 60:.2f}"]
        ended = run_limited(command, deadline, patience=bench.patience)
        self.rows = results.read(path) if path.exists() else []
        found = self.rows[n_before:]
        if ended.why == BUDGET:
            return f"cut off after {ended.seconds:.0f} s, {len(found)} rows"
        if ended.code == 0:
            return f"ok: {len(found)} rows"
        self.broken.append(bench.op)
        if ended.why:
            return f"failed: {ended.why}, {len(found)} rows, then: {ended.last_line}"
        bad = [
            f"{row['provider']} {row['mode']} {row['shape']} {row['status'][:160]}"
            for row in found
            if not row["status"].startswith(("ok", "unavailable"))
        ]
        text = "; ".join(bad[:3]) or ended.last_line
        return f"failed with code {ended.code}, {len(found)} rows: {text}"

    def sanitize(self, tool: str, deadline: float) -> str:
        """Run each kernel at a small shape, all in one process as long as it lives."""
        program = ncu.find("compute-sanitizer")
        if program is None:
            return "not run: there is no compute-sanitizer"
        outputs: list[str] = []
        records = run_isolated(
            cases.run,
            list(cases.CASES),
            deadline,
            patience=PATIENCE,
            env=cases.ENV,
            wrapper=cases.wrapper(program, tool),
            hear=outputs.append,
        )
        output = "\n".join(outputs)
        found = self.sanitizer[tool] = [cases.with_reports(record, output) for record in records]
        with (self.out / "sanitizer.txt").open("a", encoding="utf-8") as file:
            file.write(f"{tool}\n{summary.tests_text(found)}\noutput\n{output[-200_000:]}\n\n")
        return "; ".join(filter(None, (summary.count(found), cases.unexplained(found, output))))

    def tune(self, deadline: float) -> str:
        seconds = 0.9 * seconds_left(deadline)
        command = [sys.executable, "-m", "benchmarks.tune", "--out", str(self.out / "tuned.json")]
        ended = run_limited([*command, "--seconds", f"{seconds:.0f}"], deadline)
        if ended.code != 0:
            (self.out / "tune.txt").write_text(ended.output)
        return f"{'failed' if ended.code else 'ok'}: {ended.last_line}"


def table(steps: Sequence[Step], budget: float) -> str:
    """Return the plan in lines: which step would begin when, if the estimates are right."""
    lines, at = [f"plan for {budget:.0f} s, most important first:"], 0.0
    for step in steps:
        fits = step.background or budget - at >= LEAST_SHARE * step.estimate
        when = "alongside" if step.background else f"{at:5.0f} s" if fits else "budget"
        lines.append(
            f"  {when:>9}  {step.name:<24} about {step.estimate:4.0f} s, at most "
            f"{step.most:4.0f}  {step.about}"
        )
        if fits and not step.background:
            at += min(step.estimate, budget - at)
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("gpu_suite", __doc__)
    parser.add_argument("--budget-minutes", type=positive, default=8.0, help="default: 8")
    parser.add_argument("--out", type=folder, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="of those that --dry-run lists")
    parser.add_argument("--no-build", action="store_true", help="leave the C++ extension unbuilt")
    parser.add_argument("--rounds", type=at_least_one, help="turns of a provider that count")
    parser.add_argument("--jobs", type=at_least_one, help="tests at a time; default: by the CPUs")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    help_of_kernel = "only run one case of benchmarks.gpu.cases"
    parser.add_argument("--one-kernel", metavar="NAME", help=help_of_kernel)
    args = parser.parse_args(argv)
    args.budget = 60 * args.budget_minutes
    many = args.budget_minutes >= MANY_FROM_MINUTES
    rounds = args.rounds or (MANY_ROUNDS if many else FEW_ROUNDS)
    jobs = args.jobs or max(1, min(MOST_JOBS, (os.cpu_count() or 1) // CPUS_PER_JOB))
    args.suite = Suite(args.out, rounds, jobs)
    steps = args.suite.steps(args.budget)
    args.steps = [step for step in steps if not (args.no_build and step.name == "build")]
    names = [step.name for step in args.steps]
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only: no step is called {name!r}; steps: {', '.join(names)}")
    if args.only:  # and these may take all the time
        chosen = (step for step in args.steps if step.name in args.only)
        args.steps = [replace(step, most=args.budget) for step in chosen]
    return args


def missing() -> str:
    """Return what this machine lacks, "" if nothing."""
    import torch

    reason = needs(*NEEDED)()
    return reason or ("" if torch.cuda.is_available() else "torch sees no CUDA device")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    suite: Suite = args.suite
    if args.one_kernel:
        return cases.main(args.one_kernel)
    if args.dry_run:
        print(table(args.steps, args.budget))
        return 0
    if reason := missing():
        print(f"benchmarks.gpu_suite: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("sanitizer.txt", "benchmarks.csv"):
        (args.out / name).unlink(missing_ok=True)
    with end_on_signals() as came:
        suite.run(args.steps, time.monotonic() + args.budget)
        with suite.lock:
            print(summary.write(suite, complete=True), flush=True)
    return 128 + came() if came() else suite.code(any(s.name == "tests" for s in args.steps))


if __name__ == "__main__":
    sys.exit(main())
