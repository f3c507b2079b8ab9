"""Saved indexes: old formats, damage, full disks, kills, and what is said of them."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrag import FaissIndex, FlatIndex, manifests
from fastrag.index import Index, codec, flat, inputs, saved, storage
from fastrag.index.storage import MANIFEST, write_folder
from tests import tiny

DTYPES = pytest.mark.parametrize("dtype", list(codec.DTYPES))
DIM = 37


def vectors(n: int = 50, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0)) + 0.5


def query(dim: int = DIM) -> torch.Tensor:
    return torch.randn(3, dim, generator=torch.Generator().manual_seed(1))


def filled(dtype: str = "float32", given: torch.Tensor | None = None) -> FlatIndex:
    given = vectors() if given is None else given
    index = FlatIndex(given.shape[1], dtype)
    index.add(given)
    return index


def assert_same(index: FlatIndex, expected: FlatIndex) -> None:
    assert index.checksum() == expected.checksum() and index.version == expected.version
    assert index.n_clamped == expected.n_clamped
    assert torch.equal(index.index_emb, expected.index_emb)
    for found, wanted in zip(index.search(query(), 9), expected.search(query(), 9), strict=True):
        assert torch.equal(found, wanted)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Changes a manifest as whoever writes it would: with its own checksum right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifests.write(folder / MANIFEST, manifests.sealed(manifest | changes))


@DTYPES
@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(dtype: str, mmap: bool, tmp_path: Path) -> None:
    index = filled(dtype)
    index.update(torch.tensor([4]), torch.full((1, DIM), 9.0))  # beyond int8's first sample
    index.remove(torch.tensor([3]))
    checksum = index.checksum()
    index.save(tmp_path / "i")
    assert index.checksum() == checksum
    loaded = FlatIndex.load(tmp_path / "i", mmap=mmap, verify=True)
    assert_same(loaded, index)
    assert loaded.dtype == dtype and loaded.n_live == 49 and loaded.pitch == index.pitch
    assert loaded.index_emb.data_ptr() % 64 == 0
    for each in (loaded, index):
        each.add(vectors()[:2])
        each.update(torch.tensor([0]), torch.zeros(1, DIM))
    assert_same(loaded, index)
    assert FlatIndex.load(tmp_path / "i", verify=True).checksum() == checksum


@DTYPES
def test_an_empty_index(dtype: str, tmp_path: Path) -> None:
    FlatIndex(DIM, dtype).save(tmp_path / "i")
    loaded = FlatIndex.load(tmp_path / "i", verify=True)
    assert len(loaded) == 0 and loaded.search(query(), 2).rows.tolist() == [[-1, -1]] * 3
    loaded.add(vectors())
    assert torch.equal(loaded.index_emb, filled(dtype).index_emb)


def test_the_file_is_a_plain_array(tmp_path: Path) -> None:
    filled("float16").save(tmp_path / "i")
    array = np.load(tmp_path / "i" / "vectors.npy", allow_pickle=False)
    assert array.shape == (50, 64) and array.dtype == np.float16
    np.testing.assert_array_equal(array[:, :DIM], vectors().half().numpy())
    assert not array[:, DIM:].any()
    manifest = json.loads((tmp_path / "i" / MANIFEST).read_text())
    wanted = {"version": 2, "dtype": "float16", "dim": DIM, "pitch": 128, "count": 50}
    assert wanted.items() <= manifest.items()


@pytest.mark.parametrize("dim", [DIM, 16])
@pytest.mark.parametrize("mmap", [True, False])
def test_format_version_1(dim: int, mmap: bool, tmp_path: Path) -> None:
    """float32, rows side by side, as it was written before there were other dtypes."""
    given = vectors(dim=dim)
    head = {"format": flat.FORMAT, "version": 1, "dim": dim, "dtype": "float32"}
    arrays = {"vectors": given.numpy(), "removed": np.array([7])}
    write_folder(tmp_path / "old", arrays, head | {"index_version": 2})
    old = FlatIndex.load(tmp_path / "old", mmap=mmap, verify=True)
    index = filled(given=given)
    index.remove(torch.tensor([7]))
    assert old.checksum() == index.checksum() and old.version == index.version
    assert torch.equal(old.index_emb, given) and old.pitch == 4 * dim
    for found, wanted in zip(old.search(query(dim), 9), index.search(query(dim), 9), strict=True):
        assert torch.equal(found, wanted)
    old.save(tmp_path / "new")
    new = FlatIndex.load(tmp_path / "new", verify=True)
    assert new.checksum() == index.checksum() and new.pitch == index.pitch
    old.add(given[:1])
    assert old.pitch == index.pitch and torch.equal(old.index_emb, torch.cat([given, given[:1]]))


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
    filled().save(tmp_path / "i")
    edit_manifest(tmp_path / "i", version=3)
    with pytest.raises(ValueError, match="expected format version 1 to 2, got 3 .a newer fastrag"):
        FlatIndex.load(tmp_path / "i")
    filled().save(tmp_path / "i")  # and it may be replaced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 65}, r"vectors\.npy: expected float32 \[50, 48\] for float32 vectors of width 65"),
        ({"pitch": 128}, r"expected float32 \[50, 32\] .* width 37, got float32 \[50, 48\]"),
        ({"count": 49}, r"expected float32 \[49, 48\] .*, got float32 \[50, 48\]"),
        ({"dtype": "float16"}, r"expected float16 \[50, 96\] .*, got float32 \[50, 48\]"),
        ({"dtype": "float8"}, "dtype: expected one of float32, .* got 'float8'"),
        ({"dim": -1}, r"manifest\.json: dim: expected a whole number of at least 1, got -1"),
        ({"dim": "37"}, r"manifest\.json: dim: expected a whole number of at least 1, got '37'"),
        ({"index_version": None}, r"manifest\.json: index_version: expected a whole number"),
        ({"exact": "int8"}, r"manifest\.json: exact: expected one of stored, float32, got 'int8'"),
        ({"codes": "yes"}, r"manifest\.json: codes: expected true or false, got 'yes'"),
        ({"pitch": 193}, r"expected float32 \[50, 48\.25\] .*, got float32 \[50, 48\]"),
        ({"n_clamped": []}, r"manifest\.json: n_clamped: expected a whole number"),
    ],
)
def test_manifests_that_do_not_fit_the_files(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    filled().save(tmp_path / "i")
    edit_manifest(tmp_path / "i", **changes)
    with pytest.raises(ValueError, match=message):
        FlatIndex.load(tmp_path / "i")


def test_verify_checks_the_width(tmp_path: Path) -> None:
    """Rows are padded, so that a width that is a little larger fits the file."""
    filled().save(tmp_path / "i")
    edit_manifest(tmp_path / "i", dim=DIM + 1)
    with pytest.raises(ValueError, match="i: expected vectors of width 38 with the SHA-256"):
        FlatIndex.load(tmp_path / "i", verify=True)


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    filled("int8").save(tmp_path / "i")
    manifest = json.loads((tmp_path / "i" / MANIFEST).read_text())
    del manifest["files"]["scale.npy"]
    edit_manifest(tmp_path / "i", files=manifest["files"])
    with pytest.raises(ValueError, match="i: expected 'scale' in a fastrag.FlatIndex folder, got"):
        FlatIndex.load(tmp_path / "i")


@pytest.mark.parametrize("name", ["vectors.npy", "removed.npy", "scale.npy", "offset.npy"])
def test_truncated_files_are_found_before_they_are_mapped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled("int8")
    index.remove(torch.tensor([1]))
    index.save(tmp_path / "i")
    path = tmp_path / "i" / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    mapped = []
    plain = np.memmap
    monkeypatch.setattr(
        np, "memmap", lambda file, *a, **k: mapped.append(file.name) or plain(file, *a, **k)
    )
    with pytest.raises(ValueError, match=rf"{name}: expected {size} bytes, got {size - 1}"):
        FlatIndex.load(tmp_path / "i")
    assert str(path) not in mapped


@DTYPES
def test_verify_names_file_block_and_bytes(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 1000)
    filled(dtype).save(tmp_path / "i")
    path = tmp_path / "i" / "vectors.npy"
    data = bytearray(path.read_bytes())
    data[128 + 2345] ^= 0x40
    path.write_bytes(data)
    FlatIndex.load(tmp_path / "i")
    last = min(128 + 3000, len(data)) - 1
    where = (
        re.escape("vectors.npy: expected SHA-256 ")
        + ".* altered in "
        + re.escape(f"block 2 (bytes 2128 to {last})")
    )
    with pytest.raises(ValueError, match=where):
        FlatIndex.load(tmp_path / "i", verify=True)
    with pytest.raises(ValueError, match=where):
        Index.load(tmp_path / "i", verify=True)


def test_ten_gigabytes_load_without_being_read(tmp_path: Path) -> None:
    """The file is a hole; reading all of it would take longer than all the tests here."""
    dim, count = 768, 3_500_000
    index = FlatIndex(dim)
    index.add(torch.zeros(1, dim))
    index.save(tmp_path / "i")
    manifest = json.loads((tmp_path / "i" / MANIFEST).read_text())
    entry = manifest["files"]["vectors.npy"]
    entry |= {"shape": [count, dim], "bytes": 128 + count * dim * 4}
    edit_manifest(tmp_path / "i", files=manifest["files"], count=count)
    with (tmp_path / "i" / "vectors.npy").open("r+b") as file:
        file.write(storage._header(np.dtype(np.float32), (count, dim)))
        file.truncate(entry["bytes"])
    loaded = FlatIndex.load(tmp_path / "i")
    assert len(loaded) == loaded.n_live == count
    assert loaded.vectors(torch.tensor([0, count - 1])).tolist() == [[0.0] * dim] * 2


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes in all."""

    room = 0

    def write(self, data: Any) -> int:
        n = min(len(memoryview(data).cast("B")), FullDisk.room)
        if n == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        FullDisk.room -= n
        return super().write(memoryview(data).cast("B")[:n])


@pytest.mark.parametrize("kind", ["float32", "int8", "faiss"])
def test_a_full_disk_leaves_the_old_index(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 2000)

    def make(sign: float) -> Any:
        index = FaissIndex(DIM, "SQ8") if kind == "faiss" else FlatIndex(DIM, kind)
        index.add(sign * vectors())
        return index

    old, new = make(1.0), make(-1.0)
    old.save(tmp_path / "i")
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "i").iterdir())
    plain = Path.open

    def limited(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            return io.BufferedWriter(FullDisk(path, "w"))
        return plain(path, mode, *args, **kwargs)

    rooms = [0, 1, 127, 128, 1000, n_bytes // 2, n_bytes - 900, n_bytes - 1]
    for room in rooms:
        FullDisk.room = room
        before, version = new.checksum(), new.version
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", limited)
            with pytest.raises(ValueError, match="No space left on device"):
                new.save(tmp_path / "i")
        assert os.listdir(tmp_path) == ["i"]
        assert type(old).load(tmp_path / "i", verify=True).checksum() == old.checksum()
        assert (new.checksum(), new.version, new.source) == (before, version, None)
    new.save(tmp_path / "i")
    assert type(old).load(tmp_path / "i", verify=True).checksum() == new.checksum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8", "faiss"])
def test_killed_at_fifty_steps_old_or_new_is_whole(kind: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("interruptible_save.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "i"), kind, "50"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == 51
    steps = {each["step"] for each in points}
    assert {"open", "manifest", "synced", "aside", "in", "done", "array removed"} <= steps
    for each in points:
        expected = "new" if each["step"] in ("in", "done", "none") else "old"
        assert each["found"] == expected, each
    assert points[-1]["beside"] == ["i"]


def test_load_an_index_of_any_kind(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    filled("int8").save(tmp_path / "flat")
    faiss_index = FaissIndex(DIM)
    faiss_index.add(vectors())
    faiss_index.save(tmp_path / "faiss")
    assert isinstance(Index.load(tmp_path / "flat"), FlatIndex)
    assert isinstance(Index.load(tmp_path / "faiss", verify=True), FaissIndex)
    write_folder(tmp_path / "other", {}, {"format": "other", "version": 1})
    with pytest.raises(ValueError, match="other: expected an index .*, got 'other'"):
        Index.load(tmp_path / "other")
    with pytest.raises(ValueError, match="no: expected a fastrag index folder, got no such folder"):
        Index.load(tmp_path / "no")
    (tmp_path / "flat").rename(tmp_path / ".flat.old")  # as a save that was killed leaves it
    assert len(Index.load(tmp_path / "flat")) == 50


def test_describe(tmp_path: Path) -> None:
    index = filled("bfloat16")
    index.remove(torch.tensor([1]))
    index.save(tmp_path / "i")
    described = saved.describe(Index.load(tmp_path / "i"))
    size = sum(path.stat().st_size for path in (tmp_path / "i").glob("*.npy"))
    unknown = dict.fromkeys(("encoder", "template", "passage", "corpus", "built"), "not recorded")
    assert list(described)[:6] == [*unknown, "kind"]
    assert described == unknown | {
        "kind": "FlatIndex",
        "dtype": "bfloat16",
        "pitch": 128,
        "clamped": 0,
        "reads": 2 * 50 * DIM,
        "reads_rows": 2 * 50 * DIM,
        "dim": DIM,
        "rows": 50,
        "live": 49,
        "bytes": size,
        "format": "fastrag.FlatIndex 2",
        "version": 2,
        "checksum": index.checksum(),
    }
    store = tiny.store()
    store.origin = {"encoder": "minilm", "corpus": "facts.jsonl", "built": "2026-01-01T00:00:00"}
    origin = store.origin | {"encoder": "minilm at first; the index has changed since"}
    template = {"template": tiny.TEMPLATE.context, "passage": tiny.TEMPLATE.passage}
    assert saved.describe(Index.load(tmp_path / "i"), store) == described | origin | template
    index.remove(torch.tensor([2]))
    with pytest.raises(ValueError, match="index: expected one as it was opened, got one that was"):
        saved.describe(index)


def test_recall() -> None:
    pytest.importorskip("faiss")
    given = vectors(400, 8)
    exact = filled(given=given)
    assert saved.recall(exact, exact, k=5, n_queries=50) == 1.0
    assert saved.recall(exact, filled(given=-given), k=5, n_queries=50) < 0.2
    whole = saved.recall(filled("int8", given), exact, k=5, n_queries=100)
    assert 0.9 < whole <= 1.0
    probing = FaissIndex(8, "IVF16,Flat")
    probing.add(given)
    some = saved.recall(probing, exact, k=5)
    # by hand: the row that the query is from counts for neither
    hits = []
    for each in (probing, exact):
        rows = each.search(given, 6).rows
        keep = rows != torch.arange(400)[:, None]
        hits.append([set(r[m][:5].tolist()) - {-1} for r, m in zip(rows, keep, strict=True)])
    shared = sum(len(a & b) for a, b in zip(*hits, strict=True))
    assert some == pytest.approx(shared / 2000) and some < 1.0
    assert saved.recall(probing, saved.exact_of(probing), k=5) == some  # Flat lists lose nothing


def test_recall_leaves_out_tombstones_of_both() -> None:
    given = vectors(100, 8)
    index, exact = filled(given=given), filled(given=given)
    index.remove(torch.arange(0, 50))
    exact.remove(torch.arange(40, 60))
    assert saved.recall(index, exact, k=39) == 1.0
    with pytest.raises(ValueError, match="k: expected 1 to 39 for 40 live rows, got 40"):
        saved.recall(index, exact, k=40)
    with pytest.raises(ValueError, match="exact: expected 100 vectors of width 8, got 99 of width"):
        saved.recall(index, filled(given=given[:99]))
