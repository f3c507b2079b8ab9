"""Run everything that needs an NVIDIA GPU: tests, benchmarks, sanitizers, tuning.

    python -m benchmarks.gpu_suite [--budget-minutes 8] [--out runs/gpu_suite] [--only tests mips]

Needs a checkout, python3 with torch, triton, transformers and pytest, and no network. Every part
runs in processes of its own with a limit of time, the most important first; what is known is
written at once, and what did not fit the time is listed. Exit code: 0 if nothing failed and every
test ran, 1 if not, 2 for a bad argument or a machine that cannot run this, 143 when it was ended
early (130 by Ctrl-C), with a summary all the same. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.gpu import steps, summary
from benchmarks.gpu.isolation import NOT_RUN, end_on_signals, seconds_left, stopped
from benchmarks.gpu.steps import Bench, Results
from benchmarks.harness.arguments import Parser, at_least_one, positive
from benchmarks.harness.registry import needs
from benchmarks.ops import OPS

DEFAULT_OUT = Path("runs/gpu_suite")
NEEDED = ("torch", "triton", "transformers", "pytest")
# Fewer turns if everything has to fit some minutes.
FEW_ROUNDS, MANY_ROUNDS, MANY_FROM_MINUTES = 8, 20, 15
TESTS_SHARE = 0.5
LEAST_SHARE = 0.4  # a step that is not likely to be half done is not begun
# Tests at a time: each process compiles, and all share the memory of the GPU.
MOST_JOBS, CPUS_PER_JOB = 8, 2

LOSS_SHAPES = ("8,5,64,1024,50265", "4,8,256,2048,128256", "8,10,128,1024,50265")
SEARCHES = tuple(f"21000000,768,10,{n}" for n in (1, 1024, 64, 256))
NEAR = "gemms,triton,torch,gather"

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


Done = tuple[str, str, float]  # name, outcome, seconds


class Run:
    """Runs steps one after another until `deadline`, and reports each."""

    def __init__(self, deadline: float, changed: Callable[[Sequence[Done]], None]) -> None:
        self.deadline, self.changed = deadline, changed
        self.done: list[Done] = []
        self.lock = threading.Lock()

    def all(self, steps: Sequence[Step]) -> list[Done]:
        threads = [
            threading.Thread(target=self._one, args=(step,), daemon=True)
            for step in steps
            if step.background
        ]
        for thread in threads:
            thread.start()
        for step in steps:
            if not step.background:
                self._one(step)
        for thread in threads:
            thread.join()
        return self.done

    def _one(self, step: Step) -> None:
        began, left = time.monotonic(), seconds_left(self.deadline)
        if stopped.is_set():
            how = "not run: the suite was stopped"
        elif left < LEAST_SHARE * step.estimate:
            how = f"not run: budget ({left:.0f} s left, about {step.estimate:.0f} needed)"
        else:
            try:
                how = step.run(min(self.deadline, began + step.most))
            except Exception as error:  # the other steps are worth running all the same
                how = f"failed: {type(error).__name__}: {error}"
        with self.lock:
            self.done.append((step.name, how, time.monotonic() - began))
            self.changed(self.done)


def table(steps: Sequence[Step], budget: float) -> str:
    """Return the plan in lines: which step would begin when, if the estimates are right."""
    lines, at = [f"plan for {budget:.0f} s, most important first:"], 0.0
    for step in steps:
        fits = step.background or budget - at >= LEAST_SHARE * step.estimate
        when = "beside" if step.background else f"{at:5.0f} s" if fits else "budget"
        lines.append(
            f"  {when:>7}  {step.name:<24} about {step.estimate:4.0f} s, at most "
            f"{step.most:4.0f}  {step.about}"
        )
        if fits and not step.background:
            at += min(step.estimate, budget - at)
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("gpu_suite", __doc__)
    parser.add_argument("--budget-minutes", type=positive, default=8.0, help="default: 8")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="of those that --dry-run lists")
    parser.add_argument("--no-build", action="store_true", help="leave the C++ extension unbuilt")
    parser.add_argument("--rounds", type=at_least_one, help="turns of a provider that count")
    parser.add_argument("--jobs", type=at_least_one, help="tests at a time; default: by the CPUs")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    parser.add_argument(
        "--one-kernel", metavar="NAME", help="only run one case of benchmarks.gpu.cases"
    )
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {args.out}")
    args.rounds = args.rounds or (
        MANY_ROUNDS if args.budget_minutes >= MANY_FROM_MINUTES else FEW_ROUNDS
    )
    args.jobs = args.jobs or max(1, min(MOST_JOBS, (os.cpu_count() or 1) // CPUS_PER_JOB))
    results = Results(args.out, args.rounds, args.jobs)
    args.results, args.steps = results, all_steps(results, 60 * args.budget_minutes)
    if args.no_build:
        args.steps = [step for step in args.steps if step.name != "build"]
    names = [step.name for step in args.steps]
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only: no step is called {name!r}; steps: {', '.join(names)}")
    if args.only:  # and these may take all the time
        most = 60 * args.budget_minutes
        chosen = (step for step in args.steps if step.name in args.only)
        args.steps = [replace(step, most=most) for step in chosen]
    return args


def all_steps(results: Results, budget: float) -> list[Step]:
    """Return the steps, the most important first."""

    def timed(name: str, bench: Bench, estimate: float) -> Step:
        about = " ".join(bench.command(results.rounds, Path("..."))[2:])
        run = partial(steps.benchmark, results, bench)
        return Step(name, about, run, estimate, 2.0 * estimate)

    def checked(tool: str, estimate: float) -> Step:
        run = partial(steps.sanitizer, results, tool)
        return Step(tool, f"compute-sanitizer --tool {tool}", run, estimate, 3.0 * estimate)

    named = {bench.op for _, bench, _ in BENCHES}
    of_tests = min(180.0, TESTS_SHARE * budget), max(120.0, TESTS_SHARE * budget)
    about_tests = "pytest -m gpu, a process for each function"
    return [
        Step("environment", "versions", partial(steps.environment, results), 15, 60),
        Step("build", "setup.py", partial(steps.build, results), 120, 600, background=True),
        Step("tests", about_tests, partial(steps.run_tests, results), *of_tests),
        *(timed(*bench) for bench in BENCHES if bench[1].op in OPS),
        *(timed(name, Bench(name), 90.0) for name in OPS if name not in named),
        checked("memcheck", 90),
        checked("racecheck", 120),
        timed(*PEERS),
        Step("tune", "benchmarks.tune", partial(steps.tune, results), 240, 1200),
    ]


def missing() -> str:
    """Return what this machine lacks, "" if nothing."""
    import torch

    reason = needs(*NEEDED)()
    return reason or ("" if torch.cuda.is_available() else "torch sees no CUDA device")


def _code(args: argparse.Namespace, done: Sequence[Done]) -> int:
    results: Results = args.results
    records = [*results.tests, *(r for cases in results.sanitizer.values() for r in cases)]
    failed = any(record.bad for record in records) or bool(results.broken)
    failed |= any(how.startswith("failed") for _, how, _ in done)
    asked = any(step.name == "tests" for step in args.steps)
    unknown = not results.tests or any(r.outcome == NOT_RUN for r in results.tests)
    return int(failed or (asked and unknown))


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.one_kernel:
        from benchmarks.gpu import cases

        return cases.main([args.one_kernel])
    budget = 60 * args.budget_minutes
    if args.dry_run:
        print(table(args.steps, budget))
        return 0
    reason = missing()
    if reason:
        print(f"benchmarks.gpu_suite: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sanitizer.txt").unlink(missing_ok=True)

    def changed(done: Sequence[Done]) -> None:
        summary.write(args.results, done, complete=False)
        name, how, seconds = done[-1]
        print(f"{name}: {how} ({seconds:.0f} s)", flush=True)

    with end_on_signals() as came:
        done = Run(time.monotonic() + budget, changed).all(args.steps)
        print(summary.short(summary.write(args.results, done, complete=True)), flush=True)
    return 128 + came() if came() else _code(args, done)


if __name__ == "__main__":
    sys.exit(main())
