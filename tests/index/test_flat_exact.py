"""int8 with exact="float32": the answers of a float32 index, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrag import FlatIndex
from fastrag.index import codes
from fastrag.index.codes import RowCodes
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
    made = FlatIndex(D, "int8", exact="float32"), FlatIndex(D)
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
    assert (again.dtype, again.exact) == ("int8", "float32")
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
    assert_same(plain.astype("int8", exact="float32"), plain, query)
    stored = index.astype("int8")
    assert stored.exact == "stored" and stored.index_emb.dtype == torch.int8


def test_rejects_other_dtypes() -> None:
    message = "exact: expected 'stored', or 'float32' with dtype 'int8', got 'float32' with 'flo"
    with pytest.raises(ValueError, match=message):
        FlatIndex(D, "float16", exact="float32")
    with pytest.raises(ValueError, match="got 'fp32' with 'int8'"):
        FlatIndex(D, "int8", exact="fp32")
