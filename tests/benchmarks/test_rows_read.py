"""The count of rows that a search through codes reads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastrag._C", reason="the extension is not built")

from benchmarks import rows_read


def test_rows_of_vectors_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    files = {"vectors": (3000, 32), "queries": (5, 32)}
    for name, shape in files.items():
        np.save(tmp_path / f"{name}.npy", generator.standard_normal(shape, np.float32))
    options = [f"--{name}={tmp_path / name}.npy" for name in files]
    assert (
        rows_read.main([*options, "--k", "1", "20", "9999", f"--csv={tmp_path / 'out.csv'}"]) == 0
    )
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["shape"] for row in rows] == ["3000,32,1,5", "3000,32,20,5"]
    few, many = (float(row["rows_read"]) for row in rows)
    assert 1 <= few < many < 3000 and many >= 20
    assert "3000,32,20,5" in capsys.readouterr().out


def test_rows_that_are_equal_are_all_read() -> None:
    vectors = torch.ones(500, 16)
    assert rows_read.count(vectors, torch.ones(2, 16), [3]) == {3: 500.0}
