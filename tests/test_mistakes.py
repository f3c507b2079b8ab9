"""Planted mistakes: the quick tests next to a mistake find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mistakes import MISTAKES, Mistake

ROOT = Path(__file__).parents[1]
TESTS_FAILED = 1  # pytest's exit status: tests ran, and some failed


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_piece_of_source(mistake: Mistake) -> None:
    """Who changes the source changes the mistake with it."""
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.right) == 1
    for name in mistake.tests.split():
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found(mistake: Mistake, tmp_path: Path) -> None:
    for folder in ("fastrag", "kernels", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("csrc", "docs", "examples", "benchmarks", "README.md", "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)  # read by some of the tests
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    spoilt = tmp_path / mistake.file
    source = spoilt.read_text(encoding="utf-8")
    spoilt.write_text(source.replace(mistake.right, mistake.wrong), encoding="utf-8")
    options = ("-x", "-q", "-p", "no:cacheprovider", "--timeout=300", "-m", "not slow and not gpu")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *mistake.tests.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == TESTS_FAILED, done.stdout[-3000:]
    assert "failed" in done.stdout.splitlines()[-1], done.stdout[-3000:]
