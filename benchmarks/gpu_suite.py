"""Everything that needs an NVIDIA GPU, in one command: tests, benchmarks, sanitizers, tuning.

    python -m benchmarks.gpu_suite [--budget-minutes 8] [--out runs/gpu_suite] [--only tests mips]

Needs a checkout, python3 with torch, triton, transformers and pytest, and no network. Every part
runs in processes of its own with a limit of time, the most important first, and what is known is
written at once; what did not fit the time is listed. Exit code: 0 if nothing failed and every test
ran, 1 if not, 2 for a bad argument or a machine that cannot run this, 143 when it was ended before
its time (130 by Ctrl-C), of which too the summary tells. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.gpu import plan, steps, summary
from benchmarks.gpu.isolation import NOT_RUN, end_on_signals
from benchmarks.gpu.plan import Step
from benchmarks.gpu.steps import Bench, Results
from benchmarks.harness.arguments import Parser, at_least_one, positive

DEFAULT_OUT = Path("runs/gpu_suite")
NEEDED = ("torch", "triton", "transformers", "pytest")
# Percentiles of fewer turns, where all has to fit some minutes.
FEW_ROUNDS, MANY_ROUNDS, MANY_FROM_MINUTES = 8, 20, 15
TESTS_SHARE = 0.5
# Of processes that compile, and share the memory of the GPU.
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
# torch.compile on its way says nothing for minutes.
PEERS = ("peers", Bench("marginal_loss", ("token",), LOSS_SHAPES[:1], patience=math.inf), 120)


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
    """The most important first."""
    from benchmarks.ops import OPS

    def timed(name: str, bench: Bench, estimate: float) -> Step:
        about = " ".join(bench.command(results.rounds, Path("..."))[2:])
        run = partial(steps.benchmark, results, bench)
        return Step(name, about, run, estimate, 2.0 * estimate)

    def checked(tool: str, estimate: float) -> Step:
        run = partial(steps.sanitizer, results, tool)
        return Step(tool, f"compute-sanitizer --tool {tool}", run, estimate, 3.0 * estimate)

    named = {bench.op for _, bench, _ in BENCHES}
    others = [(name, Bench(name), 90.0) for name in OPS if name not in named]
    return [
        Step("environment", "versions", partial(steps.environment, results), 15, 60),
        Step("build", "setup.py", partial(steps.build, results), 120, 600, background=True),
        Step(
            "tests",
            "pytest -m gpu, a process for each function",
            partial(steps.tests, results),
            min(180.0, TESTS_SHARE * budget),
            max(120.0, TESTS_SHARE * budget),
        ),
        *(timed(*bench) for bench in BENCHES if bench[1].op in OPS),
        *(timed(*bench) for bench in others),
        checked("memcheck", 90),
        checked("racecheck", 120),
        timed(*PEERS),
        Step("tune", "benchmarks.tune", partial(steps.tune, results), 240, 1200),
    ]


def missing() -> str:
    """What this machine lacks, "" if nothing."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"needs the package {name}"
    import torch

    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch sees no CUDA device"
    return ""


def _code(args: argparse.Namespace, done: Sequence[plan.Done]) -> int:
    results: Results = args.results
    records = [*results.tests, *(r for cases in results.sanitizer.values() for r in cases)]
    failed = any(record.bad for record in records) or bool(results.broken)
    failed |= any(step.how.startswith("failed") for step in done)
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
        print(plan.table(args.steps, budget))
        return 0
    reason = missing()
    if reason:
        print(f"benchmarks.gpu_suite: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)

    def changed(done: Sequence[plan.Done]) -> None:
        summary.write(args.results, done, complete=False)
        print(f"{done[-1].name}: {done[-1].how} ({done[-1].seconds:.0f} s)", flush=True)

    with end_on_signals() as came:
        done = plan.Run(time.monotonic() + budget, changed).all(args.steps)
        print(summary.short(summary.write(args.results, done, complete=True)), flush=True)
    return 128 + came() if came() else _code(args, done)


if __name__ == "__main__":
    sys.exit(main())
