"""Measured rates of an op under what the machine can do, from rows that `benchmarks.run` wrote.

    rate <= min(arithmetic ceiling, bandwidth ceiling * intensity)     intensity = flops / bytes

Work and bytes are the least that the op needs (the registry's formulas), so that a provider that
moves more shows below the line. Ceilings are rows too, of providers of kind "ceiling": the best of
them counts. A point may be above the line: a small matrix comes from a cache, and `int8-float32`
does most of its arithmetic on codes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib.figure import Figure  # noqa: E402 - after the choice of a backend without a screen

from benchmarks.harness.committed import RESULTS
from benchmarks.harness.measure import ROOT
from benchmarks.harness.registry import DTYPES, Op

# What each ceiling bounds.
ARITHMETIC, BANDWIDTH = ("gemms", "fma"), ("read", "copy")
OURS = {"cpp": "#0072B2", "triton": "#0072B2", "torch": "#56B4E9", "cpp-float32": "#009E73"}
PEER = "#9a9a9a"
MARKERS = "os^Dv<>p"
# The same rows give the same bytes.
STYLE = {"svg.hashsalt": "fastrag", "svg.fonttype": "path", "font.size": 9}
METADATA: Mapping[str, Mapping[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}

Row = Mapping[str, str]


@dataclass(frozen=True)
class Point:
    provider: str
    mode: str
    shape: tuple[int, ...]
    intensity: float  # flops for each byte
    gflops: float


@dataclass(frozen=True)
class Ceilings:
    """The best that a row showed; None where no row did."""

    gflops: float | None
    gbps: float | None


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def committed(op: Op) -> Path:
    """Returns the results of the op in this checkout.

    Raises:
        ValueError: there are none, or those of several machines.
    """
    found = sorted(RESULTS.glob(f"*/{op.name}.csv"))
    if len(found) != 1:
        there = ", ".join(str(path.relative_to(ROOT)) for path in found) or "none"
        raise ValueError(f"expected --csv, since results of {op.name} are: {there}")
    return found[0]


def beside(path: Path) -> list[dict[str, str]]:
    """Rows of the other files in the folder, whose ceilings are of the same machine."""
    others = sorted(other for other in path.parent.glob("*.csv") if other.name != path.name)
    return [row for other in others for row in rows_of(other)]


def points_of(rows: Sequence[Row], op: Op) -> list[Point]:
    """Rows of the op, ceilings and providers that are no more not among them."""
    known = {*op.names("ours"), *op.names("peer")}
    found = []
    for row in rows:
        if row["provider"] not in known:
            continue
        shape = tuple(int(n) for n in row["shape"].split(","))
        flops = op.flops(row["mode"], shape)
        least = op.bytes(row["mode"], shape, DTYPES[row["dtype"]].itemsize)
        rate = flops / (float(row["ms_p50"]) / 1e3) / 1e9
        found.append(Point(row["provider"], row["mode"], shape, flops / least, rate))
    return found


def ceilings_of(rows: Sequence[Row], machine: Row) -> Ceilings:
    """The highest rates of ceilings on the device and threads of `machine`, a row."""
    same = [r for r in rows if r.get("status") == "ok" and _same_machine(r, machine)]
    work = [1e3 * float(r["tflops"]) for r in same if r["provider"] in ARITHMETIC]
    moved = [float(r["gbps"]) for r in same if r["provider"] in BANDWIDTH]
    return Ceilings(max(work, default=None), max(moved, default=None))


def _same_machine(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in ("device", "threads"))


def draw(rows: Sequence[Row], op: Op, path: Path, *, beside: Sequence[Row] = ()) -> list[Path]:
    """Writes the roofline of an op as SVG and PNG, the same bytes for the same rows.

    Args:
        rows: of `benchmarks.run --csv`; those of the first one's device and threads count.
        op: whose rows are taken.
        path: where to; its suffix is replaced.
        beside: further rows, for ceilings that `rows` lack.

    Returns:
        The files.

    Raises:
        ValueError: no row of the op was timed.
    """
    figure = figure_of(rows, op, beside=beside)
    written = [path.with_suffix(suffix) for suffix in METADATA]
    with mpl.rc_context(STYLE):
        for target in written:
            figure.savefig(target, metadata=dict(METADATA[target.suffix]), dpi=150)
    return written


def figure_of(
    rows: Sequence[Row], op: Op, *, beside: Sequence[Row] = (), source: str = ""
) -> Figure:
    """What `draw` writes; `source` says below it where the rows are from."""
    rows = [r for r in rows if r.get("op") == op.name and r.get("status") == "ok"]
    machine = rows[0] if rows else {}
    points = points_of([r for r in rows if _same_machine(r, machine)], op)
    if not points:
        raise ValueError(f"expected rows of {op.name} that were timed, got none")
    if not any(p.gflops for p in points):
        raise ValueError(f"expected an op that computes, and {op.name} only moves bytes")
    own, more = ceilings_of(rows, machine), ceilings_of(beside, machine)
    ceilings = Ceilings(
        more.gflops if own.gflops is None else own.gflops,
        more.gbps if own.gbps is None else own.gbps,
    )
    with mpl.rc_context(STYLE):
        title = f"{op.name}: measured rates under what the machine can do"
        figure = _figure(points, ceilings, title if source else f"{title}, {machine['device']}")
        if source:
            figure.supxlabel(source, x=0.01, ha="left", fontsize=6.5, color="#555555")
    return figure


def _figure(points: Sequence[Point], ceilings: Ceilings, title: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    low = min(p.intensity for p in points) / 2
    high = max(p.intensity for p in points) * 2
    _draw_roof(axes, ceilings, low, high)
    modes = list(dict.fromkeys(p.mode for p in points))
    for p in sorted(points, key=lambda p: p.provider in OURS):  # ours last, on top
        axes.scatter(
            p.intensity,
            p.gflops,
            s=34 if p.provider in OURS else 16,
            marker=MARKERS[modes.index(p.mode) % len(MARKERS)],
            color=OURS.get(p.provider, PEER),
            alpha=0.9,
            linewidths=0,
        )
    there = dict.fromkeys(p.provider for p in points)
    colours = {name: colour for name, colour in OURS.items() if name in there}
    if set(there) - set(OURS):
        colours["peers"] = PEER
    for name, colour in colours.items():
        label = f"fastrag, {name}" if name in OURS else name
        axes.scatter([], [], color=colour, linewidths=0, label=label)
    for mode, marker in zip(modes, MARKERS, strict=False):
        axes.scatter([], [], color="none", edgecolors="black", marker=marker, label=mode)
    top = max(p.gflops for p in points)
    lowest = min(p.gflops for p in points) / 1.5
    axes.set(xscale="log", yscale="log", xlim=(low, high), title=title)
    axes.set_ylim(min(lowest, top / 8), 1.5 * max(top, ceilings.gflops or 0.0))
    axes.set(xlabel="flops needed for each byte that must move", ylabel="GFLOP/s, at p50")
    axes.grid(which="major", color="#e6e6e6")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _draw_roof(axes: Any, ceilings: Ceilings, low: float, high: float) -> None:
    if ceilings.gbps is not None:
        top = high if ceilings.gflops is None else min(high, ceilings.gflops / ceilings.gbps)
        if top > low:
            ends = [low, top]
            label = f"memory: {ceilings.gbps:.3g} GB/s"
            axes.plot(ends, [x * ceilings.gbps for x in ends], color="black", lw=1, label=label)
    if ceilings.gflops is not None:
        start = low if ceilings.gbps is None else max(low, ceilings.gflops / ceilings.gbps)
        if start < high:
            label = f"arithmetic: {ceilings.gflops:.4g} GFLOP/s"
            axes.plot(
                [start, high], [ceilings.gflops] * 2, color="black", lw=1, ls="--", label=label
            )
