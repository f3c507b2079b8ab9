"""The search for the largest batch, on peaks that are known."""

from __future__ import annotations

import csv
import math
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from benchmarks import largest_batch
from benchmarks.harness import measure
from benchmarks.harness.timing import Case, peak_of_first_call
from benchmarks.largest_batch import MOST, StepError, bytes_of, largest
from benchmarks.ops.rag_step import OP

TINY = OP.checked[0]
GIB = 1 << 30


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 9, 31, 100, 1000])
def test_the_largest_batch_is_found(most: int) -> None:
    asked: list[int] = []

    def peak(n_questions: int) -> float:
        asked.append(n_questions)
        return 50.0 + 10.0 * n_questions if n_questions <= most + 40 else math.inf

    assert largest(peak, 50.0 + 10.0 * most + 9.0) == (most, 50.0 + 10.0 * most)
    assert len(asked) == len(set(asked)) <= 2 + 2 * math.log2(most + 1)
    assert max(asked) <= max(2, 2 * most)  # never more than twice the memory of what fits


def test_a_budget_that_one_question_passes_has_no_batch() -> None:
    assert largest(lambda n: 100.0 * n, 99.0) == (0, 100.0)
    assert largest(lambda n: math.inf, 99.0) == (0, math.inf)


def test_it_ends_where_nothing_passes_the_budget() -> None:
    assert largest(lambda n: 1.0, 99.0) == (MOST, 1.0)


def test_budgets_have_units() -> None:
    assert bytes_of("4GiB") == 4 * GIB and bytes_of("1.5KiB") == 1536
    for text in ("4", "4GB", "GiB", "-1GiB", "nanGiB", ""):
        with pytest.raises(ArgumentTypeError, match="expected a byte at least"):
            bytes_of(text)


def test_the_peak_of_a_step_is_gradients_and_what_leads_to_them() -> None:
    case = Case("rag_step", "fastrag", "token-given", (32, 4, 41, 7, 16, 8), "float32", "cpu")
    try:
        found = peak_of_first_call(case)
    except OSError as error:
        pytest.skip(str(error))
    logits = 4 * 32 * 4 * 7 * 4099
    assert logits < found < logits + GIB // 8  # neither weights nor moments, which are small here


def test_what_does_not_fit_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise MemoryError

    monkeypatch.setattr(measure, "extra_bytes", full)
    case = Case("rag_step", "fastrag", "token-given", TINY, "float32", "cpu")
    assert peak_of_first_call(case) == math.inf


def test_rows_hold_the_batch_or_say_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(case: Case, budget: float) -> tuple[int, float]:
        if case.provider == "hf":
            raise StepError("failed: its process ended")
        return 12, 3.0 * (1 << 20)

    monkeypatch.setattr(largest_batch, "largest_of", found)
    file = tmp_path / "largest.csv"
    assert largest_batch.main(["--budget", "4MiB", "--csv", str(file)]) == 0
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["provider"] for row in rows] == ["fastrag", "hf"]
    assert [row["largest_batch"] for row in rows] == ["12", ""]
    assert rows[0]["shape"].startswith("12,") and rows[0]["peak_mib"] == "3.0"
    assert [row["budget_mib"] for row in rows] == ["4", "4"]
    assert [row["status"] for row in rows] == ["ok", "failed: its process ended"]
    out = capsys.readouterr().out
    assert ["fastrag", "12", "3"] in [line.split() for line in out.splitlines()]
    assert "  hf: failed: its process ended" in out
