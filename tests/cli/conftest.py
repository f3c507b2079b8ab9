"""A project folder with a finished run, made once for all commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import fastrag, write_files


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files, an index, and a finished run."""
    folder = tmp_path_factory.mktemp("project")
    write_files(folder)
    parts = ("--encoder", "encoder", "--generator", "generator", "--device", "cpu")
    built = fastrag(folder, "index", "build", "--corpus", "corpus.jsonl", *parts, "--out", "idx")
    assert built.returncode == 0, built.stderr
    assert built.stdout == "idx: 12 passages, 16 dimensions\n"
    trained = fastrag(folder, "train", "train.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "model: run/model" in trained.stdout and "recall@1" in trained.stdout
    (folder / "plain" / "model").mkdir(parents=True)  # a run without checkpoints
    return folder
