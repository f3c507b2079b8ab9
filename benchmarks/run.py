"""Time the providers of an operation against each other.

    python -m benchmarks.run --op marginal_loss [--providers cpp,hf] [--shape 2,5,32,512,50265]
    python -m benchmarks.run --op all --budget-minutes 9

Exit code: 0; 1 if one of ours is wrong, fails, or is slower than --base allows; 2 for a bad
argument; 130 when interrupted. docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.harness import results, shared
from benchmarks.harness.arguments import Parser, one_of, positive
from benchmarks.harness.commits import CommitError, Pair, checkout, compare
from benchmarks.harness.measure import facts, free_memory
from benchmarks.harness.registry import (
    DTYPES,
    Op,
    Point,
    Shape,
    by_importance,
    in_turn,
    shape_text,
)
from benchmarks.harness.results import Group, groups_of, measured
from benchmarks.harness.timing import Case, Result, time_cases
from benchmarks.ops import OPS, corpora

# The memory of a process with torch, and the share of free memory that a bound may reach.
PROCESS_BYTES = 600 << 20
SAFE_SHARE = 0.8
MAX_REGRESSION = 1.10
# Assumed least cost of a point of an op before any was timed.
FIRST_SECONDS = 60.0
ALL = "all"  # ops


class Budget:
    """Seconds for a whole run over `n_ops`.

    A point is started if the longest one of its op would still fit, or the longest of any op if its
    own has none; it may then take its op's share of the time left. On a busy machine all ops have
    fewer turns then, and the first one does not have them all.
    """

    def __init__(
        self, seconds: float, n_ops: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self.n_ops = clock, n_ops
        self.until = clock() + seconds
        self.longest: dict[str, float] = {}

    def fits(self, op: Op) -> bool:
        of_any = max([FIRST_SECONDS, *self.longest.values()])
        return self.clock() + self.longest.get(op.name, of_any) <= self.until

    @contextmanager
    def spent_on(self, op: Op) -> Iterator[float]:
        """Yield the time after which turns should end."""
        start = self.clock()
        yield start + (self.until - start) / self.n_ops
        self.longest[op.name] = max(self.longest.get(op.name, 0.0), self.clock() - start)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("run", __doc__)
    parser.add_argument("--op", required=True, type=one_of([*OPS, ALL]), help=", ".join(OPS))
    parser.add_argument("--providers", help="names separated by commas; default: all")
    help_of_curve = (
        "shapes along a dimension, in the op's first mode unless --mode is given; or all"
    )
    parser.add_argument("--curve", nargs="+", metavar="DIM", help=help_of_curve)
    parser.add_problem(several=True)
    parser.add_rounds()
    parser.add_csv()
    parser.add_argument("--corpus", help="of the op's corpora of inputs; default: all")
    help_of_vectors = "a corpus of your own: float32 [N, D]"
    parser.add_argument("--vectors", type=Path, metavar="FILE.npy", help=help_of_vectors)
    help_of_budget = "the most important shapes first, and only as many as fit; default: all"
    parser.add_argument("--budget-minutes", type=positive, metavar="M", help=help_of_budget)
    parser.add_argument("--base", metavar="GIT_REF", help="compare ours with another commit")
    help_of_ratio = "with --base: exit code 1 if ours takes more than this times as long"
    help_of_ratio += f"; default: {MAX_REGRESSION:.2f}"
    parser.add_argument("--max-regression", type=positive, metavar="RATIO", help=help_of_ratio)
    args = parser.parse_args(argv)
    parser.complete(args)
    if args.max_regression and not args.base:
        parser.error("--max-regression: is for a comparison with --base")
    args.max_regression = args.max_regression or MAX_REGRESSION
    for name, given in (("csv", args.csv), ("budget-minutes", args.budget_minutes)):
        if args.base and given:
            parser.error(f"--{name}: not for a comparison with --base")
    if args.op == ALL:
        for name in ("providers", "shape", "curve", "mode", "base", "corpus", "vectors"):
            if getattr(args, name):
                parser.error(f"--{name}: is for one op, not for --op {ALL}")
        args.points = in_turn(OPS.values(), args.device)
    else:
        _choose(parser, args, OPS[args.op])
    return args


def _choose(parser: Parser, args: argparse.Namespace, op: Op) -> None:
    """Set the points and the providers of one op."""
    if args.curve and args.shape:
        parser.error("--curve: has shapes of its own, --shape cannot be given with it")
    known = op.names("ours") if args.base else op.names()
    if args.providers is not None:
        which = "provider of ours" if args.base else "provider"
        args.providers = parser.names(args.providers, known, f"{op.name} has no {which}")
    elif args.curve:
        args.providers = [name for name in op.curve_providers if name in known]
    modes = args.mode or list(op.modes[:1] if args.curve else op.modes)
    shapes = [parser.shape(op, text) for text in args.shape or ()]
    if args.corpus or args.vectors:
        modes, shapes = _on_corpus(parser, args, op, shapes)
    else:
        for mode in modes:
            parser.check_mode(op, mode)
    for shape in shapes:
        parser.check_size(args, op, modes[0], shape)
    for name in args.curve or ():
        if name not in op.curves and (name != ALL or not op.curves):
            there = ", ".join(op.curves) or "none"
            parser.error(f"--curve: {op.name} has no curve {name!r}; curves: {there}")
        for dim in op.curves if name == ALL else [name]:
            shapes += op.curves[dim]
    if args.budget_minutes and not shapes:
        args.points = [p for p in by_importance(op, args.device) if p.mode in modes]
        return
    shapes = list(dict.fromkeys(shapes))  # curves may cross
    args.points = [
        Point(op, mode, shape) for mode in modes for shape in shapes or op.sweep(args.device, mode)
    ]


def _on_corpus(
    parser: Parser, args: argparse.Namespace, op: Op, shapes: list[Shape]
) -> tuple[list[str], list[Shape]]:
    """Return modes that name the corpus, and shapes that fit a file of vectors."""
    option = "--vectors" if args.vectors else "--corpus"
    if not op.corpora:
        parser.error(f"{option}: {op.name} has one corpus only")
    if args.vectors and (args.corpus or args.curve):
        parser.error("--vectors: is a corpus of its own, without --corpus and --curve")
    known = {mode: corpora.split(mode) for mode in op.modes}
    if args.corpus:
        if args.corpus not in op.corpora:
            there = ", ".join(op.corpora)
            parser.error(f"--corpus: {op.name} has no corpus {args.corpus!r}; corpora: {there}")
        there = [base for base, corpus in known.values() if corpus == args.corpus]
        modes = [corpora.join(mode, args.corpus) for mode in args.mode or there]
        for mode in modes:
            parser.check_mode(op, mode)
        return modes, shapes
    try:
        n_rows, width = corpora.use(args.vectors)
    except ValueError as error:
        parser.error(f"--vectors: {error}")
    for shape in shapes:
        sizes = dict(zip(op.dims, shape, strict=True))
        if sizes["N"] > n_rows or sizes["D"] != width:
            found = shape_text(shape)
            parser.error(f"--shape: expected N up to {n_rows} and D = {width}, got {found}")
    bases = [base for base, corpus in known.values() if corpus != op.corpora[0]]
    for mode in args.mode or ():
        parser.check_mode(op, mode)
    modes = [corpora.join(mode, args.vectors.stem) for mode in args.mode or bases]
    return modes, shapes or [(n_rows, width, *rest) for rest in op.on_vectors]


def _cases(args: argparse.Namespace, point: Point) -> list[Case]:
    """Return the cases of the providers asked for, or of all that know the mode."""
    op, mode, shape = point
    known = [p.name for p in op.providers if p.knows(mode)]
    if args.base:
        known = [name for name in known if name in op.names("ours")]
    names = args.providers or known
    return [Case(op.name, name, mode, shape, args.dtype, args.device) for name in names]


def _time(cases: Sequence[Case], rounds: int, until: float = math.inf) -> list[Result]:
    together = _fit_together([case for case in cases if not case.why_not()])
    if not together:
        _say("one process at a time, all do not fit into memory")
    patience = OPS[cases[0].op].patience
    return time_cases(cases, rounds, together=together, patience=patience, until=until)


def _fit_together(cases: Sequence[Case]) -> bool:
    """Return whether what all keep and the most that one call takes surely fits into memory."""
    kept = peak = 0
    for case in cases:
        keeps, takes = case.entry[1].memory(case.mode, case.shape, torch.device(case.device))
        kept, peak = kept + keeps, max(peak, takes)
    if not kept + peak:
        return True
    free = free_memory(torch.device(cases[0].device))
    return kept + peak + len(cases) * PROCESS_BYTES < SAFE_SHARE * free


def _begin(point: Point, device: str) -> None:
    op, mode, shape = point
    _say(f"timing {op.name} {mode} {shape_text(shape)}")
    shared.hold(op.share(mode, shape) if op.share is not None and device == "cpu" else {})


def _kind(args: argparse.Namespace) -> tuple[torch.dtype, torch.device]:
    return DTYPES[args.dtype], torch.device(args.device)


def _broken(op: Op, results: Iterable[Result]) -> bool:
    """Return whether one of ours is wrong or failed; peers that are have a row that says so."""
    return any(
        not r.ok and not r.status.startswith("unavailable") and r.case.provider in op.names("ours")
        for r in results
    )


def _providers(args: argparse.Namespace) -> int:
    machine = facts(torch.device(args.device))
    n_ops = len({point.op.name for point in args.points})
    budget = Budget(60 * args.budget_minutes if args.budget_minutes else math.inf, n_ops)
    done: list[Group] = []
    code = 0
    try:
        for point in args.points:
            op, cases = point.op, _cases(args, point)
            found = [Result(case, results.NO_BUDGET) for case in cases]
            fits = budget.fits(op)
            if fits:
                _begin(point, args.device)
                with budget.spent_on(op) as until:
                    found = _time(cases, args.rounds, until)
            (group,) = groups_of(measured(result, machine) for result in found)
            done.append(group)
            if fits:
                note = "" if op.note is None else op.note(*point[1:], *_kind(args))
                parts = results.table(group), results.goals(group), note
                print("\n".join(filter(None, parts)) + "\n", flush=True)
            if args.csv:  # at once: finished points are kept if a later one is interrupted
                results.add(args.csv, group.rows)
            code = max(code, int(_broken(op, found)))
    except KeyboardInterrupt:
        code = 130
    if done and (args.op == ALL or args.budget_minutes):
        print(results.overview(done), flush=True)
    return code


def _commits(args: argparse.Namespace) -> int:
    code = 0
    with checkout(args.base) as tree:
        for point in args.points:
            op, mode, shape = point
            _begin(point, args.device)
            print(f"{op.name} {mode} {shape_text(shape)} {args.dtype}")
            for pair in compare(_cases(args, point), tree, args.rounds):
                print(f"  {_verdict(pair, args.base, args.max_regression)}", flush=True)
                slower = pair.ratio is not None and pair.ratio > args.max_regression
                code = max(code, int(slower or _broken(op, [pair.now])))
    return code


def _verdict(pair: Pair, ref: str, allowed: float) -> str:
    name, ratio = pair.now.case.provider, pair.ratio
    if pair.now.status.startswith("unavailable"):
        return f"{name}: {pair.now.status}"
    if ratio is None:
        return f"{name}: {ref}: {pair.before.status}; now: {pair.now.status}"
    turns = pair.before.turns, pair.now.turns
    before, now = (statistics.median(turn.wall for turn in of_one) for of_one in turns)
    verdict = f"SLOWER, at most {allowed:.2f}" if ratio > allowed else f"at most {allowed:.2f}"
    return f"{name}: {before:.4g} ms at {ref}, {now:.4g} ms now, ratio {ratio:.3f}: {verdict}"


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    # The default action would leave the children and the temporary checkout behind.
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
