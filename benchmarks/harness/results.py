"""Rows of CSV, the timings at one point that they hold, and the tables of a run.

A run prints its tables from the same rows that it writes, so that a committed file says as much.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.harness.registry import DTYPES, Goal, Op, Shape, shape_text
from benchmarks.harness.timing import OK, Case, Result
from benchmarks.ops import OPS

COLUMNS = ["op", "provider", "mode", "dtype", "shape", "ms_p50", "ms_p20", "ms_p80", "peak_mib"]
COLUMNS += ["gbps", "tflops", "device", "driver", "threads", "torch", "triton", "commit", "date"]
COLUMNS += ["status"]
PROCESSOR = "ms_processor"  # a value of rows that were just measured, not a column of the CSV
MIB = 1 << 20
NO_BUDGET = "unavailable: not timed, the budget was spent"
WORKSPACE_ALLOWANCE = 16 * MIB
Row = dict[str, str]


def row_of(case: Case, facts: Mapping[str, str], status: str, **values: str) -> Row:
    """Return the row of a case. Columns that were not measured are empty.

    `values` may name columns that only some commands have.
    """
    row = dict.fromkeys(COLUMNS, "") | {"op": case.op, "provider": case.provider}
    row |= {"mode": case.mode, "dtype": case.dtype, "shape": shape_text(case.shape)}
    return {**row, "status": status, **facts, **values}


def measured(result: Result, facts: Mapping[str, str]) -> Row:
    """Return the row of a result of `timing.time_cases`."""
    if not result.ok:
        return row_of(result.case, facts, result.status)
    walls = [turn.wall for turn in result.turns]
    gbps, tflops = rates(result.case, percentiles(walls)[1])
    values = percentile_columns(walls) | {"gbps": f"{gbps:.3f}", "tflops": f"{tflops:.5f}"}
    values[PROCESSOR] = str(statistics.median(turn.processor for turn in result.turns))
    if result.extra_bytes is not None:
        values["peak_mib"] = f"{result.extra_bytes / MIB:.1f}"
    return row_of(result.case, facts, result.status, **values)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50, p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def percentile_columns(values: Sequence[float]) -> Row:
    names = ("ms_p20", "ms_p50", "ms_p80")
    return {n: f"{ms:.4f}" for n, ms in zip(names, percentiles(values), strict=True)}


def rates(case: Case, ms: float) -> tuple[float, float]:
    """Return GB/s and TFLOP/s of the least bytes and work that the op needs."""
    op = OPS[case.op]
    least = op.bytes(case.mode, case.shape, DTYPES[case.dtype].itemsize)
    return least / ms / 1e6, op.flops(case.mode, case.shape) / ms / 1e9


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to those in the file: a measurement is never lost to the next one."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, "", "ignore", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------ timings of a point


@dataclass(frozen=True)
class Timing:
    """Milliseconds and memory of a call of one provider; None if the row does not have them."""

    provider: str
    ms: float
    mib: float | None
    low: float | None  # p20, milliseconds
    high: float | None  # p80
    processor: float | None  # milliseconds of processor time


def _timing(row: Row) -> Timing:
    names = ("peak_mib", "ms_p20", "ms_p80", PROCESSOR)
    return Timing(
        row["provider"],
        float(row["ms_p50"]),
        *(float(row[n]) if row.get(n) else None for n in names),
    )


@dataclass(frozen=True)
class Group:
    """All providers that were timed at one point of an op in one run."""

    op: Op
    mode: str
    dtype: str
    shape: Shape
    rows: tuple[Row, ...]

    @cached_property
    def timings(self) -> list[Timing]:
        return [_timing(row) for row in self.rows if row["status"] == OK]

    @cached_property
    def own(self) -> Timing | None:
        """The first of ours, which is what a user gets here."""
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
        """Return the time of the other one over ours."""
        return other.ms / self.own.ms if self.own and other else None

    def fact(self, name: str) -> str:
        """Return a column that is the same for all rows, such as a version or the date."""
        return self.rows[0][name]

    @property
    def device(self) -> str:
        return "cuda" if self.fact("driver") else "cpu"

    @property
    def flops(self) -> float:
        return self.op.flops(self.mode, self.shape)

    @property
    def intensity(self) -> float:
        """Flops for each byte that must move."""
        return self.flops / self.op.bytes(self.mode, self.shape, DTYPES[self.dtype].itemsize)

    @property
    def dtype_words(self) -> list[str]:
        """The dtype, unless the modes of the op are dtypes."""
        return [] if self.dtype in self.op.modes else [self.dtype]


def groups_of(rows: Iterable[Row]) -> Iterator[Group]:
    """Yield the rows of each point and run together."""
    point = ("op", "mode", "dtype", "shape", "commit", "date", "device", "threads")
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in point), []).append(row)
    for (op, mode, dtype, shape, *_), found in runs.items():
        yield Group(OPS[op], mode, dtype, tuple(map(int, shape.split(","))), tuple(found))


# ------------------------------------------------------------------------------------------ tables


def aligned(lines: Sequence[Sequence[str]], n_left: int, indent: str = "  ") -> str:
    """Return cells in columns, the first `n_left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [f"{cell:{'<' if i < n_left else '>'}{widths[i]}}" for i, cell in enumerate(cells)]
        for cells in lines
    )
    return "\n".join(indent + "  ".join(cells).rstrip() for cells in padded)


def heading(row: Row) -> str:
    sizes = f"{','.join(OPS[row['op']].dims)} = {row['shape']}"
    threads = "" if row["driver"] else f", {row['threads']} threads"
    return f"{row['op']} {row['mode']}  {sizes}  {row['dtype']}  {row['device']}{threads}"


def table(g: Group) -> str:
    """Return the results of one point, with ratios to the ceiling, or to the first timed one."""
    parts = [heading(g.rows[0])]
    base = next((t for t in g.timings if t.provider == g.op.ceiling), next(iter(g.timings), None))
    if base:
        ceilings = g.of("ceiling")
        heads = ["provider", "p50 ms", "p20", "p80", "cpu ms", f"/ {base.provider}", "vs peer"]
        lines = [heads + ["extra MiB", "GFLOP/s", "GB/s", *(f"% {t.provider}" for t in ceilings)]]
        rows = {row["provider"]: row for row in g.rows}
        for t in g.timings:
            times = (t.ms, t.low, t.high, t.processor)
            cells = [t.provider, *("" if ms is None else f"{ms:.4g}" for ms in times)]
            cells.append(f"{t.ms / base.ms:.2f}")
            cells.append(f"{g.best_peer.ms / t.ms:.2f}" if g.best_peer else "")
            cells.append("?" if t.mib is None else f"{t.mib:.0f}")
            cells.append(f"{1e3 * float(rows[t.provider]['tflops']):.4g}")
            cells.append(f"{float(rows[t.provider]['gbps']):.4g}")
            lines.append(cells + [f"{100 * c.ms / t.ms:.0f}" for c in ceilings])
        parts.append(aligned(lines, n_left=1))
    if g.best_peer:
        parts.append(f"  best peer: {g.best_peer.provider}")
    parts += [f"  {row['provider']}: {row['status']}" for row in g.rows if row["status"] != OK]
    return "\n".join(parts)


def goals(g: Group) -> str:
    """Return the goals and what was measured, for the first of ours; "" if none was timed."""
    op, own = g.op, g.own
    if own is None:
        return ""
    others = {t.provider: t for t in g.timings}
    if g.best_peer:
        others["best peer"] = g.best_peer
    asked = (goal for goal in op.goals if goal.where(g.mode, g.shape))
    lines = [_goal(goal, own, others.get(goal.against), g.device) for goal in asked]
    extra = f"extra memory {own.mib or 0.0:.0f} MiB: at most"
    if own.mib is not None and op.workspace is not None:
        takes, limit = op.workspace(g.mode, g.shape, torch.device(g.device))
        lines.append(
            f"{extra} {(takes + WORKSPACE_ALLOWANCE) / MIB:.0f} (workspace {takes / MIB:.0f} of at "
            f"most {limit / MIB:.0f}, and {WORKSPACE_ALLOWANCE / MIB:.0f})"
        )
    if own.mib is not None and op.extra_memory is not None:
        lines.append(f"{extra} {op.extra_memory / MIB:.0f}")
    title = f"goals, to be compared by eye ({own.provider}):"
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _goal(goal: Goal, own: Timing, other: Timing | None, device: str) -> str:
    label = f"time / {goal.against}" if goal.at_most else f"times as fast as {goal.against}"
    bound = f"at most {goal.at_most}" if goal.at_most else f"at least {goal.at_least}"
    if other is None:
        return f"{label} not timed: {bound}"
    over, under = (own, other) if goal.at_most else (other, own)
    found = f"{over.ms / under.ms:.2f}"
    if device == "cpu" and over.processor and under.processor:
        found += f" (by processor time {over.processor / under.processor:.2f})"
    return f"{label} {found}: {bound}"


def overview(groups: Sequence[Group]) -> str:
    """Return a line for each point: ours, the best peer and the tightest ceiling."""
    lines = [["op", "mode", "dtype", "shape", "ours ms", "best peer ms", "times as fast"]]
    lines[0] += ["ceiling ms", "/ ceiling", "ours MiB", "peer MiB"]
    for g in groups:
        own, peer, ceiling = g.own, g.best_peer, g.tightest_ceiling
        faster = g.times_as_fast(peer)
        cells = [g.op.name, g.mode, g.dtype, shape_text(g.shape)]
        cells += [f"{own.ms:.4g}" if own else _why_not_timed(g), _named(peer)]
        cells += [f"{faster:.2f}" if faster else "", _named(ceiling)]
        cells.append(f"{own.ms / ceiling.ms:.2f}" if own and ceiling else "")
        mib = ["" if t is None or t.mib is None else f"{t.mib:.0f}" for t in (own, peer)]
        lines.append([*cells, *mib])
    device, threads, commit = (groups[0].fact(name) for name in ("device", "threads", "commit"))
    return f"{device}, {threads} threads, commit {commit}\n{aligned(lines, n_left=4)}"


def _why_not_timed(g: Group) -> str:
    """Return why none of ours was timed."""
    if all(row["status"] == NO_BUDGET for row in g.rows):
        return "not timed: budget"
    own = (row["status"] for row in g.rows if row["provider"] in g.op.names("ours"))
    return next(own, "not asked for")


def _named(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.provider} {timing.ms:.4g}"
