"""A run with a budget times what matters most, and says what it left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.harness import results, shared
from benchmarks.harness.measure import Turn
from benchmarks.harness.registry import DEVICES, Op, by_importance, in_turn, shape_text
from benchmarks.harness.timing import Case, Result
from benchmarks.ops import OPS

Budget = run.Budget
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@every_op
def test_all_of_a_sweep_is_in_the_plan_once(op: Op) -> None:
    for device in DEVICES:
        sweep = [(mode, shape) for mode in op.modes for shape in op.sweep(device, mode)]
        assert sorted((p.mode, p.shape) for p in by_importance(op, device)) == sorted(sweep)


def test_headlines_come_first_and_modes_side_by_side() -> None:
    op = OPS["mips"]
    found = [(p.mode, p.shape) for p in by_importance(op, "cpu")]
    assert tuple(found[: len(op.headlines)]) == op.headlines
    loss = by_importance(OPS["marginal_loss"], "cpu")
    assert [p.mode for p in loss] == ["token", "sequence"] * 2
    assert loss[0].shape == loss[1].shape


def test_ops_take_turns() -> None:
    ops = [OPS["marginal_loss"], OPS["mips"], OPS["doc_scores"]]
    found = [p.op.name for p in in_turn(ops, "cpu")]
    assert found[:6] == ["marginal_loss", "mips", "doc_scores"] * 2
    assert len(found) == sum(len(by_importance(op, "cpu")) for op in ops)


def test_a_point_is_begun_if_the_longest_of_its_op_still_fits() -> None:
    clock, mips, loss = Clock(), OPS["mips"], OPS["marginal_loss"]
    budget = Budget(200.0, 2, clock)
    ends = []
    for seconds in (30.0, 80.0, 20.0):
        assert budget.fits(mips)
        with budget.spent_on(mips) as until:
            ends.append(until)
            clock.now += seconds
    assert ends == [100.0, 30.0 + 170.0 / 2, 110.0 + 90.0 / 2]
    assert not budget.fits(mips) and not budget.fits(loss)  # 130 + 80
    clock.now = 120.0
    assert budget.fits(mips) and budget.fits(loss)
    assert Budget(60.0, 1, clock).fits(loss) and not Budget(59.0, 1, clock).fits(loss)
    endless = Budget(math.inf, 2, clock)
    with endless.spent_on(mips) as until:
        assert endless.fits(mips) and until == math.inf


# ---------------------------------------------------------------------------- the whole command


def timed(monkeypatch: pytest.MonkeyPatch, n_points: int) -> Clock:
    """All providers take 10 ms, each point takes 50 s, and the user interrupts after `n_points`."""
    clock = Clock()
    monkeypatch.setattr(shared, "hold", lambda specs: None)
    monkeypatch.setattr(run, "Budget", lambda seconds, n_ops: Budget(seconds, n_ops, clock))

    def fake(cases: Sequence[Case], rounds: int, until: float) -> list[Result]:
        if clock.now >= 50.0 * n_points:
            raise KeyboardInterrupt
        clock.now += 50.0
        return [Result(case, extra_bytes=results.MIB, turns=[Turn(10.0, 20.0)]) for case in cases]

    monkeypatch.setattr(run, "_time", fake)
    return clock


def overview_of(said: str) -> list[str]:
    lines = said.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.split()[:2] == ["op", "mode"]) :]


def test_what_did_not_fit_has_rows_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clock = timed(monkeypatch, n_points=100)
    file = tmp_path / "all.csv"
    arguments = ["--op", "all", "--budget-minutes", "6", "--device", "cpu", "--csv", str(file)]
    assert run.main(arguments) == 0
    assert clock.now <= 360.0
    points = in_turn(OPS.values(), "cpu")
    _, *lines = overview_of(capsys.readouterr().out)
    assert len(lines) == len(points)
    n_timed = sum("not timed: budget" not in line for line in lines)
    assert n_timed == 7 and lines[0].startswith("  marginal_loss  token")
    assert "not timed: budget" in lines[-1]
    found = results.read(file)
    assert {(r["op"], r["mode"], r["shape"]) for r in found} == {
        (p.op.name, p.mode, shape_text(p.shape)) for p in points
    }
    statuses = {r["status"] for r in found}
    assert statuses == {"ok", "unavailable: not timed, the budget was spent"}


def test_an_interrupt_prints_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, n_points=2)
    assert run.main(["--op", "all", "--device", "cpu"]) == 130
    assert len(overview_of(capsys.readouterr().out)) == 1 + 2


def test_an_overview_has_ours_the_best_peer_and_the_tightest_ceiling() -> None:
    shape = (1000, 64, 10, 64)

    def found(provider: str, milliseconds: float) -> Result:
        case = Case("mips", provider, "float32", shape, "float32", "cpu")
        return Result(case, extra_bytes=3 * results.MIB, turns=[Turn(milliseconds, milliseconds)])

    whole = [found("read", 1.0), found("fma", 8.0), found("cpp", 10.0), found("numpy", 13.0)]
    broken = [Result(found("cpp", 1.0).case, "wrong: rows"), found("numpy", 13.0)]
    facts = {"device": "a machine", "threads": "2", "commit": "abc"}
    groups = [
        group
        for point in (whole, broken)
        for group in results.groups_of(results.measured(one, facts) for one in point)
    ]
    title, _, line, other = results.overview(groups).splitlines()
    assert title == "a machine, 2 threads, commit abc"
    point = ["mips", "float32", "float32", "1000,64,10,64"]
    assert line.split() == [*point, "10", "numpy", "13", "1.30", "fma", "8", "1.25", "3", "3"]
    assert other.split() == [*point, "wrong:", "rows", "numpy", "13", "3"]
