"""The charts of a run: which values of `metrics.jsonl` share one, and where its lines run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The coordinate system of a chart; the page scales it to the width that there is.
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24
_MARKED = 40  # points up to which each gets a dot


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: its name in the legend.
        points: (step, value), in file order.
        drawn: (x, y) of each point in the coordinate system of the chart.
    """

    label: str
    points: tuple[tuple[int, float], ...]
    drawn: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """The coordinates as a polyline of SVG states them."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.drawn)

    @property
    def is_marked(self) -> bool:
        """Whether each point gets a dot."""
        return len(self.points) <= _MARKED


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        title: its heading.
        lines: its lines.
        x_ticks: x and label of each tick of the steps.
        y_ticks: y and label of each tick of the values.
    """

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class ChartKind:
    """A chart before any run is known.

    Args:
        title: heading of the chart.
        labels: regular expression of a name in `metrics.jsonl`, to the label of its line; the
            first group of the expression replaces `{}`.
        share: whether values are shares, drawn from 0 to 1.
        whole: whether values are whole numbers.
    """

    title: str
    labels: dict[str, str]
    share: bool = False
    whole: bool = False

    def label_of(self, name: str) -> str | None:
        """Return the label of a name; None if the chart does not show it."""
        for pattern, label in self.labels.items():
            if found := re.fullmatch(pattern, name):
                return label.format(*found.groups())
        return None


CHARTS = (
    ChartKind("Loss (nats per label token)", {"loss": "training", "eval_loss": "evaluation"}),
    ChartKind("Recall", {r"eval_recall@(\d+)": "recall@{}"}, share=True),
    ChartKind("Answers", {"eval_em": "EM", "eval_f1": "F1"}, share=True),
    ChartKind("Entropy (nats)", {"prior_entropy": "prior", "posterior_entropy": "posterior"}),
    ChartKind("KL of posterior and prior (nats)", {"kl": "KL"}),
    ChartKind(
        "Staleness: 1 - cos(stored, fresh vector)",
        {"staleness": "all passages", "staleness_retrieved": "retrieved passages"},
    ),
    ChartKind("Unique passages", {"unique_passages": "since the last line of the log"}, whole=True),
)


def draw_charts(entries: Sequence[dict[str, Any]]) -> list[Chart]:
    """Lay out the charts of a run.

    Args:
        entries: lines of `metrics.jsonl`, as `fastrag.inspect.read_log` returns them.

    Returns:
        The charts that have a point.

    Example:
        >>> [chart] = draw_charts([{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}])
        >>> chart.title, chart.lines[0].path
        ('Loss (nats per label token)', '48,8 350,186')
    """
    charts = []
    for kind in CHARTS:
        points: dict[str, list[tuple[int, float]]] = {each: [] for each in kind.labels.values()}
        for entry in entries:
            for name, value in entry.items():
                label = kind.label_of(name)
                if label is not None and value is not None:
                    points.setdefault(label, []).append((entry["step"], value))
        points = {label: line for label, line in points.items() if line}
        if points:
            charts.append(_laid_out(kind, points))
    return charts


def _laid_out(kind: ChartKind, points: dict[str, list[tuple[int, float]]]) -> Chart:
    every = [point for line in points.values() for point in line]
    steps, values = zip(*every, strict=True)
    x_ticks = _ticks(min(steps), max(steps), whole=True)
    y_ticks = _ticks(0.0, 1.0) if kind.share else _ticks(min(values), max(values), kind.whole)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low = min(y_ticks[0], *values)
    high = max(y_ticks[-1], *values)

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first), 2)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 2)

    return Chart(
        kind.title,
        tuple(
            Line(label, tuple(line), tuple((x(step), y(value)) for step, value in line))
            for label, line in points.items()
        ),
        tuple((x(tick), f"{tick:,.0f}") for tick in x_ticks if first <= tick <= last),
        tuple((y(tick), f"{tick:,.5g}") for tick in y_ticks),
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round numbers, the outer ones at or beyond the ends."""
    # below this a line is flat, and ticks would have the same label
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-200):
        high = low + max(1.0, abs(low))
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(each for each in (1, 2, 5, 10) if (high - low) / (4 * step * each) <= 1.0001)
    if whole:
        step = max(step, 1.0)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(start, end + 1)]
