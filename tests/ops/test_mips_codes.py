"""The search of float32 rows through their int8 codes has the answers of the plain search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrag.functional as F
from fastrag.ops import backends

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")

from fastrag.ops.cpp import CodedIndex  # noqa: E402

ISAS = _C.instruction_sets(emulated=True)
each_isa = pytest.mark.parametrize("isa", _C.instruction_sets())


def coded(index: Tensor, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes over the range of each component, or over a part of it with the rest clamped."""
    low, high = index.amin(0), index.amax(0)
    scale, offset = ((high - low) * spread / 254).clamp(min=1e-12), (low + high) / 2
    codes = ((index - offset) / scale).round().clamp(-127, 127).to(torch.int8)
    return codes, scale, offset


def check(
    query: Tensor, index: Tensor, k: int, exclude: Tensor | None, gap: int = 0, spread: float = 1.0
) -> None:
    codes, *factors = coded(index, spread)
    room = torch.full((len(index), index.shape[1] + gap), 127, dtype=torch.int8)
    room[:, : index.shape[1]] = codes
    found = CodedIndex(index, room[:, : index.shape[1]], *factors).search(query, k, exclude)
    expected = F.mips_topk(query, index, k, exclude=exclude)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_equals_the_plain_search(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 90))
    n_queries, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query = torch.randn(n_queries, dim, generator=generator)
    index = torch.randn(n, dim, generator=generator)
    if data.draw(st.booleans()):  # ties, also of whole rows
        query, index = query.round(), (2 * index).round()
    exclude = None
    how = data.draw(st.sampled_from(["none", "rows", "mask"]))
    if how == "rows":
        exclude = torch.randint(-1, n, (n_queries, 3), generator=generator)
    elif how == "mask":
        exclude = torch.rand(n, generator=generator) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ISA_VARIABLE, data.draw(st.sampled_from(ISAS)))
        check(query, index, k, exclude, spread=data.draw(st.sampled_from([1.0, 0.3])))


KINDS = ["gauss", "off centre", "outlier", "equal", "same score", "denormal", "zero query"]


def of_a_kind(kind: str, query: Tensor, index: Tensor) -> None:
    if kind == "off centre":
        index += 30 * torch.randn(index.shape[1])
    elif kind == "outlier":
        index[len(index) // 2] *= 100
    elif kind == "equal":
        index[:] = index[0].clone()
    elif kind == "same score":
        index[:, ::2], query[:, 1::2] = 0.5, 0
    elif kind == "denormal":
        index *= 1e-40
    elif kind == "zero query":
        query[-1] = 0


@each_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_queries", [1, 40])
def test_kinds_of_rows(
    isa: str, kind: str, n_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)
    query, index = torch.randn(n_queries, 64), torch.randn(6000, 64)
    of_a_kind(kind, query, index)
    check(query, index, 7, None)
    check(query, index, 300, None)


@each_isa
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_few_queries(isa: str, data: st.DataObject) -> None:
    """Whole vectors of codes are read, also where a row ends before: the rest must not count."""
    n, dim = data.draw(st.sampled_from([1, 5, 20, 130, 1500])), data.draw(st.integers(1, 200))
    n_queries, gap = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 70]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query = torch.randn(n_queries, dim, generator=generator)
    index = torch.randn(n, dim, generator=generator)
    of_a_kind(data.draw(st.sampled_from(KINDS)), query, index)
    mask = torch.rand(n, generator=generator) < 0.3 if data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ISA_VARIABLE, isa)
        check(query, index, data.draw(st.sampled_from([1, 4, 40])), mask, gap=gap)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_tile_registers(data: st.DataObject) -> None:
    """Numbers of rows, components and queries around those of the registers of AMX."""
    n, dim = data.draw(st.sampled_from([1, 16, 33, 64, 300])), data.draw(st.integers(1, 200))
    n_queries, gap = data.draw(st.integers(9, 70)), data.draw(st.sampled_from([0, 1, 70]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query = torch.randn(n_queries, dim, generator=generator)
    index = torch.randn(n, dim, generator=generator)
    of_a_kind(data.draw(st.sampled_from(KINDS)), query, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ISA_VARIABLE, "amx-emulated")
        check(query, index, data.draw(st.sampled_from([1, 4, 40])), None, gap=gap)


@pytest.mark.parametrize("isa", ISAS)
def test_what_two_digits_lose(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that both digits round to zero decide: the first two weights set the units."""
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)
    index = (torch.randint(0, 2, (2000, 96)) * 254 - 127).float()
    index[:, 0], index[:, 1] = 0, 10 * (torch.arange(2000) % 2)
    index[1000, 2:] = 127
    query = torch.full((1, 96), 0.0015)
    query[0, :2] = torch.tensor([127.0, 0.5])
    made = CodedIndex(index, index.to(torch.int8), torch.ones(96), torch.zeros(96))
    assert made.search(query, 1)[1].item() == 1000


@pytest.mark.parametrize("isa", ISAS)
def test_second_digits_leave_fewer_rows(isa: str) -> None:
    """With a scale of 1 and whole numbers, codes lose nothing and two digits nearly nothing."""
    index = torch.randint(-127, 128, (20000, 96)).float()
    query = torch.randn(1, 96)
    made = CodedIndex(index, index.to(torch.int8), torch.ones(96), torch.zeros(96))
    answer = {"scores": torch.empty(1, 2).numpy(), "rows": torch.empty(1, 2).long().numpy()}
    seen, _ = _C.mips_topk_by_codes(query.numpy(), **made.arrays(), **answer, isa=isa)
    assert 2 <= seen <= 2 * 2 + 64


def test_wide_rows() -> None:
    """Sums of whole numbers beyond 2^24, which float32 rounds."""
    index = torch.randn(300, 3000).sign() * (1 + 1e-3 * torch.rand(300, 3000))
    check(index[:20].clone(), index, 3, None)


@pytest.mark.parametrize("isa", ISAS)
def test_looks_at_few_rows(isa: str) -> None:
    query, index = torch.randn(32, 128), torch.randn(20000, 128)
    made = CodedIndex(index, *coded(index))
    answer = {"scores": torch.empty(32, 10).numpy(), "rows": torch.empty(32, 10).long().numpy()}
    seen, _ = _C.mips_topk_by_codes(query.numpy(), **made.arrays(), **answer, isa=isa)
    assert 32 * 10 <= seen <= 32 * 20000 / 20


def test_rejects_what_is_not_finite() -> None:
    index = torch.randn(50, 8)
    codes = coded(index)
    index[17, 3] = torch.nan
    with pytest.raises(ValueError, match="index_emb: .* NaN or infinity in row 17$"):
        CodedIndex(index, *codes)
    made = CodedIndex(torch.randn(50, 8), *codes)
    with pytest.raises(ValueError, match="query_emb: .* NaN or infinity in row 1$"):
        made.search(torch.tensor([[0.0] * 8, [torch.inf] * 8]), 2)


def test_rejects_other_shapes() -> None:
    index = torch.randn(50, 8)
    codes, scale, offset = coded(index)
    with pytest.raises(ValueError, match="codes: expected 50 rows, got 49"):
        CodedIndex(index, codes[:49], scale, offset)
    with pytest.raises(ValueError, match=r"index_emb: expected float32 \[n, 7\], got .* \[50, 8\]"):
        CodedIndex(index, codes[:, :7], scale[:7], offset[:7])
    with pytest.raises(ValueError, match="query_emb: expected 8 numbers each, got 7"):
        CodedIndex(index, codes, scale, offset).search(torch.randn(2, 7), 1)
