"""Draw the figures and write the tables of the documentation, from the committed CSVs alone.

    python -m benchmarks.plot

docs/figures/<device>/ gets PNG and SVG, the same bytes wherever the pinned versions run. README.md
and docs/performance.md get their tables, each between two markers.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    from benchmarks.profiling import roofline
except ImportError as error:
    sys.stderr.write(f"benchmarks.plot: {error}\n")
    sys.exit(2)

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks import ROOT
from benchmarks.harness import committed
from benchmarks.harness.arguments import Parser
from benchmarks.harness.committed import in_digits, source
from benchmarks.harness.registry import Op
from benchmarks.harness.results import Group, Timing
from benchmarks.ops import OPS
from benchmarks.stages import WHOLE

FIGURES = ROOT / "docs" / "figures"
TEXTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")

# From the palette of Okabe and Ito, which readers with any colour vision can tell apart.
OURS, SLOWER, FAINT, INK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"
PEER_COLOURS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#7A5C00", "#000000", "#56B4E9")
# light enough for dark numbers on them
STAGE_COLOURS = ["#56B4E9", "#E69F00", "#F0E442", "#8FD3C0", "#A9C4EB", "#F2A07B", "#DDA7C8"]
STAGE_COLOURS += ["#C9C9C9", "#9FC97F"]
COLOURS_SAY = "blue: fastrag is faster; orange: it is not"
PANELS = 4  # points of an op that are drawn with all their peers
N_INTENSITIES = 4  # a roofline is drawn from as many numbers of flops for each byte
WORDS = {
    "B": "questions",
    "K": "passages for each question",
    "S": "tokens of a question",
    "T": "tokens of an answer",
    "L": "tokens of a context",
    "H": "hidden width",
    "V": "vocabulary",
    "N": "passages of the index",
    "D": "width of a vector",
    "k": "hits for each question",
    "r": "passages encoded per step",
}
FLOOR_MIB = 0.1  # the last digit of the CSV: the least that a logarithmic axis shows
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "fastrag",
    "savefig.dpi": 160,
}


def draw_all(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Write the figures of all devices, in the style above whatever a matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcParams.update(matplotlib.rcParamsDefault)
        matplotlib.rcParams.update(STYLE)
        for device in committed.devices():
            (folder / device).mkdir(parents=True, exist_ok=True)
            for name, draw in figures_of(device):
                if wanted(name):
                    roofline.save(draw(), folder / device / name)


def figures_of(device: str) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield the name of each figure, and the function that draws it."""
    groups, every = committed.load(device), committed.load_all(device)
    for op in OPS.values():
        # Peers that emulate a dtype take so long that the bars of the others would vanish.
        points = [g for g in committed.swept(groups, op) if committed.usual(g)]
        against_peers = [g for g in points if g.best_peer]
        if against_peers:
            yield f"{op.name}_peers", partial(peers_figure, op, against_peers[:PANELS])
        measured = [g for g in against_peers if g.own and g.own.mib is not None]
        if measured:
            yield f"{op.name}_memory", partial(memory_figure, op, measured[:PANELS])
        if len(against_peers) > PANELS:
            yield f"{op.name}_best_peer", partial(best_peer_figure, op, against_peers)
        if len({g.intensity for g in points}) >= N_INTENSITIES:
            others = [g for g in groups.values() if g.op is not op]
            draw = partial(roofline.figure_of, op, points, others, source(points))
            yield f"{op.name}_roofline", draw
        stages = [g for g in committed.load_stages(device) if g.op is op and g.timings]
        if stages:
            yield f"{op.name}_stages", partial(stages_figure, op, stages)
        for dim in op.curves:
            lines = committed.along(every, op, dim)
            if lines:
                yield f"{op.name}_over_{dim}", partial(curve_figure, op, dim, lines)


# -------------------------------------------------------------------------------------- bars


class Bar(NamedTuple):
    name: str
    value: float
    colour: str
    label: str


def peers_figure(op: Op, points: Sequence[Group]) -> Figure:
    """Draw how many times as long as ours each peer takes, and the ceiling, for each point."""

    def draw(g: Group, axes: Axes, n_places: int) -> None:
        assert g.own is not None
        bars = [_ratio_bar(g, t, t.provider) for t in sorted(g.of("peer"), key=lambda t: t.ms)]
        if ceiling := g.tightest_ceiling:
            bar = _ratio_bar(g, ceiling, f"{ceiling.provider} (ceiling)")
            bars.append(bar._replace(colour=FAINT))
        _draw_bars(axes, bars, n_places, line_at_one=True)
        axes.set_title(f"{_heading(g)}\n1 = fastrag, {in_digits(g.own.ms)} ms")

    title = f"{op.name}: how many times as long as fastrag the others take"
    return _panels(f"{title}\n{COLOURS_SAY}; grey: the ceiling", points, draw)


def memory_figure(op: Op, points: Sequence[Group]) -> Figure:
    def draw(g: Group, axes: Axes, n_places: int) -> None:
        shown = [("fastrag", OURS, g.own), *((t.provider, FAINT, t) for t in g.of("peer"))]
        known = [(name, t.mib, colour) for name, colour, t in shown if t and t.mib is not None]
        bars = [Bar(name, mib, colour, f"{mib:.1f}") for name, mib, colour in known]
        _draw_bars(axes, sorted(bars, key=lambda bar: bar.value), n_places)
        axes.set_title(_heading(g))

    title = f"{op.name}: memory of a call beyond inputs and outputs, MiB (shorter is better)"
    return _panels(title, points, draw)


def best_peer_figure(op: Op, points: Sequence[Group]) -> Figure:
    """Draw all points of the sweep, against the best peer of each."""
    figure = Figure(figsize=(7.2, 1.0 + 0.2 * len(points)), layout="constrained")
    points = sorted(points, key=lambda g: (op.modes.index(g.mode), *g.shape))
    bars = [
        _ratio_bar(g, g.best_peer, _heading(g).replace("\n", "  "), f"  {g.best_peer.provider}")
        for g in points
        if g.best_peer
    ]
    _draw_bars(figure.add_subplot(), bars, line_at_one=True)
    title = f"{op.name}: how many times as long as fastrag, 1, the best peer takes\n{COLOURS_SAY}"
    return _finished(figure, title, points)


def _ratio_bar(g: Group, t: Timing, name: str, note: str = "") -> Bar:
    value = g.times_as_fast(t) or 0.0
    text = f"{value:.2f} ×" if value < 10 else f"{value:.3g} ×"
    return Bar(name, value, OURS if value > 1 else SLOWER, text + note)


def _heading(g: Group) -> str:
    """Return mode and sizes, such as `token, float32` and `B=2 K=5 T=32 H=512 V=50265`."""
    sizes = zip(g.op.dims, g.shape, strict=True)
    first = ", ".join([g.mode, *g.dtype_words])
    return f"{first}\n{' '.join(f'{dim}={_short(n)}' for dim, n in sizes)}"


def _draw_bars(
    axes: Axes, bars: Sequence[Bar], n_places: int = 0, *, line_at_one: bool = False
) -> None:
    """Draw horizontal bars, the first on top, with names and labels, and room for `n_places`."""
    n = len(bars)
    names, values, colours, labels = zip(*bars, strict=True)
    axes.barh(range(n), values, color=colours, height=0.68)
    _bare(axes, names, max(n_places, n))
    axes.spines["left"].set_bounds(n - 0.5, -0.5)
    most = max(values)
    axes.set_xlim(0, 1.28 * most if most else 1.0)  # room for the labels
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        _annotate(axes, label, value, place, color=INK, bbox=box)
    if line_at_one:
        axes.plot([1, 1], [-0.5, n - 0.5], color=INK, linewidth=0.8)


def _bare(axes: Axes, names: Sequence[str], n_places: int) -> None:
    """Name the places on the y axis and hide the x axis."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(n_places - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _annotate(axes: Axes, text: str, x: float, y: float, **options: Any) -> None:
    axes.annotate(text, (x, y), (3, 0), textcoords="offset points", va="center", **options)


def stages_figure(op: Op, points: Sequence[Group]) -> Figure:
    """Draw a bar of the stages of a call for each provider."""
    figure = Figure(figsize=(7.2, 1.1 + 0.75 * len(points)), layout="constrained")
    names = dict.fromkeys(row[committed.STAGE] for g in points for row in g.rows if row["ms_p50"])
    colours = dict(zip([n for n in names if n != WHOLE], STAGE_COLOURS, strict=False))
    for i, g in enumerate(points):
        axes = figure.add_subplot(len(points), 1, i + 1)
        axes.set_title(_heading(g).replace("\n", "  "))
        providers = list(dict.fromkeys(t.provider for t in g.timings))
        for place, provider in enumerate(providers):
            _stack(axes, place, g, provider, colours)
        _bare(axes, providers, len(providers))
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside right upper", frameon=False, fontsize=7)
    return _finished(figure, f"{op.name}: milliseconds of each stage of a call", points)


def _stack(axes: Axes, place: int, g: Group, provider: str, colours: Mapping[str, str]) -> None:
    """Draw the stages of a provider. Wide ones have their number inside, the sum is at the end."""
    rows = (row for row in g.rows if row["provider"] == provider and row["ms_p50"])
    times = {row[committed.STAGE]: float(row["ms_p50"]) for row in rows}
    longest = max(t.ms for t in g.timings)
    whole, left = times.pop(WHOLE, None), 0.0
    for name, ms in times.items():
        axes.barh(place, ms, left=left, color=colours.get(name, FAINT), height=0.62)
        if ms > 0.07 * longest:
            axes.text(left + ms / 2, place, in_digits(ms), ha="center", va="center", fontsize=7)
        left += ms
    _annotate(axes, in_digits(left if whole is None else whole), left, place)


Panel = Callable[[Group, Axes, int], None]


def _panels(title: str, points: Sequence[Group], draw: Panel) -> Figure:
    """Draw the points in panels, two in a row."""
    n_rows = (len(points) + 1) // 2
    most = max(len(g.of("peer")) + 1 for g in points)
    figure = Figure(figsize=(7.2, 0.7 + n_rows * (0.72 + 0.17 * most)), layout="constrained")
    for i, g in enumerate(points):
        draw(g, figure.add_subplot(n_rows, min(2, len(points)), i + 1), most)
    return _finished(figure, title, points)


def _finished(figure: Figure, title: str, points: Sequence[Group]) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.supxlabel(source(points), x=0.01, ha="left", fontsize=6.5, color="#555555")
    return figure


# ------------------------------------------------------------------------------------- curves


def curve_figure(op: Op, dim: str, lines: Sequence[list[Group]]) -> Figure:
    """Draw time over one dimension, and memory if it was measured, on logarithmic axes."""
    groups = [g for line in lines for g in line]
    has_memory = any(t.mib for g in groups for t in g.of("ours") + g.of("peer"))
    rows = [_TIME, _MEMORY] if has_memory else [_TIME]
    figure = Figure(figsize=(7.2, 0.9 + 2.6 * len(rows)), layout="constrained")
    place = op.dims.index(dim)
    for i, line in enumerate(lines):
        xs = [g.shape[place] for g in line]
        for j, row in enumerate(rows):
            axes = figure.add_subplot(len(rows), len(lines), len(lines) * j + i + 1)
            _curves(axes, line, xs, row)
            if j == 0:
                sizes = zip(op.dims, line[0].shape, strict=True)
                fixed = " ".join(f"{d}={_short(n)}" for d, n in sizes if d != dim)
                words = ", ".join([line[0].mode, *line[0].dtype_words])
                axes.set_title(f"{words}, {fixed}")
            if i == 0:
                axes.set_ylabel(row.label)
            if j == len(rows) - 1:
                axes.set_xlabel(f"{dim}, {WORDS[dim]}")
    what = "time and memory" if len(rows) > 1 else "time"
    title = f"{op.name}: {what} over {dim}, {WORDS[dim]}\n"
    title += f"thin bars: p20 to p80 of the turns; dotted: time in proportion to {dim}"
    return _finished(figure, title, groups)


class _Row(NamedTuple):
    """The quantity that a row of curves shows."""

    label: str
    value: Callable[[Timing], float | None]


_TIME = _Row("time of a call, ms", lambda t: t.ms)
_MEMORY = _Row("memory of a call, MiB", lambda t: None if t.mib is None else max(t.mib, FLOOR_MIB))


def _curves(axes: Axes, line: Sequence[Group], xs: Sequence[int], row: _Row) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    op, own = line[-1].op, line[-1].own
    assert own is not None
    shown = op.curve_providers or op.names()
    peers = [name for name in shown if name in op.names("peer")]
    colours = dict(zip(peers, itertools.cycle(PEER_COLOURS), strict=False)) | {own.provider: OURS}
    ceilings = op.names("ceiling") if row is _TIME else ()
    tables = [{t.provider: t for t in g.timings} for g in line]
    points: list[tuple[float, float]] = []
    ends: list[tuple[float, float, str, str]] = []  # x, y, label, colour
    for provider in (name for name in shown if name in colours or name in ceilings):
        there = [(x, t[provider]) for x, t in zip(xs, tables, strict=True) if provider in t]
        found = [(x, y) for x, t in there if (y := row.value(t)) is not None]
        if len(found) < 2:
            continue
        points += found
        is_ours, colour = provider == own.provider, colours.get(provider, FAINT)
        for x, t in there if row is _TIME else ():
            if t.low is not None:
                axes.plot([x, x], (t.low, t.high), color=colour, alpha=0.45, linewidth=2.0)
        axes.plot(
            *zip(*found, strict=True),
            color=colour,
            linewidth=2.2 if is_ours else 1.1,
            linestyle="--" if provider in ceilings else "-",
            marker="o",
            markersize=3.5 if is_ours else 2.5,
            zorder=3 if is_ours else 2,
        )
        label = f"{provider} (ceiling)" if provider in ceilings else provider
        ends.append((*found[-1], "fastrag" if is_ours else label, colour))
    if row is _TIME:
        _guide(axes, xs, points)
    axes.set_xticks(xs, [_short(x) for x in xs])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    _label_ends(axes, ends)


def _guide(axes: Axes, xs: Sequence[int], points: Sequence[tuple[float, float]]) -> None:
    """Draw a dotted line of slope 1 below all points."""
    least = min(y / x for x, y in points)
    bottom = 0.55 * min(y for _, y in points)
    start, end = max(xs[0], bottom / (0.6 * least)), xs[-1]
    ends = [0.6 * least * x for x in (start, end)]
    axes.plot([start, end], ends, color=FAINT, linestyle=":", linewidth=0.9)
    axes.set_ylim(0.7 * bottom)


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names at the right ends, moved apart where the lines end close to each other."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    step = 0.07 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y, _, _ in ends:
        heights.append(max(math.log10(y), heights[-1] + step) if heights else math.log10(y))
    over = max(0.0, heights[-1] - high)
    for i in reversed(range(len(heights))):
        most = heights[i + 1] - step if i + 1 < len(heights) else heights[i] - over
        heights[i] = min(heights[i], most)
    for (x, y, label, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            (x, y),
            (1.03, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=7,
            annotation_clip=False,
        )


def _short(n: int) -> str:
    if n >= 1_000_000 and n % 100_000 == 0:
        return f"{n / 1e6:g}M"
    return f"{n // 1000}k" if n >= 10_000 and n % 1000 == 0 else str(n)


# -------------------------------------------------------------------------------------- texts

# Names of blocks, in addition to those of ops: the table of README.md, the points that a peer wins,
# and the ops that have no block on the page.
SHORT, NOT_WON, OTHERS = "all", "not-won", "others"
N_SHORT = 2  # points of an op that the short table has
SHORT_PICTURES = 3
BLOCK = re.compile(r"(<!-- figures: begin (\S+) -->\n).*?(<!-- figures: end -->)", re.DOTALL)


def filled(text: str, place: Path) -> str:
    """Return the text of a Markdown file in folder `place` with its blocks rewritten."""
    named = [found[1] for found in BLOCK.findall(text)]

    def block(found: re.Match[str]) -> str:
        if found[2] != OTHERS:
            return found[1] + _block(found[2], place) + found[3]
        made = {name: _block(name, place) for name in OPS if name not in named}
        texts = [
            f"\n## `{name}`: {OPS[name].about}\n{text}"
            for name, text in made.items()
            if text.strip()
        ]
        return found[1] + "".join(texts) + found[3]

    return BLOCK.sub(block, text)


def _block(name: str, place: Path) -> str:
    if name not in (SHORT, NOT_WON, *OPS):
        known = f"{SHORT}, {NOT_WON}, {OTHERS} or an op"
        raise ValueError(f"figures: expected {known}, got {name!r}")
    parts = []
    for device in committed.devices():
        groups = committed.load(device)
        points = {op.name: committed.swept(groups, op) for op in OPS.values()}
        every = [g for found in points.values() for g in found]
        drawn = [figure for figure, _ in figures_of(device)]
        if name == NOT_WON:
            shown, body, pictures = every, committed.not_won(every), []
        elif name == SHORT:
            shown = [g for found in points.values() for g in found[:N_SHORT]]
            body = committed.table(shown)
            pictures = [figure for figure in drawn if figure.endswith("_peers")][:SHORT_PICTURES]
        else:
            shown = points[name]
            body = committed.table(shown)
            pictures = [figure for figure in drawn if figure.startswith(f"{name}_")]
        if shown:
            folder = os.path.relpath(FIGURES / device, place)
            images = [f"![{p.replace('_', ' ')}]({folder}/{p}.png)" for p in pictures]
            parts += [f"**{source(shown)}**", body, *images]
    return "\n" + "\n\n".join(parts) + "\n\n" if parts else "\n"


def main(argv: Sequence[str] | None = None) -> int:
    Parser("plot", __doc__).parse_args(argv)
    shutil.rmtree(FIGURES, ignore_errors=True)
    draw_all(FIGURES)
    for file in TEXTS:
        file.write_text(filled(file.read_text(encoding="utf-8"), file.parent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
