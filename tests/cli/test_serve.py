"""`fastrag serve` on a run that is still training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastrag.serve.source import Source
from tests.serve.live import serving


def test_the_newest_checkpoint_of_a_run_is_served(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each later one takes its place, and in the end the model."""
    monkeypatch.chdir(project)
    shutil.copytree("run", tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "checkpoint-3"):
        (tmp_path / "whole" / name).rename(run / name)
    with serving(Source(model=str(run), retrieval_only=True)) as live:
        for name in ("checkpoint-3", "checkpoint-6", "model"):
            if name != "checkpoint-3":
                (tmp_path / "whole" / name).rename(run / name)
                assert live.reload()
            folder = live.service.served.folder
            assert folder is not None and folder.name == name
            assert not live.reload()
            status, found = live.post("/retrieve", queries=["ada"], topk=1)
            assert status == 200 and found["result"][0][0]["id"].startswith("p")
