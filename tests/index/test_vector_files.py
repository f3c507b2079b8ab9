"""Vectors that others made, read by block from each kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastrag import FlatIndex
from fastrag.index.vector_files import VectorFiles, open_vectors

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

VECTORS = np.random.default_rng(0).standard_normal((11, 6), dtype=np.float32)


def write(path: Path, vectors: np.ndarray[Any, Any]) -> Path:
    """Write a file of the kind that its name says."""
    if path.suffix == ".npy":
        np.save(path, vectors)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(vectors), path)
    elif path.suffix == ".safetensors":
        other = torch.zeros(1)
        save_file({"embeddings": torch.from_numpy(vectors), "other": other}, path)
    else:
        datasets.Dataset.from_dict({"embeddings": list(vectors)}).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.safetensors", "dataset"])
def test_every_kind_is_read_by_block_from_any_row(tmp_path: Path, name: str) -> None:
    vectors = VectorFiles([write(tmp_path / name, VECTORS), write(tmp_path / "b.npy", -VECTORS)])
    both = np.concatenate([VECTORS, -VECTORS])
    assert (len(vectors), vectors.dim) == (22, 6)
    for start in (0, 3, 10, 11, 15, 22):
        blocks = [np.asarray(block) for block in vectors.blocks(start, 4)]
        assert all(len(block) <= 4 for block in blocks)
        np.testing.assert_array_equal(np.concatenate([*blocks, both[:0]]), both[start:])
    index = FlatIndex(6)
    index.add(vectors.blocks())
    np.testing.assert_array_equal(index.index_emb.numpy(), both)
    before = vectors.fingerprint()
    assert before == VectorFiles([tmp_path / name, tmp_path / "b.npy"]).fingerprint()
    write(tmp_path / "b.npy", VECTORS)
    assert vectors.fingerprint() != before


def test_files_that_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    torch.save({"code": Path}, tmp_path / "code.pt")
    torch.save(3, tmp_path / "three.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.npy", VECTORS)
    write(tmp_path / "flat.npy", VECTORS[0])
    write(tmp_path / "wide.npy", np.zeros((3, 7), np.float32))
    write(tmp_path / "dataset", VECTORS)
    write(tmp_path / "two.safetensors", VECTORS)
    for names, column, message in (
        (["x.pkl"], "embeddings", r"expected files ending in \.npy, .*got .*x\.pkl; of a pickle"),
        (["none.npy"], "embeddings", r"expected an array \[n, D\] in .*none\.npy: no such file"),
        (["objects.npy"], "embeddings", "in .*objects.npy: .*Python objects"),
        (["code.pt"], "embeddings", "in .*code.pt: .*[Ww]eights.?only"),
        (["three.pt"], "embeddings", "in .*three.pt: expected a tensor, got int"),
        (["empty.safetensors"], "embeddings", "in .*empty.safetensors: "),
        (["two.safetensors"], "x", "expected 'x' or one array, got"),
        (["folder"], "embeddings", "expected a folder of save_to_disk"),
        (["dataset"], "x", r"one split with the column 'x' in .*, got \['embeddings'\]"),
        (["flat.npy"], "embeddings", r"expected arrays \[n, D\] of one width, got \[\[6\]\]"),
        (["a.npy", "wide.npy"], "embeddings", r"one width, got \[\[11, 6\], \[3, 7\]\]"),
        ([], "embeddings", r"expected arrays \[n, D\] of one width, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            open_vectors([tmp_path / name for name in names], column)
