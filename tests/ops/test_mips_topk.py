from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends
from fastrag.ops.mips_topk import mips_topk


@pytest.fixture(
    params=["", "3000", "1", "cpp"],
    ids=["torch, one block", "torch, some", "torch, row by row", "cpp where it can"],
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpp":
        if reason := backends.why_not("cpp"):
            pytest.skip(reason)
    else:
        monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
        monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", request.param)


def whole_numbers(n: int, width: int = 6, high: int = 3) -> Tensor:
    """Small whole numbers: every inner product is exact, and ties abound."""
    return torch.randint(-high, high + 1, (n, width)).float()


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 5, 60, 70])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_against_the_full_matrix(k: int, dtype: torch.dtype, backend: None) -> None:
    query, index = whole_numbers(4).to(dtype), whole_numbers(60).to(dtype)
    same(F.mips_topk(query, index, k), reference.mips_topk(query, index, k))


@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
def test_codes(with_offset: bool, backend: None) -> None:
    query, codes = whole_numbers(4), whole_numbers(60).to(torch.int8)
    scale, offset = 2.0 ** torch.arange(-2, 4), torch.arange(6).float()
    factors = {"scale": scale, "offset": offset if with_offset else None}
    expected = reference.mips_topk(query, codes, 7, **factors)
    same(F.mips_topk(query, codes, 7, **factors), expected)
    same(F.mips_topk(query.double(), codes, 7, **factors), expected)


def test_real_numbers(backend: None) -> None:
    query, index = torch.randn(7, 33), torch.randn(200, 33)
    scores, rows = F.mips_topk(query, index, 9)
    expected = reference.mips_topk(query.double(), index.double(), 9)
    assert torch.equal(rows, expected[1])
    torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "mask", "everything"])
def test_exclude(kind: str, backend: None) -> None:
    query, index = whole_numbers(4), whole_numbers(30)
    if kind == "rows":
        exclude = torch.randint(-1, 30, (4, 12))
    else:
        exclude = torch.rand(30) < (0.5 if kind == "mask" else 2.0)
    same(F.mips_topk(query, index, 8, exclude=exclude),
         reference.mips_topk(query, index, 8, exclude))  # fmt: skip


def test_ties_go_to_the_lowest_row(backend: None) -> None:
    index = torch.ones(50, 3)
    index[20] = 2.0
    _, rows = F.mips_topk(torch.ones(2, 3), index, 4)
    assert rows.tolist() == [[20, 0, 1, 2]] * 2


def test_both_zeros_tie(backend: None) -> None:
    """float64 products that round to -0.0 in float32 equal those that are 0."""
    index = torch.tensor([[-1e-300], [0.0], [-1e-300], [-1.0]], dtype=torch.float64)
    scores, rows = F.mips_topk(torch.ones(1, 1, dtype=torch.float64), index, 4)
    assert rows.tolist() == [[0, 1, 2, 3]] and scores[0, :3].eq(0).all()


def test_fewer_rows_than_k(backend: None) -> None:
    scores, rows = F.mips_topk(torch.ones(1, 2), torch.ones(2, 2), 4)
    assert rows.tolist() == [[0, 1, -1, -1]]
    assert scores.tolist() == [[2.0, 2.0, -torch.inf, -torch.inf]]


def test_batch_of_one_and_strides(backend: None) -> None:
    query, index = whole_numbers(5), whole_numbers(40)
    expected = F.mips_topk(query, index, 6)
    strided = [x.t().contiguous().t() for x in (query, index)]
    same(F.mips_topk(*strided, 6), expected)
    wide = [torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1:-2] for x in (query, index)]
    same(F.mips_topk(*wide, 6), expected)
    rows = F.mips_topk(query, index[:1].expand(40, -1), 6)[1]
    assert torch.equal(rows, torch.arange(6).expand(5, -1))
    for b in range(5):
        same(F.mips_topk(query[b : b + 1], index, 6), tuple(x[b : b + 1] for x in expected))


def test_under_autocast(backend: None) -> None:
    query, index = torch.randn(7, 33), torch.randn(200, 33)
    expected = F.mips_topk(query, index, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(F.mips_topk(query, index, 9), expected)


def test_no_gradient() -> None:
    query = torch.randn(2, 3, requires_grad=True)
    assert not F.mips_topk(query, torch.randn(5, 3), 2)[0].requires_grad


def test_opcheck_and_compile() -> None:
    query, index = whole_numbers(3), whole_numbers(20)
    torch.library.opcheck(mips_topk, (query, index, 4, None))
    torch.library.opcheck(mips_topk, (query, index.to(torch.int8), 4, None, torch.ones(6), None))
    compiled = torch.compile(F.mips_topk, fullgraph=True, backend="aot_eager")
    same(compiled(query, index, 4), F.mips_topk(query, index, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_names_the_row_that_is_not_finite(bad: float, backend: None) -> None:
    query, index = whole_numbers(3), whole_numbers(20)
    index[13, 2] = bad
    with pytest.raises(ValueError, match="index_emb: .* got NaN or infinity in row 13"):
        F.mips_topk(query, index, 4)
    with pytest.raises(ValueError, match="query_emb: .* got NaN or infinity in row 13"):
        F.mips_topk(index, query, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_names_an_overflow(dtype: torch.dtype, backend: None) -> None:
    """A score of -inf would be taken for a missing passage, also where only float32 overflows."""
    index = torch.tensor([[1.0], [-1e30]], dtype=dtype)
    with pytest.raises(ValueError, match="inner products within float32 range, got an overflow"):
        F.mips_topk(torch.full((1, 1), 1e30, dtype=dtype), index, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(5, 4), 1), r"index_emb: expected \[N, D\].*\[\*, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(0, 3), 1), "index_emb: expected at least one row"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 0), "k: expected a whole number of at least 1"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 2.0), "k: expected a whole number"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), True), "k: expected a whole number, got True"),
        (
            (torch.zeros(2, 3), torch.zeros(5, 3), 1, torch.tensor([[0], [5]])),
            r"exclude: expected values in \[0, 5\), or -1 for none, got 5 at \[1, 0\]",
        ),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1, torch.tensor([[-2], [0]])), "got -2 at"),
        ((torch.zeros(3), torch.zeros(5, 3), 1), r"query_emb: expected \[B, D\], got \[3\]"),
        ((torch.zeros(2, 3).int(), torch.zeros(5, 3), 1), "query_emb: expected a floating"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1, [0]), "exclude: expected a tensor, got list"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1, torch.zeros(4).bool()), r"exclude: .*\[5\]"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1, torch.zeros(3, 1).long()), r"exclude: .*\[2"),
        ((torch.zeros(2, 3), torch.zeros(5, 3), 1, torch.zeros(2, 1)), "exclude: expected int64"),
    ],
)
def test_rejects_bad_input(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.mips_topk(*args[:3], exclude=args[3] if len(args) > 3 else None)


def test_k_may_be_a_number_of_numpy() -> None:
    index = torch.arange(12.0).view(4, 3)
    same(F.mips_topk(index, index, np.int64(2)), F.mips_topk(index, index, 2))


def test_rejects_codes_and_scales_that_do_not_go_together() -> None:
    query, codes, one = torch.zeros(2, 3), torch.zeros(5, 3).to(torch.int8), torch.ones(3)
    for index, factors, message in (
        (codes, {}, r"scale: expected \[D\] float32 for the codes of index_emb \[5, 3\] int8"),
        (codes.float(), {"scale": one}, "scale: expected None, since only int8"),
        (codes, {"scale": one[:2]}, r"scale: expected \[D\] with sizes \[3\], got \[2\]"),
        (codes, {"scale": one, "offset": one.double()}, "offset: expected float32, got"),
        (codes.int(), {}, "index_emb: expected a floating point dtype or int8, got"),
    ):
        with pytest.raises(ValueError, match=message):
            F.mips_topk(query, index, 1, **factors)
