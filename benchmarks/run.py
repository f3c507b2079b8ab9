"""Times the providers of an operation against each other.

    python -m benchmarks.run --op marginal_loss [--providers cpp,hf] [--shape 2,5,32,512,50265]
    python -m benchmarks.run --op all --budget-minutes 9

Exit code: 0; 1 if one of ours is wrong, fails, or is slower than --base allows; 2 for a bad
argument; 130 when interrupted. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import report, shared
from benchmarks.harness.arguments import (
    DEFAULT_DTYPE,
    Parser,
    by_device,
    check_csv,
    check_mode,
    check_size,
    complete_device,
    names_of,
    shape_of,
)
from benchmarks.harness.commits import CommitError, Pair, checkout, compare
from benchmarks.harness.measure import facts, free_memory
from benchmarks.harness.plan import Budget, Point, by_importance, in_turn
from benchmarks.harness.registry import DTYPES, Op, Shape
from benchmarks.harness.turns import Case, Result, time_cases
from benchmarks.ops import OPS

DEFAULT_ROUNDS = {"cpu": 5, "cuda": 20}
# A process with torch in it, and the share of free memory that a bound may reach.
PROCESS_BYTES = 600 << 20
SAFE_SHARE = 0.8
MAX_REGRESSION = 1.10
ALL = "all"  # ops


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", required=True, help=f"one of {', '.join(OPS)}; or all")
    parser.add_argument("--providers", help="names with commas between them; default: all")
    parser.add_argument("--shape", nargs="+", help="such as 2,5,32,512,50265; default: the sweep")
    parser.add_argument(
        "--curve",
        nargs="+",
        metavar="DIM",
        help="shapes along a dimension, in the op's first mode unless --mode is given; or all",
    )
    parser.add_argument("--mode", "--marginal", nargs="+", help="default: all of the op's")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)}; {by_device(DEFAULT_DTYPE)}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--rounds", type=int, help=f"turns that count; {by_device(DEFAULT_ROUNDS)}")
    parser.add_argument(
        "--budget-minutes",
        type=float,
        metavar="M",
        help="the most important shapes first, and no more of them than fit; default: all",
    )
    parser.add_argument("--csv", type=Path, help="file to add the rows to")
    parser.add_argument("--base", metavar="GIT_REF", help="compare ours with another commit")
    parser.add_argument(
        "--max-regression",
        type=float,
        metavar="RATIO",
        help="with --base: exit code 1 if ours takes more than this times as long; "
        f"default: {MAX_REGRESSION:.2f}",
    )
    args = parser.parse_args(argv)
    if args.op not in (ALL, *OPS):
        parser.error(f"no op is called {args.op!r}; ops: {', '.join(OPS)}")
    complete_device(parser, args)
    if args.rounds is None:
        args.rounds = DEFAULT_ROUNDS[args.device]
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.budget_minutes is not None and not args.budget_minutes > 0:
        parser.error(f"--budget-minutes: expected more than 0, got {args.budget_minutes}")
    check_csv(parser, args.csv, report.COLUMNS)
    if args.max_regression is not None:
        if not args.base:
            parser.error("--max-regression: is for a comparison with --base")
        if not 0 < args.max_regression < math.inf:
            parser.error(f"--max-regression: expected more than 0, got {args.max_regression}")
    args.max_regression = args.max_regression or MAX_REGRESSION
    if args.base and (args.csv or args.budget_minutes):
        which = "--csv" if args.csv else "--budget-minutes"
        parser.error(f"{which}: not for a comparison with --base")
    if args.op == ALL:
        for name in ("providers", "shape", "curve", "mode", "base"):
            if getattr(args, name):
                parser.error(f"--{name}: is for one op, not for --op {ALL}")
        args.points = in_turn(OPS.values(), args.device)
    else:
        _choose(parser, args, OPS[args.op])
    return args


def _choose(parser: Parser, args: argparse.Namespace, op: Op) -> None:
    """Sets the points and the providers of one op."""
    if args.curve and args.shape:
        parser.error("--curve: has shapes of its own, --shape cannot be given with it")
    known = op.names("ours") if args.base else op.names()
    if args.providers is not None:
        which = "provider of ours" if args.base else "provider"
        args.providers = names_of(parser, args.providers, known, f"{op.name} has no {which}")
    if args.curve and not args.providers:
        args.providers = [name for name in op.curve_providers if name in known]
    modes = args.mode or list(op.modes[:1] if args.curve else op.modes)
    for mode in modes:
        check_mode(parser, op, mode)
    shapes = [shape_of(parser, op, text) for text in args.shape or ()]
    for shape in shapes:
        check_size(parser, args, op, modes[0], shape)
    shapes += _on_curves(parser, op, args.curve or ())
    args.points = [
        Point(op, mode, shape) for mode in modes for shape in shapes or op.sweep(args.device, mode)
    ]
    if args.budget_minutes and not shapes:
        args.points = [p for p in by_importance(op, args.device) if p.mode in modes]


def _on_curves(parser: Parser, op: Op, names: Sequence[str]) -> list[Shape]:
    for name in names:
        if name not in op.curves and (name != "all" or not op.curves):
            there = ", ".join(op.curves) or "none"
            parser.error(f"--curve: {op.name} has no curve {name!r}; curves: {there}")
    along = op.curves if "all" in names else dict.fromkeys(names)
    # Once each: curves may cross.
    return list(dict.fromkeys(shape for name in along for shape in op.curves[name]))


def _cases(args: argparse.Namespace, point: Point) -> list[Case]:
    """Of the providers asked for, or of all that know the mode."""
    op, mode, shape = point
    known = [p.name for p in op.providers if not p.modes or mode in p.modes]
    if args.base:
        known = [name for name in known if name in op.names("ours")]
    names = args.providers or known
    return [Case(op.name, name, mode, shape, args.dtype, args.device) for name in names]


def _time(cases: Sequence[Case], rounds: int, until: float = math.inf) -> list[Result]:
    """Results in the order of the cases; who cannot run here needs no process to say so."""
    reasons = {
        case: OPS[case.op].provider(case.provider).why_not(case.device, case.dtype, case.mode)
        for case in cases
    }
    able = [case for case in cases if not reasons[case]]
    together = _fit_together(able)
    if not together:
        _say("one process at a time, all do not fit into memory")
    patience = OPS[cases[0].op].patience
    timed = time_cases(able, rounds, together=together, patience=patience, until=until)
    done = {result.case: result for result in timed}
    return [done.get(case) or Result(case, f"unavailable: {reasons[case]}") for case in cases]


def _fit_together(cases: Sequence[Case]) -> bool:
    """Whether what all keep and the most that one call takes is surely less than what is free."""
    kept = peak = 0
    for case in cases:
        provider, device = OPS[case.op].provider(case.provider), torch.device(case.device)
        keeps, takes = provider.memory(case.mode, case.shape, device)
        kept, peak = kept + keeps, max(peak, takes)
    if not kept + peak:
        return True
    free = free_memory(torch.device(cases[0].device))
    return kept + peak + len(cases) * PROCESS_BYTES < SAFE_SHARE * free


def _begin(point: Point, device: str) -> None:
    op, mode, shape = point
    _say(f"timing {op.name} {mode} {report.shape_text(shape)}")
    shared.hold(op.share(mode, shape) if op.share is not None and device == "cpu" else {})


def _broken(op: Op, results: Iterable[Result]) -> bool:
    """Whether one of ours is wrong or failed; that a peer is stands in its row."""
    return any(
        not r.ok and not r.status.startswith("unavailable") and r.case.provider in op.names("ours")
        for r in results
    )


def _providers(args: argparse.Namespace) -> int:
    machine = facts(torch.device(args.device))
    n_ops = len({point.op.name for point in args.points})
    budget = Budget(60 * args.budget_minutes if args.budget_minutes else math.inf, n_ops)
    done: list[tuple[Op, list[Result]]] = []
    code = 0
    try:
        for point in args.points:
            op, cases = point.op, _cases(args, point)
            timed = budget.fits(op)
            if timed:
                _begin(point, args.device)
                with budget.spent_on(op) as until:
                    results = _time(cases, args.rounds, until)
                parts = (report.table(op, results, machine), report.foot(op, results))
                print("\n".join(filter(None, parts)) + "\n", flush=True)
            else:
                results = [Result(case, report.NO_BUDGET) for case in cases]
            done.append((op, results))
            if args.csv:  # at once: what is done is kept if a later point is interrupted
                rows = [report.row(op, result, machine) for result in results]
                report.add_to_csv(args.csv, rows)
            code = max(code, int(_broken(op, results)))
    except KeyboardInterrupt:
        code = 130
    if args.op == ALL or args.budget_minutes:
        print(report.overview(done, machine), flush=True)
    return code


def _commits(args: argparse.Namespace) -> int:
    code = 0
    with checkout(args.base) as tree:
        for point in args.points:
            op, mode, shape = point
            _begin(point, args.device)
            print(f"{op.name} {mode} {report.shape_text(shape)} {args.dtype}")
            cases = []
            for case in _cases(args, point):
                reason = op.provider(case.provider).why_not(case.device, case.dtype, mode)
                if reason:
                    print(f"  {case.provider}: unavailable: {reason}")
                else:
                    cases.append(case)
            for pair in compare(cases, tree, args.rounds):
                print(f"  {_verdict(pair, args.base, args.max_regression)}", flush=True)
                slower = pair.ratio is not None and pair.ratio > args.max_regression
                code = max(code, int(slower or _broken(op, [pair.now])))
    return code


def _verdict(pair: Pair, ref: str, allowed: float) -> str:
    name, ratio = pair.now.case.provider, pair.ratio
    if ratio is None:
        return f"{name}: {ref}: {pair.before.status}; now: {pair.now.status}"
    times = f"{report.median(pair.before):.4g} ms at {ref}, {report.median(pair.now):.4g} ms now"
    verdict = f"SLOWER, at most {allowed:.2f}" if ratio > allowed else f"at most {allowed:.2f}"
    return f"{name}: {times}, ratio {ratio:.3f}: {verdict}"


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    # The default action would leave the workers and the temporary checkout behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _commits(args) if args.base else _providers(args)
    except KeyboardInterrupt:
        return 130
    except CommitError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    finally:
        shared.hold({})


if __name__ == "__main__":
    sys.exit(main())
