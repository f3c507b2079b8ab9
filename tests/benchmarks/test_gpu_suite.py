"""The suite for a GPU, with pieces that need none: what it survives, what fits, what it writes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import cases, summary, tests
from benchmarks.gpu.isolation import Record, run_isolated, run_limited
from benchmarks.gpu_suite import Step, Suite
from tests.benchmarks import pieces

ROOT = Path(__file__).resolve().parents[2]


def isolated(
    act: dict[str, str], seconds: float = 60.0, **options: Any
) -> tuple[dict[str, Record], list[str]]:
    """Return the records of pieces a, b, ..., and what each process printed."""
    outputs: list[str] = []
    records = run_isolated(
        pieces.act,
        list("abcdefg"),
        time.monotonic() + seconds,
        patience=1.0,
        env={"ACT": json.dumps(act)},
        hear=outputs.append,
        **options,
    )
    return {record.name: record for record in records}, outputs


# ---------------------------------------------------------------------------------------- isolation


def test_the_next_process_continues_after_what_ended_the_last() -> None:
    told: list[tuple[str, str]] = []
    found, outputs = isolated(
        {"b": "crash", "d": "hang", "e": "raise", "f": "lost"},
        tell=lambda record: told.append((record.name, record.outcome)),
    )
    good, bad = dict.fromkeys("acg", "passed"), dict.fromkeys("bdef", "failed")
    assert {name: record.outcome for name, record in found.items()} == good | bad
    assert told == [(name, record.outcome) for name, record in found.items()]
    assert found["a"].text == "said by a"
    assert "code 139: doing b" in found["b"].text
    assert "nothing happened for 1 s\ndoing c\ndoing d" in found["d"].text
    assert found["e"].text == "ValueError: no"
    assert "CUDA is lost to this process: RuntimeError: an illegal" in found["f"].text
    assert outputs == ["doing a\ndoing b", "doing c\ndoing d", "doing e\ndoing f", "doing g"]


def test_what_the_time_does_not_allow_is_listed() -> None:
    found, outputs = isolated({}, seconds=-1.0)
    assert {record.outcome for record in found.values()} == {"not run"} and outputs == []
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    found, _ = isolated({}, seconds=0.3, wrapper=wait)  # so no process is ready
    assert [record.text for record in found.values()] == [
        "the time was over while it ran",
        *["the time was over"] * 6,
    ]
    assert {record.outcome for record in found.values()} == {"not run"}


def test_a_process_that_does_not_start_fails_each_piece() -> None:
    found, outputs = isolated({}, wrapper=[sys.executable, "-c", "exit('no such package')"])
    assert all(record.bad for record in found.values()) and len(found) == 7
    assert "ended with code 1: no such package" in found["a"].text and len(outputs) == 7


def test_a_limit_ends_grandchildren_too(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
        f"open({str(mark)!r}, 'w').write(str(p.pid)); print('said', flush=True); p.wait()"
    )
    ended = run_limited([sys.executable, "-c", code], time.monotonic() + 1.0)
    assert ended.why and ended.output == "said\n" and ended.seconds < 10
    for _ in range(50):
        status = Path(f"/proc/{mark.read_text()}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the grandchild lives")


TESTS = """
import sys
from types import SimpleNamespace
import pytest

pytestmark = getattr(pytest.mark, 'gpu')

def synchronize():
    raise RuntimeError("an illegal memory access was encountered")

def test_good(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.parametrize("what", ["two words"])
def test_fault(what):
    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)
@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass
"""


def test_tests_continue_after_a_fault(tmp_path: Path) -> None:
    """A fault that no test sees belongs to the test which caused it, and to no other."""
    file, broken = tmp_path / "test_some_gpu.py", tmp_path / "test_broken_gpu.py"
    file.write_text(TESTS)
    broken.write_text("import no_such_package")
    limits: dict[str, Any] = {"patience": 30.0, "env": tests.ENV | {"TRITON_INTERPRET": "1"}}
    soon = time.monotonic() + 120
    listed, lost = run_isolated(tests.collect, [str(file), str(broken)], soon, **limits)
    assert lost.bad and "no_such_package" in lost.text
    names = [f"{file}::{name.partition('::')[2]}" for name in json.loads(listed.text)]
    assert len(names) == 4 and listed.outcome == "passed"
    found = run_isolated(tests.run, [*names, f"{file}::test_none"], soon, **limits)
    short = {record.name.partition("::")[2]: record for record in found}
    assert {name: record.outcome for name, record in short.items()} == {
        "test_good": "passed",
        "test_wrong": "failed",
        "test_fault[two words]": "failed",
        "test_skipped": "skipped",
        "test_none": "failed",
    }
    assert "assert 1 == 2" in short["test_wrong"].text
    assert "CUDA is lost" in short["test_fault[two words]"].text
    assert "two GPUs" in short["test_skipped"].text


# --------------------------------------------------------------------------------------------- plan


def test_steps_fail_alone_and_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def step(name: str, run, estimate: float = 0.1, **more: object) -> Step:
        return Step(name, "", run, estimate, 0.5, **more)

    def broken(deadline: float) -> str:
        raise OSError("no such program")

    beside = step("beside", lambda deadline: "ok", background=True)
    steps = [
        step("breaks", broken),
        step("too long", lambda deadline: "ok", estimate=100.0),
        step("limited", lambda deadline: f"{deadline - time.monotonic():.1f}"),
        beside,
    ]
    monkeypatch.setattr(summary, "write", lambda found, complete: seen.append(len(found.done)))
    found = suite(tmp_path)
    found.run(steps, time.monotonic() + 5)
    how = {name: outcome for name, outcome, _ in found.done}
    assert how["breaks"] == "failed: OSError: no such program"
    assert how["too long"].startswith("not run: budget (5 s left, about 100 needed)")
    assert how["limited"] == "0.5" and how["beside"] == "ok"
    assert seen == [1, 2, 3, 4]  # told of each at once


def test_some_of_every_file_come_first() -> None:
    names = ["a::f[1]", "a::f[2]", "a::g", "a::h", "b::f", "c::f", "c::g[x::y]"]
    first, *rest = tests.by_function(names)
    assert first == ["a::f[1]", "a::f[2]"]
    assert rest == [["b::f"], ["c::f"], ["a::g"], ["c::g[x::y]"], ["a::h"]]


# The suite with tests of which the second hangs, and no step that needs a GPU.
SUITE = """
import json, os, sys
from benchmarks import gpu_suite
from benchmarks.gpu import tests
from tests.benchmarks import pieces
os.environ["ACT"] = '{"b": "hang"}'
gpu_suite.missing = lambda: ""
tests.files = lambda: []
tests.by_function = lambda names: [["a", "b", "c"]]
tests.run = pieces.act
sys.exit(gpu_suite.main(["--only", "tests", "mips", "--out", sys.argv[1]]))
"""


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("it never happens")


def of_session(leader: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_known_outlives_the_suite(tmp_path: Path, number: signal.Signals) -> None:
    """Ended from outside in a test that hangs: what ended before it is kept, and no child stays."""
    out = tmp_path / "out"
    suite = subprocess.Popen(
        [sys.executable, "-c", SUITE, str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: "passed" in read(out / "tests.txt"))
        suite.send_signal(number)
        said, _ = suite.communicate(timeout=20)
    finally:
        suite.kill()
        left = of_session(suite.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert "passed" in read(out / "tests.txt")
    if number == signal.SIGKILL:  # what the child has of the session is that it ends with it
        assert len(left) == 1
        return
    assert not left
    assert suite.returncode == 128 + number
    assert (out / "summary.md").read_text() in said
    assert "tests: not all ran: 1 passed, 2 not run" in said
    assert "mips: not run: the suite was stopped" in said


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--dry-run", "--budget-minutes", "8", "--no-build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[2 if " s  " in line[:14] else 1] for line in lines[1:]]
    assert names[:3] == ["environment", "tests", "marginal_loss"]
    assert {"mips", "doc_scores", "token_logp", "memcheck", "racecheck", "tune"} <= set(names)
    assert "build" not in names
    assert any(line.split()[0] == "budget" for line in lines)
    assert gpu_suite.main(["--dry-run", "--only", "mips"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "torch sees no CUDA device" in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_are_found_by_their_mark() -> None:
    found = tests.files()
    kernels = {f"tests/kernels/test_{name}_gpu.py" for name in ("doc_scores", "losses", "mips")}
    assert kernels <= set(found)
    assert all(Path(name).name.startswith("test_") for name in found)
    assert "tests/benchmarks/test_gpu_suite.py" not in found


def test_needs_no_package_that_a_bare_machine_lacks() -> None:
    absent = ("faiss", "datasets", "matplotlib", "usearch", "peft", "bm25s", "hypothesis")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from benchmarks import gpu_suite, run\n"
        "assert gpu_suite.main(['--dry-run']) == 0\n"
        "run.main(['--op', 'marginal_loss', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-regression" in done.stdout


# -------------------------------------------------------------------------------- steps and summary


def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path, rounds=1, jobs=2)


@dataclass(frozen=True)
class FakeBench:
    code: str
    op: str = "fake"
    shapes: tuple[str, ...] = ()
    patience: float = 60.0

    def command(self, rounds: int, path: Path) -> list[str]:
        return [sys.executable, "-c", self.code, str(path)]


HEAD = "op,provider,mode,shape,status"
WRONG = (
    "import sys; open(sys.argv[1], 'w').write("
    f"'{HEAD}\\nfake,triton,token,\"1,2\",wrong: loss\\n'); sys.exit('a foot')"
)
ROWS = (
    "import sys; open(sys.argv[1], 'w').write('op,provider,ms_p50,status\\nfake,ours,1.5,ok\\n')\n"
)


@pytest.mark.parametrize(
    ("code", "said", "broken"),
    [
        (ROWS, "ok: 1 rows", False),
        (ROWS + "sys.exit('ours is wrong')", "failed with code 1, 1 rows: ours is wrong", True),
        (WRONG, "failed with code 1, 1 rows: triton token 1,2 wrong: loss", True),
        (ROWS + "import time; time.sleep(60)", "cut off after 1 s, 1 rows", False),
    ],
    ids=["good", "broken", "wrong", "slow"],
)
def test_rows_that_were_written_are_kept(
    tmp_path: Path, code: str, said: str, broken: bool
) -> None:
    found = suite(tmp_path)
    assert found.benchmark(FakeBench(code), time.monotonic() + 1.0) == said
    assert found.broken == ["fake"] * broken
    assert "\nfake," in (tmp_path / "benchmarks.csv").read_text()


def test_a_benchmark_that_hangs_fails_early(tmp_path: Path) -> None:
    found = suite(tmp_path)
    code = ROWS + "import time; print('timing it', flush=True); time.sleep(60)"
    said = found.benchmark(FakeBench(code, patience=1.0), time.monotonic() + 30.0)
    assert said == "failed: nothing happened for 1 s, 1 rows, then: timing it"
    assert found.broken == ["fake"] and len(found.rows) == 1


def test_cases_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the interpreter one that costs it little."""
    pytest.importorskip("triton")
    for name, value in cases.ENV.items():
        monkeypatch.setenv(name, value)
    assert cases.main("doc_scores gathered") == 0
    assert capsys.readouterr().out == "case: doc_scores gathered\n"
    monkeypatch.setitem(cases.CASES, "breaks", lambda device: torch.zeros(2)[3])
    assert cases.main("breaks") == 1
    assert "failed: breaks: IndexError" in capsys.readouterr().out
    assert gpu_suite.main(["--one-kernel", "nope"]) == 2


RECORDS = [
    Record("tests/a_gpu.py::test_good[x]", "passed", 1.0),
    Record("tests/a_gpu.py::test_bad", "failed", 2.0, "def test():\nE   assert 1 == 2\x1b[0m"),
    Record("tests/a_gpu.py::test_two", "skipped", 0.0, "needs two GPUs"),
    Record("tests/b_gpu.py", "not run", 0.0, "the time was over"),
]


def test_what_is_written(tmp_path: Path) -> None:
    found = suite(tmp_path)
    found.tests = RECORDS
    found.rows = [
        {"op": "mips", "mode": "m", "dtype": "d", "shape": "1,2", "provider": p, "ms_p50": ms,
         "status": status}
        for p, ms, status in (("read", "2.0", "ok"), ("triton", "3.0", "ok"), ("x", "", "wrong: y"))
    ]  # fmt: skip
    found.done = [("tests", "failed: 1", 3.0)]
    text = summary.write(found, complete=True)
    assert text == (tmp_path / "summary.md").read_text()
    assert "- tests: failed: 1 (3 s)" in text
    assert "tests/a_gpu.py::test_bad\n    E   assert 1 == 2" in text
    assert "mips m d 1,2: read 2 (1.00), triton 3 (1.50), x wrong: y" in text
    written = ElementTree.parse(tmp_path / "tests.xml").getroot()
    assert [written.get(key) for key in ("tests", "failures", "skipped")] == ["4", "1", "2"]
    assert [case.get("classname") for case in written][0] == "tests.a_gpu"
    lines = (tmp_path / "tests.txt").read_text().splitlines()
    assert lines[0] == "FAILED tests/a_gpu.py::test_bad"


@pytest.mark.parametrize(
    ("records", "how", "code"),
    [
        (RECORDS[:1], "ok", 0),
        (RECORDS[:2], "failed: 1", 1),
        (RECORDS[2:], "not all ran", 1),
        ([], "not run: budget", 1),
        (RECORDS[:1], "failed: OSError", 1),
    ],
    ids=["passed", "failed", "not run", "no test", "a step"],
)
def test_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[Record], how: str, code: int
) -> None:
    def fake(found: Suite, deadline: float) -> str:
        found.tests = records
        return how

    monkeypatch.setattr(Suite, "run_tests", fake)
    monkeypatch.setattr(gpu_suite, "missing", lambda: "")
    handler = signal.getsignal(signal.SIGTERM)
    assert gpu_suite.main(["--only", "tests", "--out", str(tmp_path / "out")]) == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "out" / "summary.md").read_text().startswith("# GPU suite\n")
