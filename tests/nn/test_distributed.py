"""Two ranks train as one process does, with replicated and with sharded weights."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_equal_one(tmp_path, kind, wrapper):
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.ranks", kind, wrapper, str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
