"""The committed measurements, benchmarks/results/<device>/*.csv, and tables of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.harness.measure import ROOT
from benchmarks.harness.plan import by_importance
from benchmarks.harness.registry import Op, Shape
from benchmarks.harness.report import COLUMNS
from benchmarks.harness.turns import OK
from benchmarks.ops import OPS

RESULTS = ROOT / "benchmarks" / "results"
Key = tuple[str, str, str, Shape]  # op, mode, dtype, shape


@dataclass(frozen=True)
class Timing:
    """What one provider took."""

    provider: str
    ms: float
    mib: float | None
    spread: tuple[float, float] | None = None  # p20 and p80, ms


@dataclass(frozen=True)
class Group:
    """All providers that were timed at one point of an op, in one run."""

    op: Op
    mode: str
    dtype: str
    shape: Shape
    rows: tuple[dict[str, str], ...]  # of the CSV

    @property
    def key(self) -> Key:
        return self.op.name, self.mode, self.dtype, self.shape

    @cached_property
    def timings(self) -> list[Timing]:
        """Of those that were timed."""
        return [
            Timing(row["provider"], float(row["ms_p50"]), _number(row["peak_mib"]), _spread_of(row))
            for row in self.rows
            if row["status"] == OK
        ]

    @property
    def run(self) -> tuple[str, str]:
        """What is the same for all that one command timed."""
        return self.fact("commit"), self.fact("date")

    def fact(self, name: str) -> str:
        """A column that says where or when: the same for all rows."""
        return self.rows[0][name]

    @cached_property
    def own(self) -> Timing | None:
        """The first of ours: what a user gets there."""
        return next(iter(self.of("ours")), None)

    @cached_property
    def best_peer(self) -> Timing | None:
        return min(self.of("peer"), key=lambda t: t.ms, default=None)

    @cached_property
    def ceiling(self) -> Timing | None:
        """The tightest one."""
        return max(self.of("ceiling"), key=lambda t: t.ms, default=None)

    def of(self, kind: str) -> list[Timing]:
        """In the order of the registry."""
        by_name = {t.provider: t for t in self.timings}
        return [by_name[name] for name in self.op.names(kind) if name in by_name]

    def times_as_fast(self, other: Timing | None) -> float | None:
        """How many times as long as ours the other one takes."""
        return other.ms / self.own.ms if self.own and other else None


def devices() -> list[str]:
    """Names of the folders with results."""
    return sorted(folder.name for folder in RESULTS.iterdir() if any(folder.glob("*.csv")))


def load_all(device: str) -> list[Group]:
    """The groups of one device, of all runs; files of other columns are not of this kind."""
    return list(_groups_of(device, COLUMNS))


def load(device: str) -> dict[Key, Group]:
    """One group a point: of two runs the one that timed more providers, of equals the newer one."""
    return _best(load_all(device))


STAGE = "stage"  # the column that benchmarks.stages adds


def load_stages(device: str) -> list[Group]:
    """What `benchmarks.stages` wrote, likewise: of each provider a row for each stage."""
    return list(_best(_groups_of(device, [*COLUMNS, STAGE])).values())


def _best(groups: Iterable[Group]) -> dict[Key, Group]:
    def rank(g: Group) -> tuple[int, str]:
        return len({t.provider for t in g.timings}), g.fact("date")

    found: dict[Key, Group] = {}
    for group in groups:
        found[group.key] = max(found.get(group.key, group), group, key=rank)
    return found


def _groups_of(device: str, columns: Sequence[str]) -> Iterator[Group]:
    for file in sorted((RESULTS / device).glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            if reader.fieldnames == list(columns):
                yield from _groups(reader)


def _groups(rows: Iterable[dict[str, str]]) -> Iterator[Group]:
    runs: dict[tuple[str, ...], list[dict[str, str]]] = {}
    point = ("op", "mode", "dtype", "shape", "commit", "date")
    for row in rows:
        if row["op"] in OPS:
            runs.setdefault(tuple(row[name] for name in point), []).append(row)
    for found in runs.values():
        first = found[0]
        shape = tuple(map(int, first["shape"].split(",")))
        yield Group(OPS[first["op"]], first["mode"], first["dtype"], shape, tuple(found))


def _number(text: str) -> float | None:
    return float(text) if text else None


def _spread_of(row: dict[str, str]) -> tuple[float, float] | None:
    low, high = _number(row["ms_p20"]), _number(row["ms_p80"])
    return None if low is None or high is None else (low, high)


def swept(groups: dict[Key, Group], op: Op) -> list[Group]:
    """What was timed of the op's sweep and has one of ours, the most important first."""
    own = [g for g in groups.values() if g.op is op and g.own]
    device = "cuda" if own and own[0].fact("driver") else "cpu"
    order = {(p.mode, p.shape): i for i, p in enumerate(by_importance(op, device))}
    return sorted(
        (g for g in own if (g.mode, g.shape) in order), key=lambda g: order[g.mode, g.shape]
    )


def along(groups: Iterable[Group], op: Op, dim: str) -> list[list[Group]]:
    """The lines of a curve, in the op's first mode: three points at least, others fixed.

    All of a line are of one run if there is one that has them, for a machine is faster in one
    minute than in the next; what that one lacks is of the run that has most of the line, and so on.
    """
    place = op.dims.index(dim)
    lines: dict[tuple[str, Shape], list[Group]] = {}
    for g in groups:
        if g.op is op and g.mode == op.modes[0] and g.own and g.shape in op.curves[dim]:
            lines.setdefault((g.dtype, _without(g.shape, place)), []).append(g)
    chosen = [_one_each(line) for line in lines.values()]
    return [line for line in chosen if len(line) >= 3]


def _one_each(line: Sequence[Group]) -> list[Group]:
    """Of groups at the same point, that of the run with most of them, then of the newest."""
    runs = Counter(g.run for g in line)
    best = {g.shape: g for g in sorted(line, key=lambda g: (runs[g.run], g.fact("date")))}
    return [best[shape] for shape in sorted(best)]


def _without(shape: Shape, place: int) -> Shape:
    return shape[:place] + shape[place + 1 :]


def source(groups: Sequence[Group]) -> str:
    """Device, versions, commits and days of what is shown."""

    def all_of(name: str, show: Callable[[str], str] = str) -> str:
        return ", ".join(dict.fromkeys(show(g.fact(name)) for g in groups))

    parts = [all_of("device")]
    if not groups[0].fact("driver"):
        threads = all_of("threads")
        parts.append("1 thread" if threads == "1" else f"{threads} threads")
    parts += [f"torch {all_of('torch')}", f"commit {all_of('commit')}"]
    return " · ".join([*parts, all_of("date", lambda date: date[:10])])


def point_text(g: Group) -> str:
    """Such as `sequence 2,5,32,512,50265 float32`; where modes are storages, the mode says it."""
    shape = ",".join(map(str, g.shape))
    return " ".join([g.mode, shape, *dtype_words(g)])


def dtype_words(g: Group) -> list[str]:
    return [] if g.dtype in g.op.modes else [g.dtype]


# ------------------------------------------------------------------------------------- tables


def table(groups: Sequence[Group]) -> str:
    """Markdown."""
    heads = ["op", "mode", "shape", "fastrag, ms", "best peer, ms", "times as fast"]
    heads += ["ceiling, ms", "time over ceiling", "extra MiB", "of that peer"]
    lines = [heads]
    for g in groups:
        assert g.own is not None
        over = None if g.ceiling is None else g.own.ms / g.ceiling.ms
        shape = f"{', '.join(g.op.dims)} = {', '.join(map(str, g.shape))}"
        against = g.times_as_fast(g.best_peer)
        cells = [f"`{g.op.name}`", " ".join([g.mode, *dtype_words(g)]), shape, in_ms(g.own)]
        cells += [_named(g.best_peer), f"{against:.2f} ×" if against else "–", _named(g.ceiling)]
        cells += [f"{over:.2f}" if over else "–", _mib(g.own), _mib(g.best_peer)]
        lines.append(cells)
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def not_won(points: Sequence[Group]) -> str:
    """Where a peer is as fast as ours, or faster."""
    against = [g for g in points if g.best_peer]
    lost = [g for g in against if (g.times_as_fast(g.best_peer) or 0.0) <= 1.0]
    won = len(against) - len(lost)
    lines = [f"fastrag is faster than every peer at {won} of {len(against)} points."]
    if lost:
        lines[0] += " The others:\n"
    for g in lost:
        assert g.own is not None and g.best_peer is not None
        lines.append(
            f"- `{g.op.name}` {point_text(g)}: {g.best_peer.provider} takes "
            f"{in_ms(g.best_peer)} ms, fastrag {in_ms(g.own)}."
        )
    return "\n".join(lines)


def in_ms(timing: Timing) -> str:
    return in_digits(timing.ms)


def in_digits(x: float) -> str:
    """Three at the least, and no exponent."""
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _named(timing: Timing | None) -> str:
    return "–" if timing is None else f"{timing.provider} {in_ms(timing)}"


def _mib(timing: Timing | None) -> str:
    return "–" if timing is None or timing.mib is None else f"{timing.mib:.1f}"
