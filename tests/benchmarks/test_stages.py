"""Every stage of a step is seen, once, and together they are the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import stages
from benchmarks.harness import results, timing
from benchmarks.harness.process import Refusal
from benchmarks.harness.registry import shape_text
from benchmarks.harness.timing import Case, Result
from benchmarks.ops.rag_step import OP
from benchmarks.stages import REST, STAGES, WHOLE, Clock, StageTimes
from fastrag import profiling

TINY = OP.checked[0]
SEEN = {
    "fastrag": set(STAGES),
    "hf": set(STAGES) - {"score"},  # two lines of its forward, of which nothing can take hold
}


@pytest.fixture(autouse=True)
def no_ranges_are_left() -> Iterator[None]:
    yield
    profiling.set_ranges(None)


class Hand(Clock):
    """A clock that is set by hand."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.time = 0.0

    def now(self) -> float:
        return self.time


def test_a_stage_does_not_count_what_is_opened_within_it() -> None:
    clock = Hand()
    with clock.stage("generator"):
        clock.time += 1.0
        with clock.stage("loss"):
            clock.time += 10.0
            with clock.stage("marginal_nll/logits"):  # a part of the loss
                clock.time += 100.0
        clock.time += 1000.0
    clock.time += 5.0
    with clock.stage("loss"):
        clock.time += 10000.0
    assert clock.spent == {"generator": 1001.0, "loss": 10110.0}


def case_of(provider: str, mode: str = "token") -> Case:
    return Case("rag_step", provider, mode, TINY, "float32", "cpu")


@pytest.mark.parametrize("mode", ["token", "sequence-given"])
@pytest.mark.parametrize("provider", SEEN)
def test_the_stages_are_the_step(provider: str, mode: str) -> None:
    reason = case_of(provider, mode).why_not()
    if reason:
        pytest.skip(reason)
    found = StageTimes(case_of(provider, mode)).turn()
    expected = SEEN[provider]
    if mode.endswith("-given"):
        expected = expected - ({"search"} if provider == "fastrag" else {"search", "contexts"})
    assert set(found) == expected | {REST, WHOLE}
    assert all(ms > 0.0 for ms in found.values())
    assert sum(found.values()) == pytest.approx(2 * found[WHOLE])


def test_a_step_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "error_of", lambda *args: "loss: norm of the error is 1")
    with pytest.raises(Refusal, match=r"^wrong: loss: norm of the error is 1$"):
        StageTimes(case_of("fastrag", "token-given"))


TURNS = {
    "fastrag": [{"search": 1.0, "loss": 4.0, REST: 1.0, WHOLE: float(n)} for n in (6, 8, 10)],
    "hf": [{"search": 2.0, REST: 14.0, WHOLE: 16.0}],
}


def test_rows_are_one_a_stage_or_say_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "unavailable: datasets is not installed"

    def fake(cases: Sequence[Case], rounds: int, make: type) -> list[Result]:
        assert make is StageTimes and rounds == 5
        ours, theirs = cases
        return [Result(ours, turns=TURNS["fastrag"]), Result(theirs, why)]

    monkeypatch.setattr(stages, "time_cases", fake)
    file = tmp_path / "stages.csv"
    assert stages.main(["--csv", str(file)]) == 0
    found = results.read(file)
    assert [(row["provider"], row["stage"], row["ms_p50"], row["status"]) for row in found] == [
        ("fastrag", "search", "1.0000", "ok"),
        ("fastrag", "loss", "4.0000", "ok"),
        ("fastrag", "rest", "1.0000", "ok"),
        ("fastrag", "whole", "8.0000", "ok"),
        ("hf", "", "", why),
    ]
    assert found[0]["op"] == "rag_step"
    assert found[0]["shape"] == shape_text(OP.shapes["cpu"][0])
    assert f"  hf: {why}" in capsys.readouterr().out


def test_the_table_has_medians_and_shares() -> None:
    found = [Result(case_of(name), turns=turns) for name, turns in TURNS.items()]
    lines = [line.split() for line in stages.table(found).splitlines()]
    assert lines == [
        ["stage", "fastrag", "ms", "%", "hf", "ms", "%"],
        ["search", "1", "12", "2", "12"],
        ["loss", "4", "50"],
        ["rest", "1", "12", "14", "88"],
        ["whole", "8", "100", "16", "100"],
    ]
