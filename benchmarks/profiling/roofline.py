"""Measured rates of an op under the limits of the machine, from rows that `benchmarks.run` wrote.

    rate <= min(arithmetic ceiling, bandwidth ceiling * intensity)     intensity = flops / bytes

Work and bytes are the least that the op needs (the registry's formulas), so a provider that moves
more is further below the line. Ceilings are rows too, of providers of kind "ceiling"; the best one
counts. A point may be above the line: a small matrix comes from a cache, and `int8-float32` does
most of its arithmetic on codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install 'fastrag[plots]'") from error

mpl.use("Agg")
from matplotlib.figure import Figure  # noqa: E402 - after the choice of a backend without a screen

from benchmarks import ROOT
from benchmarks.harness.committed import RESULTS, groups_in
from benchmarks.harness.registry import Op
from benchmarks.harness.results import Group

ARITHMETIC, BANDWIDTH = ("gemms", "fma"), ("read", "copy")  # the limit that each ceiling shows
OURS = {"cpp": "#0072B2", "triton": "#0072B2", "torch": "#56B4E9", "cpp-float32": "#009E73"}
PEER = "#9a9a9a"
MARKERS = "os^Dv<>p"
# The same rows give the same bytes.
STYLE = {"svg.hashsalt": "fastrag", "svg.fonttype": "path", "font.size": 9}
METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


@dataclass(frozen=True)
class Point:
    provider: str
    mode: str
    intensity: float  # flops for each byte
    gflops: float


def groups_for(op: Op, path: Path | None) -> tuple[list[Group], list[Group]]:
    """Return the groups of an op, and those of the other files in the folder, on that machine.

    Without a path they are the committed ones.

    Raises:
        ValueError: there are no committed ones, or those of several machines.
    """
    if path is None:
        found = sorted(RESULTS.glob(f"*/{op.name}.csv"))
        if len(found) != 1:
            there = ", ".join(str(path.relative_to(ROOT)) for path in found) or "none"
            raise ValueError(f"expected --csv, since results of {op.name} are: {there}")
        (path,) = found
    others = sorted(other for other in path.parent.glob("*.csv") if other.name != path.name)
    own = [g for g in groups_in(path) if g.op is op]
    return own, [g for other in others for g in groups_in(other)]


def points_of(groups: Iterable[Group]) -> list[Point]:
    """Return a point for each of ours and each peer that was timed."""
    return [
        Point(t.provider, g.mode, g.intensity, g.flops / (t.ms / 1e3) / 1e9)
        for g in groups
        for t in g.timings
        if t.provider in (*g.op.names("ours"), *g.op.names("peer"))
    ]


def highest(groups: Iterable[Group], machine: Group, names: Sequence[str], column: str) -> float:
    """Return the highest rate of the named ceilings on the machine of a group, 0 without one."""
    rows = (row for g in groups if _same(g, machine) for row in g.rows if row["status"] == "ok")
    return max((float(row[column]) for row in rows if row["provider"] in names), default=0.0)


def _same(group: Group, other: Group) -> bool:
    return all(group.fact(name) == other.fact(name) for name in ("device", "threads"))


def save(figure: Figure, path: Path, **options: Any) -> list[Path]:
    """Write a figure as PNG and SVG, and return the files; the suffix of `path` is replaced."""
    files = [path.with_suffix(suffix) for suffix in METADATA]
    for file in files:
        figure.savefig(file, metadata=METADATA[file.suffix], **options)
    return files


def draw(op: Op, groups: Sequence[Group], others: Sequence[Group], path: Path) -> list[Path]:
    """Write the roofline of an op, the same bytes for the same rows; see `figure_of`."""
    figure = figure_of(op, groups, others)
    with mpl.rc_context(STYLE):
        return save(figure, path, dpi=150)


def figure_of(op: Op, groups: Sequence[Group], others: Sequence[Group], source: str = "") -> Figure:
    """Return the roofline of an op.

    Args:
        op: the op.
        groups: timings of the op; only those on the first one's device and threads count.
        others: groups of other ops, for ceilings that `groups` lack.
        source: a line below the figure about the origin of the rows.

    Raises:
        ValueError: no group has a point.
    """
    groups = [g for g in groups if _same(g, groups[0])]
    points = points_of(groups)
    if not points:
        raise ValueError(f"expected rows of {op.name} that were timed, got none")
    if not any(p.gflops for p in points):
        raise ValueError(f"expected an op that computes, and {op.name} only moves bytes")

    def ceiling(names: Sequence[str], column: str) -> float:
        own = highest(groups, groups[0], names, column)
        return own or highest(others, groups[0], names, column)

    limits = 1e3 * ceiling(ARITHMETIC, "tflops"), ceiling(BANDWIDTH, "gbps")
    title = f"{op.name}: measured rates under what the machine can do"
    title += "" if source else f", {groups[0].fact('device')}"
    with mpl.rc_context(STYLE):
        figure = _figure(points, *limits, title)
        if source:
            figure.supxlabel(source, x=0.01, ha="left", fontsize=6.5, color="#555555")
    return figure


def _figure(points: Sequence[Point], gflops: float, gbps: float, title: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    low = min(p.intensity for p in points) / 2
    high = max(p.intensity for p in points) * 2
    _draw_roof(axes, gflops, gbps, low, high)
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
    axes.set_ylim(min(lowest, top / 8), 1.5 * max(top, gflops))
    axes.set(xlabel="flops needed for each byte that must move", ylabel="GFLOP/s, at p50")
    axes.grid(which="major", color="#e6e6e6")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def _draw_roof(axes: Any, gflops: float, gbps: float, low: float, high: float) -> None:
    ridge = gflops / gbps if gflops and gbps else None  # the intensity at which the two limits meet
    top, start = (high if ridge is None else min(high, ridge)), max(low, ridge or low)
    if gbps and top > low:
        ends = [low, top]
        label = f"memory: {gbps:.3g} GB/s"
        axes.plot(ends, [x * gbps for x in ends], color="black", lw=1, label=label)
    if gflops and start < high:
        label = f"arithmetic: {gflops:.4g} GFLOP/s"
        axes.plot([start, high], [gflops] * 2, color="black", lw=1, ls="--", label=label)
