"""The example of a patched model, on a tiny one: both losses are the same."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.hf.models import rag

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "patch_hf.py"


def test_both_losses_are_printed(tmp_path, monkeypatch, capsys):
    rag(dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path)])
    results = runpy.run_path(str(EXAMPLE), run_name="__main__")["results"]
    theirs, ours = results["transformers"], results["fastrag"]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and 0 < ours[0] < 5 * math.log(tiny.VOCAB)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("peak" in line and " s, " in line for line in lines)
    assert len(EXAMPLE.read_text().splitlines()) <= 50
