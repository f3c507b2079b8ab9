"""A project folder with a finished run, made once for all commands."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from fastrag.cli import main
from tests.cli.commands import write_files


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files, an index, and a finished run."""
    folder = tmp_path_factory.mktemp("project")
    write_files(folder)
    parts = ("--encoder", "encoder", "--generator", "generator", "--device", "cpu")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["index", "build", "--corpus", "corpus.jsonl", *parts, "--out", "idx"]) == 0
        assert printed.getvalue() == "idx: 12 passages, 16 dimensions\n"
        assert main(["train", "train.yaml"]) == 0
    assert "model: run/model" in printed.getvalue() and "recall@1" in printed.getvalue()
    (folder / "plain" / "model").mkdir(parents=True)  # a run without checkpoints
    return folder
