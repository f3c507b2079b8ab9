"""FlatIndex in every dtype: what is stored, that search is exact for it, and how close it is."""

from __future__ import annotations

import copy
import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag import FlatIndex
from fastrag.index import codec, flat, inputs
from fastrag.ops import backends

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
REDUCED = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
# half a unit in the last place of the numbers that `vectors` gives, which lie within [-8, 8]
ROUNDING = {"float32": 0.0, "float16": 2.0**-9, "bfloat16": 2.0**-6}
DIM = 37  # no multiple of any row's alignment


def vectors(n: int = 60, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Off centre and of unlike widths, as embeddings are; one dimension does not vary."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(dim, generator=generator) + 0.1
    found = torch.randn(n, dim, generator=generator) * width + torch.linspace(-2, 2, dim)
    found[:, dim // 2] = 0.25
    return found.clamp(-8, 8)


def query(n: int = 5, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(7))


def filled(dtype: str, given: torch.Tensor) -> FlatIndex:
    index = FlatIndex(given.shape[1], dtype)
    index.add(given)
    return index


def everything(index: FlatIndex) -> torch.Tensor:
    return index.vectors(torch.arange(len(index)))


def assert_exact(index: FlatIndex, asked: torch.Tensor, k: int, live: torch.Tensor) -> None:
    """The k best by the stored vectors in float64, to the rounding of a float32 product."""
    stored = everything(index).double()
    exact = asked.double() @ stored.T
    bound = 2e-7 * index.dim * (asked.double().abs() @ stored.abs().T).max()
    best = exact.masked_fill(~live, -torch.inf).sort(dim=1, descending=True).values[:, :k]
    scores, rows = index.search(asked, k)
    assert live[rows].all() and (rows.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ((scores.double() - best).abs() <= bound).all()
    assert ((exact.gather(1, rows) - scores.double()).abs() <= bound).all()


@DTYPES
def test_search_is_exact_for_what_is_stored(dtype: str) -> None:
    index = filled(dtype, vectors())
    index.remove(torch.tensor([3, 4]))
    live = torch.ones(60, dtype=torch.bool)
    live[[3, 4]] = False
    assert_exact(index, query(), 10, live)


@REDUCED
def test_search_scores_what_vectors_gives(dtype: str) -> None:
    """Bit for bit, where the order of summation is fixed."""
    if reason := backends.why_not("cpp"):
        pytest.skip(reason)
    index = filled(dtype, vectors(300))
    unpacked = filled("float32", everything(index))
    for found, expected in zip(index.search(query(), 9), unpacked.search(query(), 9), strict=True):
        assert torch.equal(found, expected)


@DTYPES
def test_what_is_stored_is_close(dtype: str) -> None:
    given, index = vectors(), filled(dtype, vectors())
    away = (everything(index) - given).abs()
    if dtype == "int8":
        assert index.scale is not None and index.offset is not None
        torch.testing.assert_close(index.offset, given.double().mean(dim=0).float())
        assert (away <= index.scale * 0.5 + 1e-6).all() and index.n_clamped == 0
        widest = (given - index.offset).abs().amax(dim=0)
        varies = torch.arange(DIM) != DIM // 2
        torch.testing.assert_close(index.scale[varies] * 127, widest[varies])
        assert index.scale[~varies].item() == index.scale.max()  # and later values have room
    else:
        assert index.scale is None and index.offset is None
        assert (away <= ROUNDING[dtype]).all() and (dtype == "float32") == (away.max() == 0)


@DTYPES
@pytest.mark.parametrize("dim", [1, 16, 37, 64])
def test_rows_begin_at_cache_lines(dtype: str, dim: int) -> None:
    index = filled(dtype, vectors(50, dim))
    assert index.index_emb.shape == (50, dim) and index.index_emb.dtype == codec.DTYPES[dtype]
    assert index.pitch % 64 == 0 and 0 <= index.pitch - dim * index.index_emb.itemsize < 64
    assert index.index_emb.stride() == (index.pitch // index.index_emb.itemsize, 1)
    assert index.index_emb.data_ptr() % 64 == 0
    index.add(vectors(50, dim))  # moves what is there
    assert not index._data[:, dim:].any()


@DTYPES
def test_blocks_of_any_kind_are_the_whole(dtype: str, tmp_path, monkeypatch) -> None:
    given = vectors()
    np.save(tmp_path / "v.npy", given.numpy())
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 7 * 4 * DIM)
    whole = filled(dtype, given)
    for same in (
        given.numpy(),
        mapped,
        given.numpy().astype(">f4"),
        given.double(),
        (block for block in given.split(11)),
        [given[:1].numpy(), given[1:]],
    ):
        index = FlatIndex(DIM, dtype)
        assert index.add(same) == range(60)
        assert torch.equal(index.index_emb, whole.index_emb)
        assert index.checksum() == whole.checksum()


@DTYPES
def test_memory_is_bounded_by_a_block(dtype: str, tmp_path, monkeypatch) -> None:
    """No array as large as what is added is ever made beside the index's own."""
    given = vectors(400)
    np.save(tmp_path / "v.npy", given.numpy())
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 8 * 4 * DIM)
    seen = []
    plain = inputs._as_float32
    monkeypatch.setattr(
        inputs, "_as_float32", lambda block, device: seen.append(len(block)) or plain(block, device)
    )
    index = FlatIndex(DIM, dtype)
    index.add(np.load(tmp_path / "v.npy", mmap_mode="r"))
    index.replace(np.load(tmp_path / "v.npy", mmap_mode="r"))
    assert max(seen) == 8 and len(index) == 400


def test_int8_measures_the_first_blocks_of_an_iterable(monkeypatch) -> None:
    monkeypatch.setattr(flat, "SAMPLE_ROWS", 20)
    given = vectors()
    given[40:] *= 3
    index = FlatIndex(DIM, "int8")
    index.add(iter(given.split(10)))
    assert torch.equal(index.index_emb[:20], filled("int8", given[:20]).index_emb)
    beyond = ((given - index.offset) / index.scale).round().abs() > 127
    assert index.n_clamped == int(beyond.sum()) > 0
    assert (index.index_emb[beyond].abs() == 127).all()
    index.update(torch.tensor([0]), torch.full((1, DIM), 1e4))
    assert index.n_clamped == int(beyond.sum()) + DIM
    index.replace(given)
    assert index.n_clamped == 0
    assert torch.equal(index.index_emb, filled("int8", given).index_emb)
    assert torch.equal(everything(index), everything(filled("int8", given)))


def test_int8_keeps_its_scale_when_rows_are_added() -> None:
    index = filled("int8", vectors())
    before = everything(index)
    index.add(5 * vectors(seed=1))
    assert index.n_clamped > 0 and torch.equal(everything(index)[:60], before)
    index.update(torch.tensor([3]), 5 * vectors(1))
    assert torch.equal(everything(index)[:3], before[:3])


def test_int8_of_one_row_leaves_room_for_more() -> None:
    index = FlatIndex(3, "int8")
    index.add(torch.tensor([[0.25, 2.0, -4.1]]))
    assert everything(index).tolist() == torch.tensor([[0.25, 2.0, -4.1]]).tolist()
    index.add(torch.full((1, 3), 1.3))
    assert (everything(index)[1] - 1.3).abs().max() <= 4.1 / 127 + 1e-6 and index.n_clamped == 0
    zero = FlatIndex(2, "int8")
    zero.add(torch.zeros(2, 2))
    assert zero.scale is not None and zero.scale.tolist() == [1.0, 1.0]
    assert zero.search(torch.ones(1, 2), 1).rows.tolist() == [[0]]


def test_int8_is_read_twice() -> None:
    """Blocks that can be read once are kept until then."""
    index = filled("int8", vectors())
    expected = filled("int8", 2 * vectors())
    for blocks in (list, iter):
        index.replace(blocks(2 * block for block in vectors().split(7)))
        assert torch.equal(index.index_emb, expected.index_emb)
    with pytest.raises(ValueError, match="expected 60 rows, got 92 or more"):
        index.replace(iter([*vectors().split(32), vectors()[:32]]))
    assert torch.equal(index.index_emb, filled("int8", 2 * vectors()).index_emb)
    empty = FlatIndex(DIM, "int8")
    empty.add([])
    empty.replace(vectors()[:0])
    assert len(empty) == 0 and empty.search(query(), 2).rows.tolist() == [[-1, -1]] * 5
    assert empty.add(vectors()) == range(60)


@DTYPES
def test_update_and_replace(dtype: str) -> None:
    given = vectors()
    index = filled(dtype, given)
    rows = torch.tensor([50, 0, 7])
    index.update(rows, given[[1, 2, 3]])
    expected = everything(filled(dtype, given))
    expected[rows] = expected[[1, 2, 3]]
    assert torch.equal(everything(index), expected)
    index.replace(given.flip(0))
    assert torch.equal(everything(index), everything(filled(dtype, given.flip(0))))


@DTYPES
def test_a_mapped_index_is_replaced_on_its_disk(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory is allocated for the new vectors, and no file has a name."""
    given, folder = vectors(), tmp_path / "disk" / "index"
    filled(dtype, given).save(folder)
    index = FlatIndex.load(folder)
    expected = everything(filled(dtype, given.flip(0)))
    with monkeypatch.context() as patch:
        patch.delattr(codec, "allocate")
        index.replace(block for block in given.flip(0).split(7))
        assert os.listdir(folder.parent) == ["index"] and index.source is None
        assert torch.equal(everything(index), expected)
        index.replace(given)  # and again
        index.replace(given.flip(0))
    assert_exact(index, query(), 4, torch.ones(60, dtype=torch.bool))
    rows, copied = torch.tensor([50, 0, 7]), copy.deepcopy(index)
    index.update(rows, given[rows])  # which copies all vectors into memory
    assert torch.equal(everything(copied), expected)
    expected[rows] = index._codec.decode(index._codec.encode(given[rows])[0])
    assert torch.equal(everything(index), expected)
    copied.save(folder)
    loaded = FlatIndex.load(folder, verify=True)
    assert loaded.checksum() == copied.checksum() == filled(dtype, given.flip(0)).checksum()


def test_a_disk_without_room_for_the_new_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    filled("float16", vectors()).save(tmp_path / "i")
    index = FlatIndex.load(tmp_path / "i")
    before = index.checksum()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
        with pytest.raises(ValueError, match="expected room for the new vectors, got .*No space"):
            index.replace(2 * vectors())
    assert index.checksum() == before and index.source == tmp_path / "i"

    def refuse(dir: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    index.replace(2 * vectors())  # in memory, as there is no other place
    assert torch.equal(everything(index), everything(filled("float16", 2 * vectors())))


@DTYPES
@pytest.mark.parametrize("target", list(codec.DTYPES))
def test_astype(dtype: str, target: str, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 7 * 4 * DIM)
    index = filled(dtype, vectors())
    index.remove(torch.tensor([5]))
    before = index.checksum()
    made = index.astype(target)
    assert (made.dtype, len(made), made.n_live, made.version) == (target, 60, 59, index.version)
    if target == dtype:
        assert made.checksum() == before
    else:
        straight = filled(target, everything(index))
        assert torch.equal(made.index_emb, straight.index_emb)
    made.update(torch.tensor([1]), torch.zeros(1, DIM))
    made.remove(torch.tensor([2]))
    assert index.checksum() == before and index.n_live == 59
    assert len(FlatIndex(3, dtype).astype(target)) == 0


def test_numbers_beyond_a_dtype_are_refused() -> None:
    given = vectors()
    given[41, 3] = 70000.0
    index = filled("float16", vectors())
    for change in (index.add, index.replace, lambda v: index.update(torch.arange(60), v)):
        with pytest.raises(ValueError, match=r"vectors: .* 65504, .*float16, got 70000 in row 41"):
            change(given)
    with pytest.raises(ValueError, match=r"float16, got 70000 in row 41"):
        filled("float32", given).astype("float16")
    assert torch.equal(index.index_emb, filled("float16", vectors()).index_emb)
    filled("bfloat16", given), filled("int8", given)


@REDUCED
def test_an_error_leaves_the_index_as_it_was(dtype: str) -> None:
    index, bad = filled(dtype, vectors()), vectors(seed=1)
    bad[33, 1] = float("inf")
    before, version = index.checksum(), index.version
    for change in (index.add, index.replace, lambda v: index.update(torch.arange(60), v)):
        with pytest.raises(ValueError, match="vectors: expected finite fp32 numbers, .* row 33"):
            change(bad.split(7) if change != index.replace else bad)
    assert index.checksum() == before and index.version == version and len(index) == 60
    empty = FlatIndex(DIM, dtype)
    with pytest.raises(ValueError, match="row 33"):
        empty.add(bad.split(7))
    assert len(empty) == 0 and empty.scale is None
    assert empty.add(vectors()) == range(60)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_beside_float32_rows_are_refused(dtype: str) -> None:
    message = f"got True with '{dtype}'; int8 codes are the smallest and fastest"
    for make in (
        lambda: FlatIndex(DIM, dtype, codes=True),
        lambda: filled("float32", vectors()).astype(dtype, codes=True),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.data())
def test_int8_is_never_further_off_than_half_a_step(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    rows = data.draw(
        st.lists(st.lists(numbers, min_size=dim, max_size=dim), min_size=n, max_size=n)
    )
    given = torch.tensor(rows)
    index = filled("int8", given)
    assert index.scale is not None and index.offset is not None and index.n_clamped == 0
    away = (everything(index).double() - given.double()).abs()
    rounding = 1e-6 * (given.abs().amax(dim=0).double() + 1e-30)
    assert (away <= index.scale.double() * 0.5 + rounding).all()
