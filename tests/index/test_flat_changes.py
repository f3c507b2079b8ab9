"""The rows in which an index differs from a saved one are all that a copy of it needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrag.index import FlatIndex
from fastrag.index.flat_changes import load_changes, save_changes

N, D = 40, 6
ROWS = torch.tensor([31, 2, 17])


def vectors(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tracked(request: pytest.FixtureRequest, tmp_path: Path) -> FlatIndex:
    """An index from a folder, three rows of which have changed since and one of which is gone."""
    settings: dict[str, Any] = getattr(request, "param", {})
    made = FlatIndex(D, **settings)
    made.add(vectors(N, 0))
    made.passages_checksum = "p"
    made.save(tmp_path / "base")
    index = FlatIndex.load(tmp_path / "base")
    index.track_changes()
    index.update(ROWS, vectors(3, 1))
    index.remove(torch.tensor([5]))
    return index


@pytest.mark.parametrize(
    "tracked",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
        {"codes": True},
    ],
    indirect=True,
    ids=["float32", "bfloat16", "int8", "float32 with codes"],
)
def test_changes_and_base_make_the_index(tracked: FlatIndex, tmp_path: Path) -> None:
    assert save_changes(tracked, tmp_path / "changes")
    assert np.load(tmp_path / "changes" / "rows.npy").tolist() == sorted(ROWS.tolist())
    found = load_changes(tmp_path / "changes")
    assert torch.equal(found.index_emb, tracked.index_emb)
    assert torch.equal(found.removed, tracked.removed)
    assert found.checksum() == tracked.checksum()
    for name in ("version", "settings", "passages_checksum", "n_live"):
        assert getattr(found, name) == getattr(tracked, name), name
    query = vectors(4, 2)
    for one, other in zip(found.search(query, 5), tracked.search(query, 5), strict=True):
        assert torch.equal(one, other)


def test_changes_stay_relative_to_the_base(tracked: FlatIndex, tmp_path: Path) -> None:
    """Also after loading them; the folder that they were loaded from may be deleted."""
    assert save_changes(tracked, tmp_path / "changes")
    index = load_changes(tmp_path / "changes")
    index.track_changes()
    index.update(torch.tensor([2, 8]), vectors(2, 3))
    shutil.rmtree(tmp_path / "changes")
    assert save_changes(index, tmp_path / "more")
    assert np.load(tmp_path / "more" / "rows.npy").tolist() == [2, 8, 17, 31]
    assert torch.equal(load_changes(tmp_path / "more").index_emb, index.index_emb)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(torch.arange(N // 2 + 1), vectors(N // 2 + 1, 4)),
        lambda index: index.replace(vectors(N, 4)),
        lambda index: index.add(vectors(1, 4)),
    ],
    ids=["most rows", "all replaced", "a row added"],
)
def test_many_changes_are_no_changes(
    tracked: FlatIndex, tmp_path: Path, change: Callable[[FlatIndex], object]
) -> None:
    change(tracked)
    assert not save_changes(tracked, tmp_path / "changes")
    assert not (tmp_path / "changes").exists()


def test_an_index_of_no_folder_has_no_base(tmp_path: Path) -> None:
    index = FlatIndex(D)
    index.add(vectors(N, 0))
    index.track_changes()
    index.update(ROWS, vectors(3, 1))
    assert not save_changes(index, tmp_path / "changes")


def test_a_base_that_was_replaced_is_refused(tracked: FlatIndex, tmp_path: Path) -> None:
    """When changes are loaded; when they are to be saved, a whole copy is called for, once."""
    assert save_changes(tracked, tmp_path / "changes")
    FlatIndex.load(tmp_path / "base").astype("float16").save(tmp_path / "base")
    with pytest.raises(ValueError, match="changes: expected the index in .*base, of which .* got "):
        load_changes(tmp_path / "changes")
    with pytest.warns(UserWarning, match=r"base: expected the index as it was loaded, checksum"):
        assert not save_changes(tracked, tmp_path / "again")
    assert not save_changes(tracked, tmp_path / "again")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"changes: .*base: .*got no such folder"):
        load_changes(tmp_path / "changes")


def test_one_bit_anywhere_is_found(tracked: FlatIndex, tmp_path: Path) -> None:
    assert save_changes(tracked, tmp_path / "changes")
    for file in [*(tmp_path / "changes").iterdir(), *(tmp_path / "base").iterdir()]:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=file.name):
            load_changes(tmp_path / "changes")
        file.write_bytes(whole)
    load_changes(tmp_path / "changes")


def test_base_and_changes_move_together(tracked: FlatIndex, tmp_path: Path) -> None:
    os.mkdir(tmp_path / "run")
    shutil.move(tmp_path / "base", tmp_path / "run" / "base")
    index = FlatIndex.load(tmp_path / "run" / "base")
    index.track_changes()
    index.update(ROWS, vectors(3, 1))
    assert save_changes(index, tmp_path / "run" / "checkpoint" / "index")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    found = load_changes(tmp_path / "moved" / "checkpoint" / "index")
    assert torch.equal(found.index_emb, index.index_emb)
