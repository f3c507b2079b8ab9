"""Weights are read and written without bars, whatever the caller wants of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

from fastrag.nn import RagModel
from tests import tiny


@pytest.mark.parametrize("wanted", [True, False])
def test_no_bars_for_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], wanted: bool
) -> None:
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
    try:
        tiny.rag_model().save_pretrained(tmp_path / "model", include_index=True)
        RagModel.from_pretrained(tmp_path / "model")
        assert logging.is_progress_bar_enabled() == wanted
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
    assert capfd.readouterr().err == ""
