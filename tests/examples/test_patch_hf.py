"""The example of a patched model, on a tiny one: both losses are the same."""

from __future__ import annotations

import math
import re
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
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    line = re.compile(r" *(\w+): loss (\d+\.\d+), \d+\.\d+ s, peak \d+ MiB")
    found = [line.fullmatch(each) for each in capsys.readouterr().out.splitlines()]
    losses = {match[1]: float(match[2]) for match in found if match}
    assert list(losses) == ["transformers", "fastrag"] and len(found) == 2
    assert losses["fastrag"] == pytest.approx(losses["transformers"], abs=1.1e-4)
    assert 0 < losses["fastrag"] < 5 * math.log(tiny.VOCAB)
    assert len(EXAMPLE.read_text().splitlines()) <= 40
