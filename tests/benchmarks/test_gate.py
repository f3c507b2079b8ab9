"""The gate fails where a number moves, and says why where it cannot compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate
from benchmarks.gate import SECTIONS, Counts, Section, Uncounted, compare, differences

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads(gate.FILE.read_text())


def moved(section: str, factor: float) -> list[str]:
    """What is said of the committed numbers, each times a factor."""
    counts = COMMITTED[section]["counts"]
    found = {name: round(factor * count) for name, count in counts.items()}
    return differences(SECTIONS[section], counts, found)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_committed_numbers_are_within_their_own_bounds(section: str) -> None:
    assert COMMITTED[section]["with"] and COMMITTED[section]["counts"]
    assert moved(section, 1.0) == []


@pytest.mark.parametrize(("factor", "good"), [(0.96, False), (0.98, True), (1.02, True)])
def test_instructions_may_move_by_three_percent(factor: float, good: bool) -> None:
    n = len(COMMITTED["instructions"]["counts"])
    assert n == 3 * len(gate.SEARCHES) + 2 * len(gate.PASSES)
    assert len(moved("instructions", factor)) == (0 if good else n)
    slower = moved("instructions", 1.04)
    assert len(slower) == n and all("+4.0%), at most 3%" in line for line in slower)


def test_a_fall_asks_for_the_new_number() -> None:
    (line,) = differences(SECTIONS["instructions"], {"search": 1000}, {"search": 900})
    assert line == "search: 1000 -> 900 (-10.0%), fewer: commit the new number"


def test_a_kernel_gets_no_register_and_no_byte_more() -> None:
    section = SECTIONS["kernels"]
    assert differences(section, {"k registers": 40}, {"k registers": 38}) == []
    (line,) = differences(section, {"k registers": 40}, {"k registers": 41})
    assert line.startswith("k registers: 40 -> 41")
    (spill,) = differences(section, {"k stack": 0}, {"k stack": 8})
    assert spill.startswith("k stack: 0 -> 8")


@pytest.mark.parametrize("now", [102, 104])
def test_allocations_are_as_many_as_they_were(now: int) -> None:
    assert len(differences(SECTIONS["allocations"], {"loss": 103}, {"loss": now})) == 1


def test_what_is_new_or_gone_is_out_of_bounds() -> None:
    found = differences(SECTIONS["kernels"], {"old": 1}, {"new": 1})
    assert found == ["old: no longer counted", "new: not committed"]


# ----------------------------------------------------------------------------- sections, command


def section(counts: Counts, versions: str = "g++ 12") -> Section:
    return Section("instructions", lambda: versions, lambda: dict(counts), rise=0.03, fall=0.03)


def test_other_versions_are_not_compared() -> None:
    committed = {"with": "g++ 12", "counts": {"search": 1}}
    lines, said = compare(section({"search": 9}, "g++ 13"), committed)
    assert lines == []
    assert said == "instructions: not compared: here is g++ 13, the numbers are of g++ 12"
    lines, said = compare(section({"search": 9}), committed)
    assert len(lines) == 1 and said == "instructions: 1 numbers, 1 out of bounds"


def test_what_cannot_be_counted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.shutil, "which", lambda tool: None if tool == "valgrind" else tool)
    with pytest.raises(Uncounted, match="there is no valgrind"):
        gate.instruction_versions()
    _, said = compare(SECTIONS["instructions"], COMMITTED["instructions"])
    assert said == "instructions: not compared: there is no valgrind"


def test_the_command_fails_and_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gate.json"
    monkeypatch.setattr(gate, "FILE", file)
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setitem(SECTIONS, "instructions", section({"search": 1000}))
    only = ["--only", "instructions"]
    assert gate.main([*only, "--update"]) == 0
    assert "search: 1000" in capsys.readouterr().out
    assert gate.main(only) == 0
    monkeypatch.setitem(SECTIONS, "instructions", section({"search": 1100}))
    assert gate.main(only) == 1
    assert "search: 1000 -> 1100 (+10.0%), at most 3%" in capsys.readouterr().out
    assert gate.main([*only, "--update"]) == 0
    assert "search: 1000 -> 1100 (+10.0%)" in capsys.readouterr().out
    assert gate.main(only) == 0
    assert json.loads(file.read_text())["instructions"]["counts"] == {"search": 1100}


def test_an_allocation_more_is_seen() -> None:
    import torch

    x = torch.ones(1000)
    assert gate._allocated(lambda: [x.clone() for _ in range(3)]) == [4000] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_the_gate(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gate", "--only", name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "not compared" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{name}: " in done.stdout
