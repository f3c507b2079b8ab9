"""Ctrl-C, kill and SIGKILL at named steps of a real process; the run then resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrag.train.callbacks import read_metrics
from fastrag.train.checkpoint_contents import check_files
from fastrag.train.checkpoints import MANIFEST, checkpoints
from fastrag.train.signals import SignalGuard, TrainingInterrupted
from tests.train import interruptible_run

SCRIPT = Path(__file__).with_name("interruptible_run.py")
ROOT = Path(__file__).parents[2]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)},
    )


def wait_for_marker(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "marker").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(folder: Path) -> list[float]:
    return [each["loss"] for each in read_metrics(folder / "metrics.jsonl") if "loss" in each]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert interruptible_run.main([str(folder)]) == 0
    assert len(losses(folder)) == 8
    return losses(folder)


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_signal_saves_after_the_step_and_resumes(
    tmp_path: Path, whole_run: list[float], signum: signal.Signals, code: int
) -> None:
    process = start(tmp_path, "--marker-step", "5")
    wait_for_marker(process, tmp_path)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    last = out.strip().splitlines()[-1]
    assert last == f"interrupted by {signum.name} after step 5; resume from {tmp_path}/checkpoint-5"
    assert "Traceback" not in err
    assert checkpoints(tmp_path)[-1].name == "checkpoint-5"
    assert losses(tmp_path) == whole_run[:5]
    assert interruptible_run.main([str(tmp_path), "--resume"]) == 0
    assert losses(tmp_path) == whole_run


@pytest.mark.slow
def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "--hang-in-save", "6")
    wait_for_marker(process, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "KeyboardInterrupt" in err
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--marker-step", "5"), id="in-step", marks=pytest.mark.slow),
        pytest.param(("--hang-in-save", "6"), id="in-save"),
    ],
)
def test_sigkill_leaves_the_last_complete_checkpoint(
    tmp_path: Path, whole_run: list[float], options: tuple[str, str]
) -> None:
    process = start(tmp_path, *options)
    wait_for_marker(process, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    (tmp_path / "marker").unlink()
    assert interruptible_run.main([str(tmp_path), "--resume"]) == 0
    assert losses(tmp_path) == whole_run
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(tmp_path), "--signal-rank", "1", "--steps", "20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "interrupted by SIGTERM after step 8" in done.stdout, done.stderr
    last = checkpoints(tmp_path)[-1]
    assert last.name == "checkpoint-8"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last.iterdir()}
    manifest = json.loads((last / MANIFEST).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= manifest["files"].keys()
    check_files(last)
    assert len(losses(tmp_path)) == 8


def test_guard_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalGuard() as guard:
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_interruption_says_how_to_go_on() -> None:
    interrupted = TrainingInterrupted(signal.SIGINT, 7, None)
    assert interrupted.exit_code == 130
    assert str(interrupted) == "interrupted by SIGINT after step 7; nothing was saved"
    assert isinstance(interrupted, KeyboardInterrupt)
