"""Two ranks under DistributedDataParallel give the gradients of one process."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_two_ranks_equal_one(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.ranks", kind, str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
