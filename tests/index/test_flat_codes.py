"""Codes next to the rows: the answers of a search of the rows, to the bit; made, saved and read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrag import FlatIndex, manifests
from fastrag.index import codes, flat_codes
from fastrag.index.codec import Codec
from fastrag.index.codes import RowCodes
from fastrag.index.flat_changes import load_changes, save_changes
from fastrag.index.flat_files import write_flat
from fastrag.index.storage import MANIFEST
from fastrag.ops import backends

N, D, B, K = 3000, 40, 5, 7


@pytest.fixture(autouse=True)
def codes_for_a_small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "LEAST_NUMBERS", N * D)
    monkeypatch.setattr(codes, "LEAST_ROWS_PER_HIT", 16)


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(N, D) + torch.linspace(-2, 2, D)


@pytest.fixture
def query() -> Tensor:
    return torch.randn(B, D)


def pair(vectors: Tensor) -> tuple[FlatIndex, FlatIndex]:
    made = FlatIndex(D, codes=True), FlatIndex(D, codes=False)
    for index in made:
        index.add(vectors)
    return made


def assert_same(index: FlatIndex, plain: FlatIndex, query: Tensor, **options: Tensor) -> None:
    found, expected = (i.search(query, K, **options) for i in (index, plain))
    assert torch.equal(found.scores.view(torch.int32), expected.scores.view(torch.int32))
    assert torch.equal(found.rows, expected.rows)


def test_through_every_change(vectors: Tensor, query: Tensor, tmp_path: Path) -> None:
    index, plain = pair(vectors)
    assert_same(index, plain, query)
    rows = torch.randperm(N)[:50]
    changed = 3.0 * torch.randn(50, D)  # further out than the codes reach
    for i in (index, plain):
        i.update(rows, changed)
    assert_same(index, plain, query)
    for i in (index, plain):
        i.remove(rows[:20])
    assert_same(index, plain, query)
    assert_same(index, plain, query, exclude=torch.randint(-1, N, (B, 5)))
    for i in (index, plain):
        i.add(changed)
    assert_same(index, plain, query)
    index.save(tmp_path / "index")
    again = FlatIndex.load(tmp_path / "index")
    assert (again.dtype, again.codes) == ("float32", True)
    assert again.checksum() == index.checksum()
    assert_same(again, plain, query)
    fresh = torch.randn(len(index), D)
    for i in (index, plain):
        i.replace(fresh)
    assert_same(index, plain, query)
    assert torch.equal(index.vectors(rows), fresh[rows])
    assert index.scale is None and index.index_emb.dtype == torch.float32


def test_codes_are_used_where_they_pay(
    vectors: Tensor, query: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = pair(vectors)
    asked = []
    search = RowCodes.search
    monkeypatch.setattr(
        RowCodes, "search", lambda self, *args: asked.append(1) or search(self, *args)
    )
    index.search(query, N // codes.LEAST_ROWS_PER_HIT // B + 1)
    assert not asked
    index.search(query[:1], 3)
    assert len(asked) == 1
    small, _ = pair(vectors[:-1])
    small.search(query, 3)
    assert len(asked) == 1


def test_other_backends_search_the_float32_rows(
    vectors: Tensor, query: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, plain = pair(vectors)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    assert_same(index, plain, query)


def test_a_copy_is_independent(vectors: Tensor, query: Tensor) -> None:
    index, plain = pair(vectors)
    index.search(query, 3)  # makes the codes
    other, before = copy.deepcopy(index), copy.deepcopy(plain)
    rows = torch.arange(0, N, 3)
    for i in (other, plain):
        i.update(rows, -vectors[rows])
    assert_same(other, plain, query)
    assert_same(index, before, query)


def test_codes_from_their_arrays(vectors: Tensor, query: Tensor) -> None:
    made = RowCodes(vectors)
    arrays = {name: x.clone() for name, x in made.arrays().items()}
    again = RowCodes.from_arrays(vectors, arrays)
    for x in (made, again):
        for found, expected in zip(
            x.search(query, K, None), made.search(query, K, None), strict=True
        ):
            assert torch.equal(found, expected)
    vectors[7] = 9.0 * vectors[8]
    again.update(torch.tensor([7]))
    for name, x in RowCodes.from_arrays(vectors, again.arrays()).arrays().items():
        assert torch.equal(x, arrays[name]), name  # kept, not copied
    assert not torch.equal(arrays["codes"], made.arrays()["codes"])


def test_astype(vectors: Tensor, query: Tensor) -> None:
    index, plain = pair(vectors)
    assert_same(plain.astype("float32", codes=True), plain, query)
    stored = index.astype("int8")
    assert stored.codes is False and stored.index_emb.dtype == torch.int8


def test_rejects_other_dtypes() -> None:
    with pytest.raises(ValueError, match="codes: expected True with dtype 'float32', False or No"):
        FlatIndex(D, "float16", codes=True)
    with pytest.raises(ValueError, match="got 1 with 'float32'"):
        FlatIndex(D, codes=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact: expected 'float32' with dtype 'int8' and codes"):
        FlatIndex(D, "int8", exact="fp32")


def test_the_older_name_of_codes(vectors: Tensor, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="write codes=True"):
        index = FlatIndex(D, "int8", exact="float32")
    assert (index.dtype, index.codes) == ("float32", True)
    index.add(vectors)
    index.save(tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    for name in ("codes", "row_codes", "manifest_sha256"):
        del manifest[name]
    manifest["files"] = {k: x for k, x in manifest["files"].items() if not k.startswith("codes-")}
    older = manifests.sealed(manifest | {"dtype": "int8", "exact": "float32"})
    manifests.write(tmp_path / "index" / MANIFEST, older)
    again = FlatIndex.load(tmp_path / "index", verify=True)
    assert (again.dtype, again.codes) == ("float32", True)
    assert torch.equal(again.index_emb, vectors)


# ------------------------------------------------------------------- when they are made, and saved


@pytest.fixture
def n_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return how often codes were made so far."""
    if reason := backends.why_not("cpp"):
        pytest.skip(reason)
    made = []

    class Counted(RowCodes):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(flat_codes, "RowCodes", Counted)
    monkeypatch.setattr(flat_codes, "SEARCHES_TO_MAKE", 6)
    monkeypatch.setattr(flat_codes, "QUESTIONS_PER_SEARCH", 2)
    return lambda: len(made)


def test_codes_are_made_when_they_pay(
    vectors: Tensor, query: Tensor, n_made: Callable[[], int]
) -> None:
    index = FlatIndex(D)
    index.add(vectors)
    for n_questions, n in ((1, 0), (5, 0), (1, 0), (1, 1), (5, 1)):  # 1 + 3 + 1 + 1 searches
        index.search(query[:n_questions], 3)
        assert n_made() == n
    index.update(torch.tensor([3]), vectors[:1])
    index.search(query, 3)
    assert n_made() == 1  # an update changes the codes of its rows
    index.replace(-vectors)
    for n_questions, n in ((5, 1), (4, 1), (1, 2)):  # 3 + 2 + 1
        index.search(query[:n_questions], 3)
        assert n_made() == n
    index.replace(vectors)
    index.search(query, N // codes.LEAST_ROWS_PER_HIT // B + 1)  # would not be faster
    for _ in range(5):
        index.search(query[:1], 3)
    assert n_made() == 2
    index.add(vectors[:1])
    for _ in range(5):
        index.search(query[:1], 3)
    assert n_made() == 2


def test_codes_are_made_at_once_or_never(
    vectors: Tensor, query: Tensor, n_made: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, plain = pair(vectors)
    for _ in range(9):
        plain.search(query, 3)
    assert n_made() == 0
    index.search(query, 3)
    assert n_made() == 1
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    default = plain.astype("float32")
    for _ in range(9):
        default.search(query, 3)
    assert n_made() == 1  # torch has no search through codes


@pytest.mark.parametrize("n", [N - 1, N, N + 1])
def test_the_default_is_exact_around_its_limit(
    n: int, query: Tensor, n_made: Callable[[], int], tmp_path: Path
) -> None:
    vectors = torch.randn(n, D).round(decimals=1)  # many ties
    index, plain = FlatIndex(D), FlatIndex(D, codes=False)
    changes: list[Callable[[FlatIndex], Any]] = [
        lambda i: i.add(vectors),
        lambda i: i.update(torch.arange(0, n, 7), -vectors[::7]),
        lambda i: i.remove(torch.arange(5)),
        lambda i: i.replace(vectors.flip(0)),
        lambda i: i.add(vectors[:3]),
    ]
    for change in changes:
        change(index)
        change(plain)
        for _ in range(4):
            assert_same(index, plain, query)
    assert n_made() == (n >= N) * 2 + (n + 3 >= N)
    index.save(tmp_path / "index")
    for mmap in (True, False):
        again = FlatIndex.load(tmp_path / "index", mmap, verify=True)
        assert again.codes is None
        assert_same(again, plain, query)
        for i in (again, plain):
            i.update(torch.tensor([1, n]), vectors[:2])
        assert_same(again, plain, query)


def test_saved_codes_are_read(
    vectors: Tensor, query: Tensor, n_made: Callable[[], int], tmp_path: Path
) -> None:
    index = FlatIndex(D)
    index.add(vectors)
    assert index.settings["reads"] == index.settings["reads_rows"] == 4 * N * D
    index.save(tmp_path / "index")
    assert n_made() == 1
    again = FlatIndex.load(tmp_path / "index")
    assert again.settings == index.settings
    assert N * D < again.settings["reads"] < 2 * N * D
    assert_same(again, index, query)
    for i in (again, index):  # the folder is read-only
        i.update(torch.arange(0, N, 3), -5 * vectors[::3])
    assert_same(again, index, query)
    assert n_made() == 1
    again.save(tmp_path / "again")
    for i in (FlatIndex.load(tmp_path / "again", verify=True), copy.deepcopy(again)):
        assert_same(i, index, query)
    assert FlatIndex.load(tmp_path / "again", codes=False).settings["reads"] == 4 * N * D
    small = FlatIndex(D)
    small.add(vectors[:-1])
    small.save(tmp_path / "again")
    assert not list((tmp_path / "again").glob("codes-*")) and n_made() == 1


def test_a_build_has_the_files_of_a_save(
    vectors: Tensor, n_made: Callable[[], int], tmp_path: Path
) -> None:
    write_flat(
        tmp_path / "built",
        lambda start: vectors[start:].split(700),
        N,
        stored_as=Codec("float32"),
        task={},
    )
    index = FlatIndex(D)
    index.add(vectors)
    index.save(tmp_path / "saved")
    names = [sorted(each.name for each in (tmp_path / d).iterdir()) for d in ("built", "saved")]
    assert names[0] == names[1] and "codes-codes.npy" in names[0]
    for name in names[0]:
        assert (tmp_path / "built" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_checkpoints_of_changes_have_codes(
    vectors: Tensor, query: Tensor, n_made: Callable[[], int], tmp_path: Path
) -> None:
    index, plain = FlatIndex(D), FlatIndex(D, codes=False)
    for i in (index, plain):
        i.add(vectors)
    index.save(tmp_path / "base")
    index.track_changes()
    for i in (index, plain):
        i.update(torch.tensor([8, 2]), 4 * vectors[:2])
    assert save_changes(index, tmp_path / "changes")
    assert not list((tmp_path / "changes").glob("codes-*"))
    again = load_changes(tmp_path / "changes")
    assert_same(again, plain, query)
    assert n_made() == 1


def test_codes_that_are_not_those_of_the_rows_are_refused(
    vectors: Tensor, n_made: Callable[[], int], tmp_path: Path
) -> None:
    for name, x in (("i", vectors), ("other", vectors.flip(0))):
        index = FlatIndex(D)
        index.add(x)
        index.save(tmp_path / name)
    file = tmp_path / "i" / "codes-codes.npy"
    whole = file.read_bytes()
    refused = r"i: codes-codes\.npy: expected the codes of vectors\.npy"
    file.write_bytes((tmp_path / "other" / "codes-codes.npy").read_bytes())
    with pytest.raises(ValueError, match=refused):
        FlatIndex.load(tmp_path / "i")
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"codes-codes\.npy: expected \d+ bytes"):
        FlatIndex.load(tmp_path / "i")
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(
        ValueError, match=r"codes-codes\.npy: expected SHA-256 .* altered in block 0"
    ):
        FlatIndex.load(tmp_path / "i", verify=True)
    file.write_bytes(whole)
    manifest = json.loads((tmp_path / "i" / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    for changes, message in (
        ({"codes": [N, D - 1]}, r"codes-codes\.npy: expected torch.int8 \[3000, 40\], got torch.i"),
        ({"codes": [N + 1, D]}, r"codes-codes\.npy: expected \[3001, 40\], got \[3000, 64\]"),
        ({"gone": [N]}, "expected 'codes-gone' in a fastrag.FlatIndex folder"),
    ):
        shapes = manifest["row_codes"]["shapes"] | changes
        entry = {"row_codes": {"version": flat_codes.VERSION, "shapes": shapes}}
        manifests.write(tmp_path / "i" / MANIFEST, manifests.sealed(manifest | entry))
        with pytest.raises(ValueError, match=message):
            FlatIndex.load(tmp_path / "i")
    entry["row_codes"]["version"] = flat_codes.VERSION + 1  # they are made again
    manifests.write(tmp_path / "i" / MANIFEST, manifests.sealed(manifest | entry))
    assert FlatIndex.load(tmp_path / "i").settings["reads"] == 4 * N * D
