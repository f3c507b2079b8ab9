"""`fastrag warmup`: two folders of encoders that `fastrag train` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrag import TextEncoder
from fastrag.cli import main
from tests.cli.commands import write_files

WORDS = ["warmup", "--corpus", "corpus.jsonl", "--encoder", "encoder", "--out", "warm"]
WORDS += ["--steps", "2", "--batch-size", "4", "--task", "title", "--device", "cpu"]


def test_writes_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    assert main(WORDS) == 0
    shown = capsys.readouterr().out
    for name in ("question_encoder", "passage_encoder"):
        assert f"retriever.{name}: warm/{name}\n" in shown
        assert (tmp_path / "warm" / name / "tokenizer.json").is_file()
    before, one, other = (
        TextEncoder.from_pretrained(folder).model.embeddings.word_embeddings.weight
        for folder in ("encoder", "warm/question_encoder", "warm/passage_encoder")
    )
    assert torch.equal(one, other) and not torch.equal(before, one)
    assert main(WORDS) == 2
    assert "--out: expected a new folder, warm is there already" in capsys.readouterr().err
