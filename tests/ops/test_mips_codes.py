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

from fastrag.ops.cpp_mips import CodedIndex  # noqa: E402

each_isa = pytest.mark.parametrize("isa", _C.instruction_sets())


def coded(index: Tensor, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes over the range of each component, or over a part of it with the rest clamped."""
    low, high = index.amin(0), index.amax(0)
    scale, offset = ((high - low) * spread / 254).clamp(min=1e-12), (low + high) / 2
    codes = ((index - offset) / scale).round().clamp(-127, 127).to(torch.int8)
    return codes, scale, offset


def check(query: Tensor, index: Tensor, k: int, exclude: Tensor | None, **options: float) -> None:
    found = CodedIndex(index, *coded(index, **options)).search(query, k, exclude)
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
        patch.setenv(backends.ISA_VARIABLE, data.draw(st.sampled_from(_C.instruction_sets())))
        check(query, index, k, exclude, spread=data.draw(st.sampled_from([1.0, 0.3])))


@each_isa
@pytest.mark.parametrize("kind", ["gauss", "off centre", "outlier", "equal", "zero query"])
def test_kinds_of_rows(isa: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)
    query, index = torch.randn(40, 64), torch.randn(6000, 64)
    if kind == "off centre":
        index += 30 * torch.randn(64)
    elif kind == "outlier":
        index[100] *= 100
    elif kind == "equal":
        index[:] = index[0]
    elif kind == "zero query":
        query[3] = 0
    check(query, index, 7, None)
    check(query, index, 300, None)


def test_wide_rows() -> None:
    """Sums of whole numbers beyond 2^24, which float32 rounds."""
    index = torch.randn(300, 3000).sign() * (1 + 1e-3 * torch.rand(300, 3000))
    check(index[:20].clone(), index, 3, None)


@each_isa
def test_looks_at_few_rows(isa: str) -> None:
    query, index = torch.randn(32, 128), torch.randn(20000, 128)
    made = CodedIndex(index, *coded(index))
    answer = {"scores": torch.empty(32, 10).numpy(), "rows": torch.empty(32, 10).long().numpy()}
    seen = _C.mips_topk_by_codes(query.numpy(), **made.arrays(), **answer, isa=isa)
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
