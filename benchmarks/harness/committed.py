"""The committed measurements, benchmarks/results/<device>/*.csv, and tables of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.harness import rows
from benchmarks.harness.measure import ROOT
from benchmarks.harness.plan import by_importance
from benchmarks.harness.process import OK
from benchmarks.harness.registry import DTYPES, Op, Shape
from benchmarks.harness.report import Comparison, Timing
from benchmarks.harness.rows import COLUMNS, Row
from benchmarks.ops import OPS

RESULTS = ROOT / "benchmarks" / "results"
STAGE = "stage"  # the column that benchmarks.stages adds
Key = tuple[str, str, str, Shape]  # op, mode, dtype, shape


@dataclass(frozen=True)
class Group(Comparison):
    """All providers that were timed at one point of an op in one run."""

    rows: tuple[Row, ...]  # of the CSV

    @property
    def key(self) -> Key:
        return self.op.name, self.mode, self.dtype, self.shape

    @cached_property
    def timings(self) -> list[Timing]:
        return [_timing(row) for row in self.rows if row["status"] == OK]

    @property
    def run(self) -> tuple[str, str]:
        """Values that all rows of one command share."""
        return self.fact("commit"), self.fact("date")

    def fact(self, name: str) -> str:
        """Return a column that is the same for all rows, such as a version or the date."""
        return self.rows[0][name]

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


def _timing(row: Row) -> Timing:
    low, high, mib = (float(row[n]) if row[n] else None for n in ("ms_p20", "ms_p80", "peak_mib"))
    spread = None if low is None or high is None else (low, high)
    return Timing(row["provider"], float(row["ms_p50"]), mib, spread)


def devices() -> list[str]:
    """Return the names of the folders with results."""
    return sorted(folder.name for folder in RESULTS.iterdir() if any(folder.glob("*.csv")))


def load_all(device: str) -> list[Group]:
    """Return the groups of all runs on one device; files with other columns are left alone."""
    return [g for file in _files(device) for g in groups_of(file)]


def load(device: str) -> dict[Key, Group]:
    """Return one group for each point: the one with most providers, then the newest."""
    return _best(load_all(device))


def load_stages(device: str) -> list[Group]:
    """Return likewise what `benchmarks.stages` wrote, which has a row for each stage."""
    columns = [*COLUMNS, STAGE]
    return list(_best(g for file in _files(device) for g in groups_of(file, columns)).values())


def groups_of(file: Path, columns: Sequence[str] = COLUMNS) -> Iterator[Group]:
    """Yield the groups in a file, none if it has other columns."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows.read(file):
        if list(row) == list(columns) and row["op"] in OPS:
            point = ("op", "mode", "dtype", "shape", "commit", "date", "device", "threads")
            runs.setdefault(tuple(row[name] for name in point), []).append(row)
    for (op, mode, dtype, shape, *_), found in runs.items():
        yield Group(OPS[op], mode, dtype, tuple(map(int, shape.split(","))), tuple(found))


def _files(device: str) -> list[Path]:
    return sorted((RESULTS / device).glob("*.csv"))


def _best(groups: Iterable[Group]) -> dict[Key, Group]:
    def rank(g: Group) -> tuple[int, str]:
        return len({t.provider for t in g.timings}), g.fact("date")

    found: dict[Key, Group] = {}
    for group in groups:
        found[group.key] = max(found.get(group.key, group), group, key=rank)
    return found


def swept(groups: dict[Key, Group], op: Op) -> list[Group]:
    """Return the points of the op's sweep that have one of ours, the most important first."""
    own = [g for g in groups.values() if g.op is op and g.own]
    device = "cuda" if own and own[0].fact("driver") else "cpu"
    order = {(p.mode, p.shape): i for i, p in enumerate(by_importance(op, device))}
    there = (g for g in own if (g.mode, g.shape) in order)
    return sorted(there, key=lambda g: order[g.mode, g.shape])


def along(groups: Iterable[Group], op: Op, dim: str) -> list[list[Group]]:
    """Return the lines of a curve in the op's first mode, of at least three points each.

    The points of a line come from one run if a run has them all, since the machine is faster in one
    minute than in the next; points that it lacks come from the run with most of the line, and so
    on.
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
    runs = Counter(g.run for g in line)
    best = {g.shape: g for g in sorted(line, key=lambda g: (runs[g.run], g.fact("date")))}
    return [best[shape] for shape in sorted(best)]


# ------------------------------------------------------------------------------------- tables


def source(groups: Sequence[Group]) -> str:
    """Return device, versions, commits and days of what is shown."""

    def all_of(name: str, show: Callable[[str], str] = str) -> str:
        return ", ".join(dict.fromkeys(show(g.fact(name)) for g in groups))

    parts = [all_of("device")]
    if not groups[0].fact("driver"):
        threads = all_of("threads")
        parts.append("1 thread" if threads == "1" else f"{threads} threads")
    parts += [f"torch {all_of('torch')}", f"commit {all_of('commit')}"]
    return " · ".join([*parts, all_of("date", lambda date: date[:10])])


def table(groups: Sequence[Group]) -> str:
    """Return a table in Markdown."""
    heads = ["op", "mode", "shape", "fastrag, ms", "best peer, ms", "times as fast"]
    heads += ["ceiling, ms", "time over ceiling", "extra MiB", "of that peer"]
    lines = [heads]
    for g in groups:
        assert g.own is not None
        peer, ceiling, faster = g.best_peer, g.tightest_ceiling, g.times_as_fast(g.best_peer)
        shape = f"{', '.join(g.op.dims)} = {', '.join(map(str, g.shape))}"
        cells = [f"`{g.op.name}`", " ".join([g.mode, *g.dtype_words]), shape, in_digits(g.own.ms)]
        cells += [_named(peer), f"{faster:.2f} ×" if faster else "–", _named(ceiling)]
        cells.append(f"{g.own.ms / ceiling.ms:.2f}" if ceiling else "–")
        cells += ["–" if t is None or t.mib is None else f"{t.mib:.1f}" for t in (g.own, peer)]
        lines.append(cells)
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def not_won(points: Sequence[Group]) -> str:
    """Return where a peer is as fast as ours, or faster."""
    against = [g for g in points if g.best_peer]
    lost = [g for g in against if (g.times_as_fast(g.best_peer) or 0.0) <= 1.0]
    won = len(against) - len(lost)
    lines = [f"fastrag is faster than every peer at {won} of {len(against)} points."]
    if lost:
        lines[0] += " The others:\n"
    for g in lost:
        assert g.own is not None and g.best_peer is not None
        point = " ".join([g.mode, rows.shape_text(g.shape), *g.dtype_words])
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
