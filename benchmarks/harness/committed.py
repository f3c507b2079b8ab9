"""The committed measurements, benchmarks/results/<device>/*.csv, and tables of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.harness.arguments import DEFAULT_DTYPE
from benchmarks.harness.registry import Op, Shape, by_importance, shape_text
from benchmarks.harness.results import COLUMNS, Group, Timing, groups_of, read
from benchmarks.ops import OPS

RESULTS = ROOT / "benchmarks" / "results"
STAGE = "stage"  # the column that benchmarks.stages adds
Key = tuple[str, str, str, Shape]  # op, mode, dtype, shape


def devices() -> list[str]:
    """Return the names of the folders with results."""
    return sorted(folder.name for folder in RESULTS.iterdir() if any(folder.glob("*.csv")))


def groups_in(file: Path, columns: Sequence[str] = COLUMNS) -> Iterator[Group]:
    """Return the groups in a file, none if it has other columns."""
    return groups_of(row for row in read(file) if [*row] == [*columns] and row["op"] in OPS)


def load_all(device: str, columns: Sequence[str] = COLUMNS) -> list[Group]:
    """Return the groups of all runs on one device. Files with other columns are left alone."""
    files = sorted((RESULTS / device).glob("*.csv"))
    return [group for file in files for group in groups_in(file, columns)]


def load(device: str, columns: Sequence[str] = COLUMNS) -> dict[Key, Group]:
    """Return one group for each point: the one with most providers, then the newest."""

    def rank(g: Group) -> tuple[int, str]:
        return len({t.provider for t in g.timings}), g.fact("date")

    found: dict[Key, Group] = {}
    for g in load_all(device, columns):
        key = g.op.name, g.mode, g.dtype, g.shape
        found[key] = max(found.get(key, g), g, key=rank)
    return found


def load_stages(device: str) -> list[Group]:
    """Return the same of the files of `benchmarks.stages`, which have a row for each stage."""
    return list(load(device, [*COLUMNS, STAGE]).values())


def swept(groups: dict[Key, Group], op: Op) -> list[Group]:
    """Return the points of the op's sweep at which ours was timed, the most important first.

    Those of another dtype than the device's usual one come last.
    """
    own = [g for g in groups.values() if g.op is op and g.own]
    plan = by_importance(op, own[0].device) if own else []
    order = {(p.mode, p.shape): i for i, p in enumerate(plan)}
    there = (g for g in own if (g.mode, g.shape) in order)
    return sorted(there, key=lambda g: (not usual(g), order[g.mode, g.shape]))


def usual(g: Group) -> bool:
    """Return whether the dtype is the one that is timed on the device by default."""
    return g.dtype == DEFAULT_DTYPE[g.device]


def along(groups: Iterable[Group], op: Op, dim: str) -> list[list[Group]]:
    """Return the lines of a curve in the op's first mode that have at least three points.

    The points of a line come from one run if a run has them all, since the machine is faster in one
    minute than in the next. Otherwise the run with most of the line is used first.
    """
    place = op.dims.index(dim)
    lines: dict[tuple[str, Shape], list[Group]] = {}
    for g in groups:
        if g.op is op and g.mode == op.modes[0] and g.own and g.shape in op.curves[dim]:
            others = g.shape[:place] + g.shape[place + 1 :]
            lines.setdefault((g.dtype, others), []).append(g)
    chosen = [_one_each(line) for line in lines.values()]
    return [line for line in chosen if len(line) >= 3]


def _one_each(line: Sequence[Group]) -> list[Group]:
    """Return one group for each shape: that of the run with most groups, then of the newest."""

    def run(g: Group) -> tuple[str, str]:
        return g.fact("commit"), g.fact("date")

    sizes = Counter(map(run, line))
    best = {g.shape: g for g in sorted(line, key=lambda g: (sizes[run(g)], g.fact("date")))}
    return [best[shape] for shape in sorted(best)]


# ------------------------------------------------------------------------------------- tables


def source(groups: Sequence[Group]) -> str:
    """Return device, versions, commits and days of the groups that a figure or table shows."""

    def all_of(name: str, show: Callable[[str], str] = str) -> str:
        return ", ".join(dict.fromkeys(show(g.fact(name)) for g in groups))

    parts = [all_of("device")]
    if groups[0].device == "cpu":
        threads = all_of("threads")
        parts.append("1 thread" if threads == "1" else f"{threads} threads")
    parts += [f"torch {all_of('torch')}", f"commit {all_of('commit')}"]
    return " · ".join([*parts, all_of("date", lambda date: date[:10])])


def table(groups: Sequence[Group]) -> str:
    """Return a table in Markdown."""
    heads = ["processor", "op", "mode", "shape", "fastrag, ms", "best peer, ms", "times as fast"]
    heads += ["ceiling, ms", "time over ceiling", "extra MiB", "of that peer"]
    lines = [heads]
    for g in groups:
        assert g.own is not None
        peer, ceiling, faster = g.best_peer, g.tightest_ceiling, g.times_as_fast(g.best_peer)
        shape = f"{', '.join(g.op.dims)} = {', '.join(map(str, g.shape))}"
        cells = [g.fact("device"), f"`{g.op.name}`", " ".join([g.mode, *g.dtype_words]), shape]
        cells.append(in_digits(g.own.ms))
        cells += [_named(peer), f"{faster:.2f} ×" if faster else "–", _named(ceiling)]
        cells.append(f"{g.own.ms / ceiling.ms:.2f}" if ceiling else "–")
        cells += ["–" if t is None or t.mib is None else f"{t.mib:.1f}" for t in (g.own, peer)]
        lines.append(cells)
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def not_won(points: Sequence[Group]) -> str:
    """Return the points at which a peer is as fast as ours, or faster."""
    against = [g for g in points if g.best_peer]
    lost = [g for g in against if (g.times_as_fast(g.best_peer) or 0.0) <= 1.0]
    n_won = len(against) - len(lost)
    lines = [f"fastrag is faster than every peer at {n_won} of {len(against)} points."]
    if lost:
        lines[0] += " The others:\n"
    for g in lost:
        assert g.own is not None and g.best_peer is not None
        point = " ".join([g.mode, shape_text(g.shape), *g.dtype_words])
        lines.append(
            f"- `{g.op.name}` {point}: {g.best_peer.provider} takes "
            f"{in_digits(g.best_peer.ms)} ms, fastrag {in_digits(g.own.ms)}."
        )
    return "\n".join(lines)


def in_digits(x: float) -> str:
    """Return at least three digits, without an exponent."""
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _named(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.provider} {in_digits(timing.ms)}"
