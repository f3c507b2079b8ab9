"""Results as a table for a person and as rows of CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.registry import DTYPES, Goal, Op
from benchmarks.harness.turns import Result

COLUMNS = ["op", "provider", "mode", "dtype", "shape", "ms_p50", "ms_p20", "ms_p80", "peak_mib"]
COLUMNS += ["gbps", "tflops", "device", "driver", "threads", "torch", "triton", "commit", "date"]
COLUMNS += ["status"]
MIB = 1 << 20
NO_BUDGET = "unavailable: not timed, the budget was spent"
WORKSPACE_ALLOWANCE = 16 * MIB


def shape_text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns p20, p50, p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def median(result: Result) -> float:
    return statistics.median(turn.wall for turn in result.turns)


def processor(result: Result) -> float:
    return statistics.median(turn.processor for turn in result.turns)


def rates(op: Op, result: Result) -> tuple[float, float]:
    """Returns GB/s and TFLOP/s of the least bytes and work, at the median time."""
    case, seconds = result.case, median(result) / 1e3
    itemsize = DTYPES[case.dtype].itemsize
    gbps = op.bytes(case.mode, case.shape, itemsize) / seconds / 1e9
    return gbps, op.flops(case.mode, case.shape) / seconds / 1e12


def row(op: Op, result: Result, facts: dict[str, str]) -> dict[str, str]:
    """One row of the CSV; what was not measured is empty."""
    case = result.case
    found = dict.fromkeys(COLUMNS, "") | {
        "op": case.op,
        "provider": case.provider,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": shape_text(case.shape),
        "status": result.status,
        **facts,
    }
    if result.ok:
        p20, p50, p80 = percentiles([turn.wall for turn in result.turns])
        gbps, tflops = rates(op, result)
        found |= {"ms_p50": f"{p50:.4f}", "ms_p20": f"{p20:.4f}", "ms_p80": f"{p80:.4f}"}
        found |= {"gbps": f"{gbps:.3f}", "tflops": f"{tflops:.5f}"}
        if result.extra_bytes is not None:
            found["peak_mib"] = f"{result.extra_bytes / MIB:.1f}"
    return found


def write_csv(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Writes a file anew."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def add_to_csv(
    path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS
) -> None:
    """Adds rows behind those that the file has: a measurement is never lost to the next one."""
    if not path.exists() or path.is_file() and not path.stat().st_size:
        write_csv(path, rows, columns)
        return
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)


def _best_peer(op: Op, results: Sequence[Result]) -> Result | None:
    peers = set(op.names("peer"))
    return min((r for r in results if r.ok and r.case.provider in peers), key=median, default=None)


def _base(op: Op, results: Sequence[Result]) -> Result | None:
    """The ceiling if it was timed, else the first that was."""
    timed = [r for r in results if r.ok]
    return next((r for r in timed if r.case.provider == op.ceiling), timed[0] if timed else None)


def _ceilings(op: Op, results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.ok and r.case.provider in op.names("ceiling")]


def _own(op: Op, results: Sequence[Result]) -> Result | None:
    """The first of ours that was timed: what a user gets here."""
    return next((r for r in results if r.ok and r.case.provider in op.names("ours")), None)


def aligned(lines: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """Cells in columns, the first `n_left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    ]


def table(op: Op, results: Sequence[Result], facts: dict[str, str]) -> str:
    """The results of one mode and shape."""
    case = results[0].case
    base, peer = _base(op, results), _best_peer(op, results)
    ceilings = _ceilings(op, results)
    title = (
        f"{case.op} {case.mode}  {','.join(op.dims)} = {shape_text(case.shape)}  {case.dtype}  "
        f"{facts['device']}"
    )
    if case.device == "cpu":
        title += f", {facts['threads']} threads"
    if base is None:
        heads = ["provider"]
    else:
        heads = ["provider", "p50 ms", "p20", "p80", "cpu ms", f"/ {base.case.provider}"]
        heads += ["vs peer", "extra MiB", "GFLOP/s", "GB/s"]
        heads += [f"% {ceiling.case.provider}" for ceiling in ceilings]
    lines = [[head] for head in heads]
    notes = []
    for result in results:
        if not result.ok or base is None:
            notes.append(f"{result.case.provider}: {result.status}")
            continue
        p20, p50, p80 = percentiles([turn.wall for turn in result.turns])
        gbps, tflops = rates(op, result)
        extra = result.extra_bytes
        cells = [result.case.provider, *(f"{ms:.4g}" for ms in (p50, p20, p80))]
        cells.append(f"{processor(result):.4g}")
        cells.append(f"{p50 / median(base):.2f}")
        cells.append("" if peer is None else f"{median(peer) / p50:.2f}")
        cells.append("?" if extra is None else f"{extra / MIB:.0f}")
        cells += [f"{1e3 * tflops:.4g}", f"{gbps:.4g}"]
        cells += [f"{100 * median(ceiling) / p50:.0f}" for ceiling in ceilings]
        for column, cell in zip(lines, cells, strict=True):
            column.append(cell)
    body = aligned(list(zip(*lines, strict=True)), n_left=1)
    if peer is not None:
        notes.insert(0, f"best peer: {peer.case.provider}")
    return "\n".join([title, *(f"  {line}" for line in [*body, *notes])])


def foot(op: Op, results: Sequence[Result]) -> str:
    """What was measured beside the goals, for the first of ours that was timed."""
    own = _own(op, results)
    if own is None:
        return ""
    lines = [f"goals, to be compared by eye ({own.case.provider}):"]
    by_name = {r.case.provider: r for r in results if r.ok}
    peer = _best_peer(op, results)
    if peer is not None:
        by_name["best peer"] = peer
    for goal in op.goals:
        if not goal.where(own.case.mode, own.case.shape):
            continue
        lines.append(f"  {_beside(goal, own, by_name.get(goal.against))}")
    if op.workspace is not None and own.extra_bytes is not None:
        case = own.case
        takes, limit = op.workspace(case.mode, case.shape, torch.device(case.device))
        lines.append(
            f"  extra memory {own.extra_bytes / MIB:.0f} MiB: at most "
            f"{(takes + WORKSPACE_ALLOWANCE) / MIB:.0f} (workspace {takes / MIB:.0f} of at most "
            f"{limit / MIB:.0f}, and {WORKSPACE_ALLOWANCE / MIB:.0f})"
        )
    if op.extra_memory is not None and own.extra_bytes is not None:
        lines.append(
            f"  extra memory {own.extra_bytes / MIB:.0f} MiB: at most {op.extra_memory / MIB:.0f}"
        )
    return "\n".join(lines) if len(lines) > 1 else ""


def _beside(goal: Goal, own: Result, other: Result | None) -> str:
    what = f"time / {goal.against}" if goal.at_most else f"times as fast as {goal.against}"
    bound = f"at most {goal.at_most}" if goal.at_most else f"at least {goal.at_least}"
    if other is None:
        return f"{what} not timed: {bound}"
    over, under = (own, other) if goal.at_most else (other, own)
    found = f"{median(over) / median(under):.2f}"
    if own.case.device == "cpu":
        found += f" (by processor time {processor(over) / processor(under):.2f})"
    return f"{what} {found}: {bound}"


def overview(done: Sequence[tuple[Op, Sequence[Result]]], facts: dict[str, str]) -> str:
    """All that was timed, a line each: ours against the best peer and the tightest ceiling."""
    lines = [["op", "mode", "dtype", "shape", "ours ms", "best peer ms", "times as fast"]]
    lines[0] += ["ceiling ms", "/ ceiling", "ours MiB", "peer MiB"]
    for op, results in done:
        case = results[0].case
        own, peer = _own(op, results), _best_peer(op, results)
        ceiling = max(_ceilings(op, results), key=median, default=None)
        cells = [case.op, case.mode, case.dtype, shape_text(case.shape)]
        cells += [_reason(op, results) if own is None else f"{median(own):.4g}", _named(peer)]
        cells.append(f"{median(peer) / median(own):.2f}" if own and peer else "")
        cells.append(_named(ceiling))
        cells.append(f"{median(own) / median(ceiling):.2f}" if own and ceiling else "")
        lines.append([*cells, _mebibytes(own), _mebibytes(peer)])
    title = f"{facts['device']}, {facts['threads']} threads, commit {facts['commit']}"
    return "\n".join([title, *(f"  {line}" for line in aligned(lines, n_left=4))])


def _reason(op: Op, results: Sequence[Result]) -> str:
    """Why none of ours was timed."""
    if all(r.status == NO_BUDGET for r in results):
        return "not timed: budget"
    return next((r.status for r in results if r.case.provider in op.names("ours")), "not asked for")


def _named(result: Result | None) -> str:
    return "" if result is None else f"{result.case.provider} {median(result):.4g}"


def _mebibytes(result: Result | None) -> str:
    if result is None or result.extra_bytes is None:
        return ""
    return f"{result.extra_bytes / MIB:.0f}"
