"""Timings at one point: the comparison, a table to read, and rows of CSV."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.harness.registry import DTYPES, Goal, Op, Shape
from benchmarks.harness.rows import MIB, Row, row_of, shape_text
from benchmarks.harness.timing import Case, Result

NO_BUDGET = "unavailable: not timed, the budget was spent"
WORKSPACE_ALLOWANCE = 16 * MIB


@dataclass(frozen=True)
class Timing:
    """Milliseconds and memory of a call of one provider."""

    provider: str
    ms: float
    mib: float | None = None
    spread: tuple[float, float] | None = None  # p20 and p80, milliseconds
    processor: float = 0.0  # milliseconds of processor time, where they are known


@dataclass(frozen=True)
class Comparison:
    """The providers of an op that were timed at one point."""

    op: Op
    mode: str
    dtype: str
    shape: Shape

    @property
    def timings(self) -> list[Timing]:
        raise NotImplementedError

    @cached_property
    def own(self) -> Timing | None:
        """The first of ours: what a user gets here."""
        return next(iter(self.of("ours")), None)

    @cached_property
    def best_peer(self) -> Timing | None:
        return min(self.of("peer"), key=lambda t: t.ms, default=None)

    @cached_property
    def tightest_ceiling(self) -> Timing | None:
        return max(self.of("ceiling"), key=lambda t: t.ms, default=None)

    def of(self, kind: str) -> list[Timing]:
        """Return the timings of one kind of provider, in the order of the registry."""
        by_name = {t.provider: t for t in self.timings}
        return [by_name[name] for name in self.op.names(kind) if name in by_name]

    def times_as_fast(self, other: Timing | None) -> float | None:
        """Return how many times as long as ours the other one takes."""
        return other.ms / self.own.ms if self.own and other else None


@dataclass(frozen=True)
class Measured(Comparison):
    """The results of one point of this run."""

    results: tuple[Result, ...]

    @cached_property
    def timings(self) -> list[Timing]:
        return [timing_of(result) for result in self.results if result.ok]

    @property
    def case(self) -> Case:
        return self.results[0].case


def measured(op: Op, results: Sequence[Result]) -> Measured:
    case = results[0].case
    return Measured(op, case.mode, case.dtype, case.shape, tuple(results))


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50, p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def percentile_columns(values: Sequence[float]) -> Row:
    names = ("ms_p20", "ms_p50", "ms_p80")
    return {n: f"{ms:.4f}" for n, ms in zip(names, percentiles(values), strict=True)}


def timing_of(result: Result) -> Timing:
    low, middle, high = percentiles([turn.wall for turn in result.turns])
    mib = None if result.extra_bytes is None else result.extra_bytes / MIB
    processor = statistics.median(turn.processor for turn in result.turns)
    return Timing(result.case.provider, middle, mib, (low, high), processor)


def rates(op: Op, case: Case, ms: float) -> tuple[float, float]:
    """Return GB/s and TFLOP/s of the least bytes and work."""
    least = op.bytes(case.mode, case.shape, DTYPES[case.dtype].itemsize)
    return least / ms / 1e6, op.flops(case.mode, case.shape) / ms / 1e9


def row(op: Op, result: Result, facts: Row) -> Row:
    """Return the row of the CSV; what was not measured is empty."""
    found: Row = {}
    if result.ok:
        found = percentile_columns([turn.wall for turn in result.turns])
        gbps, tflops = rates(op, result.case, timing_of(result).ms)
        found |= {"gbps": f"{gbps:.3f}", "tflops": f"{tflops:.5f}"}
        if result.extra_bytes is not None:
            found["peak_mib"] = f"{result.extra_bytes / MIB:.1f}"
    return row_of(result.case, facts, result.status, **found)


def aligned(lines: Sequence[Sequence[str]], n_left: int, indent: str = "  ") -> str:
    """Return cells in columns, the first `n_left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lefts = [str.ljust if i < n_left else str.rjust for i in range(len(widths))]
    padded = (
        [left(cell, width) for left, cell, width in zip(lefts, cells, widths, strict=True)]
        for cells in lines
    )
    return "\n".join(indent + "  ".join(cells).rstrip() for cells in padded)


def heading(op: Op, case: Case, facts: Row) -> str:
    sizes = f"{','.join(op.dims)} = {shape_text(case.shape)}"
    threads = f", {facts['threads']} threads" if case.device == "cpu" else ""
    return f"{case.op} {case.mode}  {sizes}  {case.dtype}  {facts['device']}{threads}"


def table(point: Measured, facts: Row) -> str:
    """Return the results of one point, ratios to the ceiling or to the first that was timed."""
    ceilings, timings = point.of("ceiling"), point.timings
    base = next((t for t in timings if t.provider == point.op.ceiling), next(iter(timings), None))
    parts = [heading(point.op, point.case, facts)]
    if base:
        heads = ["provider", "p50 ms", "p20", "p80", "cpu ms", f"/ {base.provider}", "vs peer"]
        heads += ["extra MiB", "GFLOP/s", "GB/s", *(f"% {t.provider}" for t in ceilings)]
        lines = [heads]
        for t in timings:
            gbps, tflops = rates(point.op, point.case, t.ms)
            cells = [t.provider, *(f"{ms:.4g}" for ms in (t.ms, *(t.spread or ()), t.processor))]
            cells.append(f"{t.ms / base.ms:.2f}")
            cells.append(f"{point.best_peer.ms / t.ms:.2f}" if point.best_peer else "")
            cells += ["?" if t.mib is None else f"{t.mib:.0f}", f"{1e3 * tflops:.4g}"]
            cells += [f"{gbps:.4g}", *(f"{100 * c.ms / t.ms:.0f}" for c in ceilings)]
            lines.append(cells)
        parts.append(aligned(lines, n_left=1))
    if point.best_peer:
        parts.append(f"  best peer: {point.best_peer.provider}")
    parts += [f"  {r.case.provider}: {r.status}" for r in point.results if not r.ok]
    return "\n".join(parts)


def foot(point: Measured) -> str:
    """Return the goals with what was measured, for the first of ours that was timed."""
    op, own, case = point.op, point.own, point.case
    if own is None:
        return ""
    others = {t.provider: t for t in point.timings}
    if point.best_peer:
        others["best peer"] = point.best_peer
    goals = [goal for goal in op.goals if goal.where(case.mode, case.shape)]
    lines = [_beside(goal, own, others.get(goal.against), case.device) for goal in goals]
    if own.mib is not None and op.workspace is not None:
        takes, limit = op.workspace(case.mode, case.shape, torch.device(case.device))
        lines.append(
            f"extra memory {own.mib:.0f} MiB: at most {(takes + WORKSPACE_ALLOWANCE) / MIB:.0f} "
            f"(workspace {takes / MIB:.0f} of at most {limit / MIB:.0f}, "
            f"and {WORKSPACE_ALLOWANCE / MIB:.0f})"
        )
    if own.mib is not None and op.extra_memory is not None:
        lines.append(f"extra memory {own.mib:.0f} MiB: at most {op.extra_memory / MIB:.0f}")
    title = f"goals, to be compared by eye ({own.provider}):"
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _beside(goal: Goal, own: Timing, other: Timing | None, device: str) -> str:
    what = f"time / {goal.against}" if goal.at_most else f"times as fast as {goal.against}"
    bound = f"at most {goal.at_most}" if goal.at_most else f"at least {goal.at_least}"
    if other is None:
        return f"{what} not timed: {bound}"
    over, under = (own, other) if goal.at_most else (other, own)
    found = f"{over.ms / under.ms:.2f}"
    if device == "cpu":
        found += f" (by processor time {over.processor / under.processor:.2f})"
    return f"{what} {found}: {bound}"


def overview(done: Sequence[Measured], facts: Row) -> str:
    """Return a line for each point: ours against the best peer and the tightest ceiling."""
    lines = [["op", "mode", "dtype", "shape", "ours ms", "best peer ms", "times as fast"]]
    lines[0] += ["ceiling ms", "/ ceiling", "ours MiB", "peer MiB"]
    for point in done:
        own, peer, ceiling = point.own, point.best_peer, point.tightest_ceiling
        faster = point.times_as_fast(peer)
        cells = [point.op.name, point.mode, point.dtype, shape_text(point.shape)]
        cells += [_reason(point) if own is None else f"{own.ms:.4g}", _named(peer)]
        cells += [f"{faster:.2f}" if faster else "", _named(ceiling)]
        cells.append(f"{own.ms / ceiling.ms:.2f}" if own and ceiling else "")
        mib = ["" if t is None or t.mib is None else f"{t.mib:.0f}" for t in (own, peer)]
        lines.append([*cells, *mib])
    title = f"{facts['device']}, {facts['threads']} threads, commit {facts['commit']}"
    return f"{title}\n{aligned(lines, n_left=4)}"


def _reason(point: Measured) -> str:
    """Return why none of ours was timed."""
    if all(r.status == NO_BUDGET for r in point.results):
        return "not timed: budget"
    own = (r.status for r in point.results if r.case.provider in point.op.names("ours"))
    return next(own, "not asked for")


def _named(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.provider} {timing.ms:.4g}"
