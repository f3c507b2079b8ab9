"""The search for a GPU in the interpreter: the bits of the C++ search, and the float64 oracle.

The interpreter multiplies matrices in an order of its own, and bfloat16 wrongly. Here it does as
the hardware does with float32 products: one fused multiply-add after another.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends

from .mips_cases import (
    STORED,
    Found,
    on_cpu,
    one_after_another,
    random_index,
    same,
    whole_numbers,
    widened,
)

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels import mips, mips_rescore  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from fastrag.ops import triton_mips  # noqa: E402

needs_cpp = pytest.mark.skipif(bool(backends.why_not("cpp")), reason="the extension is not built")
each_storage = pytest.mark.parametrize("dtype", STORED, ids=str)

GROUP = 16
TILE = mips.Tile(16, 32, 16, 4, 1)
# B, N, D, k: one comment per regime; groups of 16 rows, tiles of 16 queries and 32 rows
SHAPES = {
    "one": (1, 1, 1, 1),
    "below a group": (2, 9, 5, 3),
    "all rows": (3, 40, 7, 40),
    "more than all rows": (1, 20, 3, 25),
    "one row over": (2, 97, 16, 4),
    "blocks and a rest": (17, 150, 19, 2),
}


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    def fma(x, y, z):  # the product is exact in float64
        return (x.astype(np.float64) * y + z).astype(np.float32)

    def widened(x) -> np.ndarray:
        if x.dtype.scalar == triton.language.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def dot(self, a, b, d, *_):
        left, right, total = widened(a), widened(b), d.data
        for i in range(left.shape[1]):
            total = fma(left[:, i : i + 1], right[i : i + 1], total)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def single(self, x, y, z):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)

    def from_code(self, src, dst_type):
        if dst_type.scalar != triton.language.bfloat16:
            return self.cast_impl(src, dst_type)
        bits = src.data.astype(np.float32).view(np.uint32) >> 16
        return interpreter.TensorHandle(bits.astype(np.uint16), dst_type.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", single)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", from_code)
    # Sorting costs the interpreter most, and lists of 16 are sorted as those of 128 are.
    monkeypatch.setattr(mips_rescore, "_LEAST_LIST", GROUP)


Change = Callable[[triton_mips.Plan], triton_mips.Plan]


def small(plan: triton_mips.Plan, **changes: object) -> triton_mips.Plan:
    slack = 2 + plan.n_chosen % 8  # fewer than the launcher takes
    return dataclasses.replace(
        plan, **{"group": GROUP, "n_chosen": slack, "tile": TILE, "use_tma": False} | changes
    )


def search(
    query: Tensor,
    index: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    exact: Tensor | None = None,
    **changes: object,
) -> tuple[Found, list[int]]:
    """The answer of a search in small blocks, and for which queries it was uncertain."""
    excluded = 0 if exclude is None or exclude.dtype == torch.bool else exclude.shape[1]
    changes = {"n_chosen": k + excluded + 1} | changes
    plan = small(triton_mips.plan_for(query, index, k, exclude), **changes)
    passages = triton_mips._passages(index, scale, offset, exclude)
    norm = None if scale is not None else mips.max_norm(index, None, None)
    gap = None if exact is None else mips.max_norm(index, scale, offset, exact)
    found = triton_mips.find(query, passages, k, plan, norm, exact, gap)
    return triton_mips.unpack(found.keys), found.uncertain.tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("swap", [False, True], ids=["queries first", "passages first"])
def test_against_float64(shape: tuple[int, ...], swap: bool) -> None:
    n_queries, n, dim, k = shape
    query, index = whole_numbers(n_queries, dim), whole_numbers(n, dim)
    tile = dataclasses.replace(TILE, swap=swap)
    found, _ = search(query, index, k, tile=tile)
    assert same(found, reference.mips_topk(query.double(), index.double(), k))


@needs_cpp
@each_storage
@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
def test_bits_of_the_cpu(dtype: torch.dtype, use_tma: bool) -> None:
    query = torch.randn(3, 37)
    index, options = random_index(150, 48, dtype)
    index, options = index[:, :37], {name: x[:37] for name, x in options.items()}
    found, uncertain = search(query, index, 5, use_tma=use_tma, **options)
    assert same(found, on_cpu(query, index, 5, **options))
    assert same(found, one_after_another(query, widened(index, **options), 5, None))
    assert not all(uncertain)


@needs_cpp
@each_storage
def test_uncertain_answers_are_exact(dtype: torch.dtype) -> None:
    """One group is chosen, of three that hold the answer."""
    query = torch.randn(2, 11)
    query[1] = -query[0]  # the offset of codes counts once for either
    index, options = random_index(40, 11, dtype)
    found, uncertain = search(query, index, 4, n_chosen=1, **options)
    assert any(uncertain)
    assert same(found, on_cpu(query, index, 4, **options))


@needs_cpp
def test_a_bound_that_no_answer_can_meet() -> None:
    query, index = torch.randn(1, 11), torch.randn(70, 11)
    found, uncertain = search(query, index, 4, error=1e6, n_chosen=4)
    assert uncertain == [1]
    assert same(found, on_cpu(query, index, 4))


@needs_cpp
def test_uncertain_answers_longer_than_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    query, index = torch.randn(1, 5), torch.randn(60, 5)
    monkeypatch.setattr(mips_rescore, "_BLOCK_GROUPS", 2)  # and in several splits
    found, uncertain = search(query, index, 21, n_chosen=2)
    assert uncertain == [1]
    assert same(found, on_cpu(query, index, 21))


def test_only_what_could_be_better_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the scan of an uncertain query rules out are not read again."""
    index = torch.zeros(6 * GROUP, 4)
    index[:, 0] = torch.arange(6.0).repeat_interleave(GROUP)
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    scanned = mips.group_maxima

    def spoil(*args) -> None:
        scanned(*args)
        index[: 3 * GROUP] = 100.0

    monkeypatch.setattr(mips, "group_maxima", spoil)
    # Groups 5 and 4 are chosen; the k-th score is 4, and 3 within reach of it.
    (scores, rows), uncertain = search(query, index, GROUP + 1, n_chosen=2, error=1.2 / 5.0)
    assert uncertain == [1] and scores[0, -1] == 4.0 and rows[0, -1] == 4 * GROUP


@pytest.mark.parametrize("k", [1, 20])
def test_ties_go_to_the_lowest_row(k: int) -> None:
    (scores, rows), uncertain = search(torch.ones(1, 3), torch.ones(60, 3), k, n_chosen=2)
    assert uncertain == [1]
    assert scores.eq(3.0).all() and torch.equal(rows, torch.arange(k)[None])


def test_both_zeros_tie() -> None:
    index = torch.tensor([[-1e-30], [0.0], [-1e-30], [-1.0]])
    (scores, rows), _ = search(torch.full((1, 1), 1e-30), index, 4)
    assert rows.tolist() == [[0, 1, 2, 3]] and scores[0, :3].eq(0).all()


def test_neighbours() -> None:
    """All that belongs to the answer lies in one group, which ends a tile."""
    query, index = whole_numbers(2, 6), whole_numbers(97, 6)
    index[48:64] *= 10.0
    found, _ = search(query, index, 12, n_chosen=2)
    assert same(found, reference.mips_topk(query, index, 12))


def test_all_negative() -> None:
    """Zeros behind the last row and the last element are not the best."""
    query, index = torch.ones(2, 5), torch.full((37, 8), 99.0)[:, :5]
    index[:] = -whole_numbers(37, 5).abs() - 1.0
    found, _ = search(query, index, 3, use_tma=True)
    assert same(found, reference.mips_topk(query, index, 3))


@pytest.mark.parametrize("kind", ["rows", "mask", "whole groups", "everything"])
def test_exclude(kind: str) -> None:
    query, index = whole_numbers(2, 6), whole_numbers(75, 6)
    if kind == "rows":
        best = reference.mips_topk(query, index, 4)[1]
        exclude = torch.cat([best, torch.randint(-1, 75, (2, 3))], 1)
    else:
        exclude = torch.rand(75) < (2.0 if kind == "everything" else 0.4)
        exclude[16:48] |= kind == "whole groups"
    for n_chosen in (2, 5):
        found, _ = search(query, index, 5, exclude=exclude, n_chosen=n_chosen)
        assert same(found, reference.mips_topk(query, index, 5, exclude))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_exact_scores_from_a_coarse_scan(dtype: torch.dtype) -> None:
    query, exact = torch.randn(3, 13), torch.randn(90, 13)
    index, options = exact.to(torch.bfloat16), {}
    if dtype == torch.int8:
        scale, offset = exact.std(0) / 10.0, exact.mean(0)
        index = ((exact - offset) / scale).round().clamp(-127, 127).to(torch.int8)
        options = {"scale": scale, "offset": offset}
    coarse = on_cpu(query, index, 6, **options)
    expected = on_cpu(query, exact, 6)
    assert not torch.equal(coarse[0], expected[0])
    assert same(search(query, index, 6, exact=exact, **options)[0], expected)


@pytest.mark.parametrize(
    ("bad", "swap"), [(torch.nan, False), (torch.inf, True), (-torch.inf, False)]
)
def test_what_is_not_finite_comes_first_as_nan(bad: float, swap: bool) -> None:
    query, index = whole_numbers(1, 4), whole_numbers(60, 4)
    query[:, 2] = -1.0
    index[32:48] = 0.0  # else of little interest
    index[37, 2] = bad
    tile = dataclasses.replace(TILE, swap=swap)
    (scores, rows), _ = search(query, index, 3, tile=tile, n_chosen=1)
    assert scores[:, 0].isnan().all() and rows[:, 0].eq(37).all()
    removed = torch.arange(60) == 37
    found, _ = search(query, index, 3, tile=tile, exclude=removed)
    assert same(found, reference.mips_topk(query, index.nan_to_num(0, 0, 0), 3, removed))


def test_one_query_that_is_not_finite() -> None:
    query, index = whole_numbers(3, 4), whole_numbers(60, 4)
    expected = reference.mips_topk(query, index, 3)
    query[1, 2] = torch.nan
    (scores, rows), _ = search(query, index, 3)
    assert scores[1].isnan().all()
    kept = torch.tensor([0, 2])
    assert same((scores[kept], rows[kept]), (expected[0][kept], expected[1][kept]))


@each_storage
@pytest.mark.parametrize("size", [1e-25, 1.0, 3e25], ids=str)
def test_error_of_a_maximum_is_within_its_bound(dtype: torch.dtype, size: float) -> None:
    query = size * torch.randn(4, 30) * 10.0 ** torch.empty(4, 30).uniform_(-6, 0)
    index, options = random_index(80, 30, dtype)
    index[:GROUP] = -index[:GROUP].abs()
    plan = small(triton_mips.plan_for(query, index, 1), tile=TILE)
    scale, offset = options.get("scale"), options.get("offset")
    operand = mips.prepare(query, dtype, scale, offset, plan.has_low, TILE)
    maxima = torch.empty(4, 5)
    mips.group_maxima(operand, index, None, GROUP, TILE, False, maxima)
    vectors = index.double()
    if scale is not None and offset is not None:
        vectors = vectors * scale.double() + offset.double()
    true = (query.double() @ vectors.t()).unflatten(1, (-1, GROUP)).amax(2)
    found = maxima.double() / operand.unit[:, None].double() + operand.base[:, None].double()
    norm = 1.0 if scale is not None else mips.max_norm(index, None, None).double()
    reach = plan.error * operand.size.double() * norm
    assert ((found - true).abs() <= reach[:, None]).all()
    assert (reach <= 1e-2 * operand.norm.double() * vectors.norm(dim=1).max() * 10).all()


def test_error_bound_counts_each_rounding() -> None:
    """768 products of two halves: 1536 roundings of 2^-22, 768 of 2^-23, and little else."""
    bound = mips.error_bound(torch.bfloat16, 768, True)
    assert 1.0 < bound / (1536 * 2.0**-22 + 768 * 2.0**-23) < 1.1
    assert mips.error_bound(torch.bfloat16, 768, False) < bound
    assert mips.error_bound(torch.float32, 768, False) > 2.0**-9


@each_storage
def test_max_norm(dtype: torch.dtype) -> None:
    index, options = random_index(45, 150, dtype)
    scale, offset = options.get("scale"), options.get("offset")
    vectors = index.double()
    if scale is not None and offset is not None:
        vectors = vectors * scale.double() + offset.double()
    found = mips.max_norm(index, scale, offset)
    torch.testing.assert_close(found.double(), vectors.norm(dim=1).max(), rtol=1e-5, atol=0)
    exact = torch.randn(45, 150)
    found = mips.max_norm(index, scale, offset, exact)
    expected = (exact.double() - vectors).norm(dim=1).max()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_a_norm_is_kept_until_the_index_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_mips.forget_norms()
    index = torch.randn(40, 4)
    whole, part = (triton_mips._kept_norm(x, None, None, None) for x in (index, index[:7]))
    assert triton_mips._kept_norm(index.detach(), None, None, None) is whole
    assert triton_mips._kept_norm(index[:7], None, None, None) is part
    index[3] = 100.0
    assert triton_mips._kept_norm(index, None, None, None) == 200.0
    del index, whole, part
    gc.collect()  # the interpreter's references
    triton_mips._kept_norm(torch.randn(5, 4), None, None, None)
    assert len(triton_mips._norms) == 1
    with torch.inference_mode():
        unversioned = torch.ones(3, 4)
        assert triton_mips._kept_norm(unversioned, None, None, None) == 2.0
        unversioned.mul_(2.0)
        assert triton_mips._kept_norm(unversioned, None, None, None) == 4.0
    kept = [torch.randn(5, 4) for _ in range(triton_mips._KEPT_NORMS + 4)]
    for x in kept:
        triton_mips._kept_norm(x, None, None, None)
    assert len(triton_mips._norms) <= triton_mips._KEPT_NORMS
    triton_mips.forget_norms()
    assert not triton_mips._norms


@pytest.mark.parametrize("n", [1, 5, 64, 200])
def test_top_groups_in_two_steps(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maxima = torch.randn(3, 640)
    maxima[0, 100:400] = maxima[0, 100]
    maxima[1, 20:] = -torch.inf
    expected, _ = maxima.topk(n)
    monkeypatch.setattr(triton_mips, "_WIDE", 0)
    top, groups = triton_mips._top_groups(maxima, n)
    assert torch.equal(top, expected) and torch.equal(maxima.gather(1, groups), expected)
    assert all(len(set(row)) == n for row in groups.tolist())


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^27 bytes apart; only those that are written take memory."""
    n, pitch = 20, 1 << 27
    index = torch.from_numpy(np.zeros(n * pitch, np.int8)).as_strided((n, 16), (pitch, 1))
    index[:] = whole_numbers(n, 16).to(torch.int8)
    query, scale = whole_numbers(2, 16), torch.ones(16)
    found, _ = search(query, index, 4, scale=scale)
    assert same(found, reference.mips_topk(query, index.float(), 4))


@needs_cpp
def test_through_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile and the groups of a GPU; queries in slices; small searches are left to torch."""
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(triton_mips, "_LEAST_SCORES", 0)
    monkeypatch.setattr(triton_mips, "SLACK_FLOAT32", 1)
    query, index = torch.randn(3, 9), torch.randn(4700, 9)
    assert triton_mips.pays(query, index, 1, None)
    assert not triton_mips.pays(query, index[:4600], 1, None)
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", "9000")
    plan = triton_mips.plan_for(query, index, 1)
    assert triton_mips._queries_at_once(index, plan) == 2
    found = F.mips_topk(query, index, 1)
    monkeypatch.delenv(backends.BACKEND_VARIABLE)
    assert same(found, on_cpu(query, index, 1))


def test_says_what_it_cannot_search(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.zeros(50, 4)
    assert triton_mips.unfit(index, 1024, torch.zeros(2, 256).long()) == ""
    assert "k = 1025" in triton_mips.unfit(index, 1025, None)
    assert "at most 256 rows" in triton_mips.unfit(index, 1, torch.zeros(2, 257).long())
    assert "strides (1, 50)" in triton_mips.unfit(torch.zeros(4, 50).t(), 1, None)
    assert "torch.float64" in triton_mips.unfit(index.double(), 1, None)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    with pytest.raises(backends.BackendError, match="at most 1024 rows, got k = 2000"):
        F.mips_topk(torch.zeros(1, 4), index, 2000)


@needs_cpp
@pytest.mark.parametrize("kind", ["rows", "mask"])
def test_an_index_in_pieces(kind: str) -> None:
    """Each block is gone when the next comes; where one ends, the other's rows begin."""
    query, index = torch.randn(2, 9), torch.randn(70, 9)
    exclude = torch.randint(-1, 70, (2, 6)) if kind == "rows" else torch.rand(70) < 0.3
    block = torch.empty(33, 16)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, 70, 33):
            rows = index[start : start + 33]
            yield slice(start, start + len(rows)), block[: len(rows), :9].copy_(rows)
            block.fill_(torch.nan)

    found = triton_mips.search_blocks(query, blocks(), 5, exclude)
    assert same(found, on_cpu(query, index, 5, exclude=exclude))
