"""The command: its arguments, its rows, its turns, and that it leaves no process behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.harness import commits, results, timing
from benchmarks.harness.measure import Turn
from benchmarks.harness.process import Process
from benchmarks.harness.registry import shape_text
from benchmarks.harness.results import MIB, Group, groups_of, measured
from benchmarks.harness.timing import Case, Result
from benchmarks.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
OP = OPS["marginal_loss"]
COLUMNS = (
    "op provider mode dtype shape ms_p50 ms_p20 ms_p80 peak_mib gbps tflops device driver threads "
    "torch triton commit date status"
)
SHAPE = (2, 2, 3, 8, 50)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.run", *args]


def result(provider: str, *milliseconds: float, status: str = "ok", mib: float = 1.0) -> Result:
    case = Case("marginal_loss", provider, "token", SHAPE, "float32", "cpu")
    found = [Turn(ms, 2 * ms) for ms in milliseconds]  # two threads
    return Result(case, status, int(mib * MIB) if found else None, found)


FACTS = {"device": "a machine", "threads": "2", "date": "2026-01-01T00:00:00Z", "commit": "abc"}


def group_of(*found: Result) -> Group:
    (group,) = groups_of(measured(result, FACTS) for result in found)
    return group


# ----------------------------------------------------------------------------------- arguments


def test_the_shapes_of_a_curve_replace_the_sweep() -> None:
    args = run._parse(["--op", "marginal_loss", "--curve", "V", "K", "--device", "cpu"])
    # They cross at K = 5, V = 16384.
    assert {p.mode for p in args.points} == {"token"} and len(args.points) == 10
    assert args.points[0].shape == (2, 5, 32, 512, 4096)
    assert args.providers == list(OP.curve_providers)
    both = run._parse(["--op", "mips", "--curve", "all", "--mode", "int8", "--providers", "cpp"])
    assert {p.mode for p in both.points} == {"int8"} and both.providers == ["cpp"]
    along = OPS["mips"].curves.values()
    assert {p.shape for p in both.points} == {shape for shapes in along for shape in shapes}


# ------------------------------------------------------------------------------ rows and tables


def test_the_columns_of_the_csv(tmp_path: Path) -> None:
    row = measured(result("gather", 5.0, 1.0, 2.0, 3.0, 4.0), FACTS)
    results.add(tmp_path / "rows.csv", [row])
    text = (tmp_path / "rows.csv").read_text()
    assert text.splitlines()[0] == COLUMNS.replace(" ", ",")
    (found,) = csv.DictReader(text.splitlines())
    assert found["shape"] == "2,2,3,8,50" and found["status"] == "ok"
    assert [float(found[f"ms_p{p}"]) for p in (20, 50, 80)] == pytest.approx([1.8, 3.0, 4.2])
    flops = 3 * 2 * 12 * 8 * 50  # 12 rows
    assert float(found["tflops"]) == pytest.approx(flops / 3e-3 / 1e12, abs=1e-5)
    assert float(found["gbps"]) == pytest.approx(2 * 4 * 8 * (12 + 50) / 3e-3 / 1e9, abs=1e-3)
    assert found["peak_mib"] == "1.0"


def test_ratios_of_the_table() -> None:
    found = [
        result("gemms", 10.0),
        result("cpp", 11.0),
        result("gather", 22.0),
        result("hf", 44.0),
        result("cce", status="failed: its process ended with code -9"),
    ]
    lines = results.table(group_of(*found)).splitlines()
    cells = {line.split()[0]: line.split() for line in lines}
    # p50, p20, p80, processor, / gemms, vs peer, MiB, GFLOP/s, GB/s, % of gemms
    assert cells["cpp"][1:8] == ["11", "11", "11", "22", "1.10", "2.00", "1"]
    assert cells["hf"][5:7] == ["4.40", "0.50"]
    assert [cells[name][-1] for name in ("gemms", "cpp", "gather")] == ["100", "91", "45"]
    assert cells["best"] == ["best", "peer:", "gather"]
    assert "  cce: failed: its process ended with code -9" in lines


def test_goals_stand_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(64 * MIB))
    found = result("gemms", 10.0), result("cpp", 11.0, mib=3), result("hf", 33.0)
    text = results.goals(group_of(*found))
    assert "time / gemms 1.10 (by processor time 1.10): at most 1.15" in text
    assert "times as fast as hf 3.00 (by processor time 3.00): at least 1.9" in text
    assert "times as fast as gather not timed" in text
    assert "extra memory 3 MiB: at most 16 (workspace 0 of at most 64, and 16)" in text


def test_two_ceilings_have_a_column_each() -> None:
    shape = (1000, 64, 10, 64)

    def found(provider: str, milliseconds: float) -> Result:
        case = Case("mips", provider, "float32", shape, "float32", "cpu")
        return Result(case, extra_bytes=33 * MIB, turns=[Turn(milliseconds, milliseconds)])

    times = {"read": 1.0, "fma": 8.0, "cpp": 10.0, "numpy": 13.0}
    group = group_of(*(found(*of_one) for of_one in times.items()))
    head, *lines = results.table(group).splitlines()[1:]
    assert head.split()[-4:] == ["%", "read", "%", "fma"]
    cells = {line.split()[0]: line.split() for line in lines}
    assert cells["cpp"][-2:] == ["10", "80"]
    text = results.goals(group)
    assert "times as fast as fma 0.80 (by processor time 0.80): at least 0.9" in text
    assert "times as fast as best peer 1.30 (by processor time 1.30): at least 1.25" in text
    assert text.count("best peer") == 1 and "as read" not in text
    assert "extra memory 33 MiB: at most 32" in text


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"torch": "wrong: loss"}, 1),
        ({"torch": "failed: its process ended"}, 1),
        ({"hf": "wrong: loss"}, 0),
        ({"triton": "unavailable: no GPU"}, 0),
    ],
    ids=["wrong", "failed", "a peer", "unavailable"],
)
def test_only_ours_breaks_the_run(
    status: dict[str, str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [result(name, status=why) for name, why in status.items()]
    monkeypatch.setattr(run, "_time", lambda *args: [*found, result("gather", 1.0)])
    options = ["--op", "marginal_loss", "--shape", shape_text(SHAPE), "--device", "cpu"]
    assert run.main([*options, "--mode", "token"]) == code


# --------------------------------------------------------------------------------------- turns


class FakeProcess:
    """Answers as a provider of three seconds a turn, which passes at once on a clock of its own."""

    said: list[str]

    def __init__(self, tree: Path | None, module: str) -> None:
        self.name = ""

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.said.append(f"{self.name} ends")

    def ask(self, function: Any, *args: Any) -> tuple[str, Any]:
        if function is timing.turn:
            self.said.append(self.name)
            Clock.now += 3.0
            return "ok", Turn(3000.0, 6000.0)
        self.name = args[1].provider
        self.said.append(f"{self.name} begins")
        first = 3.0 if self.name == "gather" else 0.5
        return ("wrong: loss", None) if self.name == "hf" else ("ok", (1, first))


class Clock:
    now = 0.0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    FakeProcess.said = []
    monkeypatch.setattr(timing, "Process", FakeProcess)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(timing.time, clock, lambda: Clock.now)
    return FakeProcess.said


def cases_of(*providers: str) -> list[Case]:
    return [result(name).case for name in providers]


def test_turns_rotate_and_the_first_round_does_not_count(said: list[str]) -> None:
    first, second, wrong = timing.time_cases(cases_of("torch", "gather-checkpoint", "hf"), 2)
    names = ["torch", "gather-checkpoint"]
    assert said[3:-3] == [*names, *names[::-1], *names]
    assert (len(first.turns), len(second.turns), wrong.turns) == (2, 2, [])
    assert wrong.status == "wrong: loss"


def test_a_slow_provider_takes_fewer_turns(said: list[str]) -> None:
    def n_turns(**limits: float) -> list[int]:
        found = timing.time_cases(cases_of("torch", "gather"), 5, **limits)
        return [len(result.turns) for result in found]

    # 3 seconds that do not count and 3 that do; the long first call of the other was its warm-up
    assert n_turns(patience=5.0) == [1, 2] and n_turns(patience=0.0) == [1, 1]
    assert n_turns() == [5, 5]
    assert n_turns(until=Clock.now) == [1, 1]  # past its time


def test_one_process_at_a_time(said: list[str]) -> None:
    found = timing.time_cases(cases_of("torch", "gather"), 1, together=False)
    turns = ["begins", "", "", "ends"]
    assert said == [f"{name} {turn}".strip() for name in ("torch", "gather") for turn in turns]
    assert [r.case.provider for r in found] == ["torch", "gather"]


@pytest.mark.parametrize(("free", "together"), [(7 << 30, True), (5 << 30, False)])
def test_all_processes_must_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, together: bool
) -> None:
    monkeypatch.setattr(run, "free_memory", lambda device: free)
    shape = (1_000_000, 768, 10, 64)
    # a copy of the matrix, 3.1 GB; scores twice, 0.5; two processes, 1.3: 4.9 GB, of four fifths
    cases = [Case("mips", p, "float32", shape, "float32", "cpu") for p in ("faiss", "mm-xq")]
    assert run._fit_together(cases) is together
    assert run._fit_together([result("hf").case])  # says nothing of its memory


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with Process() as process:
        yield process


def test_a_process_answers_fails_or_ends(process: Process) -> None:
    assert process.ask(json.loads, "[1]") == ("ok", [1])
    status, found = process.ask(json.loads, "[")
    assert status.startswith("failed: JSONDecodeError: ") and found is None
    assert process.ask(os.write, 2, b"said\n") == ("ok", 5)
    assert process.ask(os.getpgid, 0) == ("ok", process.child.pid)  # no Ctrl-C reaches it
    for _ in range(2):
        assert process.ask(os._exit, 3) == ("failed: its process ended with code 3: said", None)


def test_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Providers in processes of their own search the parent's matrix, and one says why it cannot.

    Rows are added to those that the file has.
    """
    monkeypatch.setenv("FASTRAG_BACKEND", "torch")
    file = tmp_path / "out.csv"
    results.add(file, [measured(result("torch", 1.0), FACTS)])
    options = ["--op", "mips", "--providers", "torch,numpy,triton", "--rounds", "1"]
    options += ["--mode", "float32", "--shape", "300,16,3,2", "--device", "cpu"]
    assert run.main([*options, "--csv", str(file)]) == 0
    before, *found = results.read(file)
    assert before["ms_p50"] == "1.0000"
    assert [row["provider"] for row in found] == ["torch", "numpy", "triton"]
    assert all(row["status"] == "ok" and float(row["ms_p50"]) > 0 for row in found[:2])
    assert found[2]["status"] == "unavailable: runs on cuda only, not on cpu"
    assert "best peer: numpy" in capfd.readouterr().out


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_an_interrupt_ends_all_children() -> None:
    args = ("--op", "doc_scores", "--providers", "copy,torch", "--device", "cpu")
    process = subprocess.Popen(
        command(*args, "--rounds", "1000000", "--shape", "3,4,50,17"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Whatever runs the tests in the background ignores it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        workers: set[int] = set()
        while len(workers) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            workers = children(process.pid)
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 130 and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


# -------------------------------------------------------------------------------- other commits


def compared(monkeypatch: pytest.MonkeyPatch, before: Result, now: Result) -> int:
    @contextmanager
    def fake(ref: str) -> Iterator[Path]:
        yield ROOT

    pairs: Any = [commits.Pair(before, now)]
    monkeypatch.setattr(run, "checkout", fake)
    monkeypatch.setattr(run, "compare", lambda *args: pairs)
    shape = shape_text(SHAPE)
    arguments = ["--op", "marginal_loss", "--base", "HEAD", "--device", "cpu", "--shape", shape]
    return run.main([*arguments, "--marginal", "token", "--providers", "torch"])


def test_a_regression_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result("torch", 10.0, 20.0, 10.0)
    # By round: 1.05, 1.2, 1.2. The machine was slow for both in the second one.
    assert compared(monkeypatch, before, result("torch", 10.5, 24.0, 12.0)) == 1
    assert "ratio 1.200: SLOWER, at most 1.10" in capsys.readouterr().out
    assert compared(monkeypatch, before, result("torch", 10.5, 21.0, 10.5)) == 0
    assert "ratio 1.050: at most 1.10" in capsys.readouterr().out


def test_what_the_other_commit_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = result("torch", status="failed: ImportError: no such op")
    assert compared(monkeypatch, missing, result("torch", 1.0)) == 0
    assert "HEAD: failed: ImportError: no such op; now: ok" in capsys.readouterr().out
    assert compared(monkeypatch, result("torch", 1.0), missing) == 1
    absent = result("triton", status="unavailable: no GPU")
    assert compared(monkeypatch, absent, absent) == 0
    assert "triton: unavailable: no GPU" in capsys.readouterr().out


def test_the_base_is_built_and_takes_turns_with_this_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[str, Path]] = []
    trees: list[list[Path]] = []

    def fake(*command: str, cwd: Path = ROOT, check: bool = True) -> str:
        ran.append((" ".join(command[1:3]), cwd))
        if command[1:3] == ("worktree", "add"):
            (Path(command[4]) / "csrc").mkdir(parents=True)
        return "abc"

    def timed(cases: list[Case], rounds: int, of_each: list[Path]) -> list[Result]:
        trees.append(of_each)
        return [Result(case) for case in cases]

    monkeypatch.setattr(commits, "_run", fake)
    monkeypatch.setattr(commits, "time_cases", timed)
    with commits.checkout("HEAD") as tree:
        (pair,) = commits.compare([result("torch").case], tree, 1)
    assert ("setup.py --quiet", tree) in ran and ran[-1] == ("worktree remove", ROOT)
    assert trees == [[tree, ROOT]] and pair.ratio is None


def test_an_unknown_commit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--op", "doc_scores", "--base", "no-such-ref", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_other_commit_is_built_and_removed() -> None:
    with commits.checkout("HEAD") as tree:
        assert (tree / "fastrag" / "functional.py").exists()
        case = Case("doc_scores", "torch", "forward", (3, 4, 50, 17), "float32", "cpu")
        with Process(tree) as process:
            assert process.ask(eval, "__import__('fastrag').__file__") == (
                "ok",
                str(tree / "fastrag" / "__init__.py"),
            )
            assert process.ask(eval, "__import__('benchmarks').__file__")[1].startswith(str(ROOT))
        assert list((tree / "fastrag").glob("_C*.so"))
        (pair,) = commits.compare([case], tree, 1)
        assert pair.before.ok and pair.now.ok, (pair.before.status, pair.now.status)
        where = subprocess.run(
            ["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True
        )
        assert str(tree) in where.stdout
    where = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True)
    assert str(tree) not in where.stdout and not tree.exists()
