"""Where a run keeps its index and searches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrag.index import FlatIndex
from fastrag.train import checkpoints, run
from tests import tiny

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("index_device", "moved"),
    [("auto", [(GPU, None)]), ("cpu", []), ("stream", [("cpu", GPU)])],
)
def test_index_goes_where_the_config_says(
    monkeypatch: pytest.MonkeyPatch, index_device: str, moved: list[Any]
) -> None:
    model, said = tiny.rag_model(), []

    def moves(self: FlatIndex, device: Any, *, search_device: Any = None) -> None:
        said.append((device, search_device))

    monkeypatch.setattr(FlatIndex, "to", moves)
    monkeypatch.setattr(type(model.passages), "to", lambda self, device: None)
    run._place(model, index_device, GPU)
    assert said == moved


def test_only_a_flat_index_is_streamed() -> None:
    model = tiny.rag_model()
    model.index = object()
    with pytest.raises(ValueError, match=r"index_device: expected 'auto' or 'cpu' .* got 'stream'"):
        run._place(model, "stream", GPU)


def test_a_resumed_index_is_searched_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = tiny.rag_model(), {}
    checkpoints.write_index(model, tmp_path, changing=True, refreshed_at=1)
    index, load = model.index, FlatIndex.load

    def spy(dir: Path, *, search_device: Any = None, **kwargs: Any) -> FlatIndex:
        loaded.update(kwargs, search_device=search_device)
        return load(dir, **kwargs)

    monkeypatch.setattr(FlatIndex, "load", spy)
    monkeypatch.setattr(FlatIndex, "search_device", GPU)
    checkpoints.read_index(model, tmp_path)
    assert model.index is not index
    assert loaded["search_device"] == GPU and loaded["device"] == torch.device("cpu")
