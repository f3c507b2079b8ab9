"""The doc_scores kernel in Triton's interpreter, on tiny shapes, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends
from fastrag.ops.doc_scores import TRITON_MAX_PASSAGES
from fastrag.testing import assert_close
from tests.ops.codes import Codes, random_codes

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels.doc_scores import blocks, doc_scores_bwd, doc_scores_fwd  # noqa: E402

TAU = 0.5
# B, K, D, N: one comment per regime
SHAPES = {
    "one": (1, 1, 1, 1),
    "plain": (3, 5, 40, 20),
    "two blocks of D": (2, 9, 70, 20),  # BLOCK_K = 32, BLOCK_D = 64
    "many passages": (2, 130, 9, 200),  # BLOCK_K = 1024, three blocks of D
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
offsets = pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n_examples, n_passages, width, n = shape
    query = torch.randn(n_examples, width).to(dtype)
    index = torch.randn(n, width).to(dtype)
    rows = torch.randint(n, (n_examples, n_passages))
    if n_passages > 1:
        rows[0, -1] = -1
        rows[-1, 0] = rows[-1, 1]
    return query, index, rows


def int8_inputs(
    shape: tuple[int, int, int, int], with_offset: bool = True
) -> tuple[Tensor, Codes, Tensor]:
    query, index, rows = inputs(shape, torch.float32)
    return query, random_codes(*index.shape, with_offset), rows


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x)


@dtypes
@shapes
@pytest.mark.parametrize("mode", ["gathered", "fresh", "fresh with rows"])
def test_forward(dtype: torch.dtype, shape: tuple[int, int, int, int], mode: str) -> None:
    query, index, rows = inputs(shape, dtype)
    passages = index if mode == "gathered" else index[rows.clamp(min=0)]
    if mode == "fresh":
        rows = None
    elif mode == "fresh with rows":
        passages[rows < 0] = torch.nan  # never read
    scores, prior = doc_scores_fwd(query, passages, rows, TAU)
    plain = reference.doc_scores(query, passages, rows, TAU)
    true = reference.doc_scores(query.double(), passages.double(), rows, TAU)
    assert scores.dtype == prior.dtype == torch.float32
    assert_close(scores, plain.float(), true, name="scores")
    log_prior = reference.log_prior
    assert_close(prior, log_prior(plain).float(), log_prior(true), name="prior", scale=1.0)


@dtypes
@shapes
@pytest.mark.parametrize("upstream", ["scores", "prior", "both"])
def test_backward(dtype: torch.dtype, shape: tuple[int, int, int, int], upstream: str) -> None:
    query, index, rows = inputs(shape, dtype)
    fresh = index[rows.clamp(min=0)]
    prior = doc_scores_fwd(query, fresh, rows, TAU)[1]
    ds = torch.randn_like(prior) if upstream != "prior" else None
    da = torch.randn_like(prior) if upstream != "scores" else None

    def oracle(to: torch.dtype) -> tuple[Tensor, ...]:
        q, d = (x.to(to).requires_grad_() for x in (query, fresh))
        scores = reference.doc_scores(q, d, rows, TAU)
        loss = 0.0 if ds is None else (finite(scores) * ds.to(to)).sum()
        if da is not None:
            loss = loss + (finite(reference.log_prior(scores)) * da.to(to)).sum()
        return torch.autograd.grad(loss, (q, d))

    true, plain = oracle(torch.float64), oracle(dtype)
    dq, dp = doc_scores_bwd(ds, da, prior, query, fresh, rows, TAU, True, True)
    assert_close(dq, plain[0], true[0], name="query")
    assert_close(dp, plain[1], true[1], name="passages")
    gathered, nothing = doc_scores_bwd(ds, da, prior, query, index, rows, TAU, True, False)
    assert torch.equal(gathered, dq) and nothing.numel() == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_float32_query_meets_reduced_storage(stored: torch.dtype) -> None:
    query, index, rows = inputs(SHAPES["two blocks of D"], torch.float32)
    index = index.to(stored)
    expected = doc_scores_fwd(query, index.float(), rows, TAU)
    found = doc_scores_fwd(query, index, rows, TAU)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    up = torch.randn_like(found[0])
    dq = [doc_scores_bwd(up, up, found[1], query, x, rows, TAU, True, False)[0]
          for x in (index, index.float())]  # fmt: skip
    assert dq[0].dtype == torch.float32 and torch.equal(*dq)


@offsets
@shapes
@pytest.mark.parametrize("mode", ["gathered", "fresh", "fresh with rows"])
def test_int8(shape: tuple[int, int, int, int], mode: str, with_offset: bool) -> None:
    query, stored, rows = int8_inputs(shape, with_offset)
    stored = stored if mode == "gathered" else stored.fresh(rows)
    rows = None if mode == "fresh" else rows
    more = stored.options().values()
    scores, prior = doc_scores_fwd(query, stored.codes, rows, TAU, *more)
    up = torch.randn(2, *prior.shape)

    def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q = query.to(dtype).requires_grad_()
        s = stored.scores(q, rows, TAU)
        a = reference.log_prior(s)
        loss = (finite(s) * up[0].to(dtype)).sum() + (finite(a) * up[1].to(dtype)).sum()
        return s, a, torch.autograd.grad(loss, q)[0]

    args = (*up, prior, query, stored.codes, rows, TAU, True, False, *more)
    dq, nothing = doc_scores_bwd(*args)
    assert nothing.numel() == 0
    found, plain, true = (scores, prior, dq), oracle(torch.float32), oracle(torch.float64)
    for name, a, b, c in zip(("scores", "prior", "query"), found, plain, true, strict=True):
        # The prior is a difference of scores, and terms of the gradient may cancel.
        assert_close(a, b, c, name=name, scale=0.0 if name == "scores" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_meets_a_query_in_16_bits(dtype: torch.dtype) -> None:
    query, stored, rows = int8_inputs(SHAPES["two blocks of D"])
    query, more = query.to(dtype), tuple(stored.options().values())
    found = doc_scores_fwd(query, stored.codes, rows, TAU, *more)
    expected = doc_scores_fwd(query.float(), stored.codes, rows, TAU, *more)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    up = torch.randn_like(found[0])
    dq = [
        doc_scores_bwd(None, up, found[1], q, stored.codes, rows, TAU, True, False, *more)[0]
        for q in (query, query.float())
    ]
    assert dq[0].dtype == dtype
    # The interpreter cuts digits off where it stores bfloat16, up to a unit in the last place.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(dq[0].float(), dq[1].to(dtype).float(), rtol=rtol, atol=0.0)


def test_int8_missing_takes_no_offset_and_a_row_beyond_the_index_is_nan() -> None:
    query, stored, rows = int8_inputs(SHAPES["plain"])
    more = tuple(stored.options().values())
    rows[1], rows[2, 2] = -1, 1 << 40
    scores, prior = doc_scores_fwd(query, stored.codes, rows, TAU, *more)
    assert scores[:2].isneginf().equal(rows[:2] < 0) and prior[1].isneginf().all()
    assert scores[2, 2].isnan() and prior[2].isnan().all() and not prior[:2].isnan().any()
    up = torch.ones_like(prior)
    args = (prior, query, stored.codes, rows, TAU, True, False, *more)
    dq, _ = doc_scores_bwd(None, up, *args)
    assert (dq[1] == 0).all() and dq[0].isfinite().all() and dq[2].isnan().all()
    dq, _ = doc_scores_bwd(up, None, *args)
    dense = (stored.offset + stored.scale * stored.codes)[rows[0, :-1]].sum(0) / TAU
    torch.testing.assert_close(dq[0], dense, rtol=1e-5, atol=1e-4)


def test_int8_strided_inputs() -> None:
    query, stored, rows = int8_inputs(SHAPES["two blocks of D"])
    stored.scale = stored.scale[:1].expand(70)  # one scale for all components
    stored.offset = torch.randn(140)[::2]
    turned, strided = stored.codes.t().contiguous().t(), tuple(stored.options().values())
    dense = tuple(x.contiguous() for x in strided)
    expected = doc_scores_fwd(query, stored.codes, rows, TAU, *dense)
    found = doc_scores_fwd(query, turned, rows, TAU, *strided)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    up = torch.randn_like(found[0])
    dq = [
        doc_scores_bwd(up, up, found[1], query, codes, rows, TAU, True, False, *more)[0]
        for codes, more in ((turned, strided), (stored.codes, dense))
    ]
    assert torch.equal(*dq)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (2, 3, 0, 4)], ids=["no question", "no width"])
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_nothing_to_do(sizes: tuple[int, int, int, int], int8: bool) -> None:
    n_examples, n_passages, width, n = sizes
    query, rows = torch.randn(n_examples, width), torch.zeros(n_examples, n_passages).long()
    passages, more = torch.randn(n, width), ()
    if int8:
        stored = random_codes(n, width)
        passages, more = stored.codes, tuple(stored.options().values())
    scores, prior = doc_scores_fwd(query, passages, rows, TAU, *more)
    assert scores.shape == prior.shape == rows.shape and (scores == 0).all()
    dq, _ = doc_scores_bwd(scores, prior, prior, query, passages, rows, TAU, True, False, *more)
    assert dq.shape == query.shape


def test_all_missing() -> None:
    query, index, rows = inputs(SHAPES["plain"], torch.float32)
    rows[1] = -1
    scores, prior = doc_scores_fwd(query, index, rows, TAU)
    assert (scores[1] == -torch.inf).all() and (prior[1] == -torch.inf).all()
    ones = torch.ones_like(prior)
    dq, _ = doc_scores_bwd(ones, ones, prior, query, index, rows, TAU, True, False)
    assert (dq[1] == 0).all() and dq.isfinite().all()


def test_row_beyond_the_index_is_nan_and_never_read() -> None:
    query, index, rows = inputs(SHAPES["plain"], torch.float32)
    rows[1, 2] = 1 << 40
    scores, prior = doc_scores_fwd(query, index, rows, TAU)
    assert scores[1, 2].isnan() and prior[1].isnan().all()
    assert not prior[[0, 2]].isnan().any()
    doc_scores_bwd(torch.ones_like(prior), None, prior, query, index, rows, TAU, True, False)


def test_large_scores() -> None:
    query = torch.full((1, 8), 100.0)
    passages = torch.full((1, 3, 8), 100.0)
    _, prior = doc_scores_fwd(query, passages, None, 1.0)
    torch.testing.assert_close(prior.exp(), torch.full((1, 3), 1 / 3), rtol=1e-6, atol=0)


def test_strided_inputs() -> None:
    query, index, rows = inputs(SHAPES["plain"], torch.float32)
    expected = doc_scores_fwd(query, index, rows, TAU)
    strided = [x.t().contiguous().t() for x in (query, index, rows)]
    for found, want in zip(doc_scores_fwd(*strided, TAU), expected, strict=True):
        assert torch.equal(found, want)
    up = torch.randn(5, 3).t()
    dq = doc_scores_bwd(up, up, expected[1], query, index, rows, TAU, True, False)[0]
    again = doc_scores_bwd(up.contiguous(), up, expected[1], *strided, TAU, True, False)[0]
    assert torch.equal(dq, again)


def test_strided_fresh_passages() -> None:
    query, index, rows = inputs(SHAPES["two blocks of D"], torch.float32)
    fresh = index[rows.clamp(min=0)]
    wide = torch.randn(2, 140)[:, ::2].copy_(query)
    turned = fresh.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not wide.is_contiguous() and not turned.is_contiguous()
    expected = doc_scores_fwd(query, fresh, rows, TAU)
    up = torch.randn(9, 2).t()
    for found, want in zip(doc_scores_fwd(wide, turned, rows, TAU), expected, strict=True):
        assert torch.equal(found, want)
    found = doc_scores_bwd(up, up, expected[1], wide, turned, rows, TAU, True, True)
    want = doc_scores_bwd(*[up.contiguous()] * 2, expected[1], query, fresh, rows, TAU, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_nan_upstream_of_a_missing_passage_ends_there() -> None:
    query, index, rows = inputs(SHAPES["plain"], torch.float32)
    fresh = index[rows.clamp(min=0)]
    prior = doc_scores_fwd(query, fresh, rows, TAU)[1]
    up = torch.ones_like(prior)
    want = doc_scores_bwd(up, up, prior, query, fresh, rows, TAU, True, True)
    bad = up.masked_fill(rows < 0, torch.nan)
    found = doc_scores_bwd(bad, bad, prior, query, fresh, rows, TAU, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert (found[1][rows < 0] == 0).all()


@pytest.mark.parametrize("axis", [0, 1], ids=["question", "passage"])
def test_fresh_offsets_beyond_two_to_the_31(axis: int) -> None:
    storage = torch.UntypedStorage(2 * (2 * (1 << 30) + 8))  # float16
    shape, strides = [1, 1, 8], [8, 8, 1]
    shape[axis], strides[axis] = 3, 1 << 30
    fresh = torch.tensor([], dtype=torch.float16).set_(storage, 0, shape, strides)
    fresh.copy_(torch.tensor([1.0, 2.0, 3.0]).view([3 if i == axis else 1 for i in range(3)]))
    query = torch.ones(shape[0], 8).half()
    scores, prior = doc_scores_fwd(query, fresh, None, 1.0)
    assert scores.flatten().tolist() == [8.0, 16.0, 24.0]
    ones = torch.ones_like(prior)
    dq, _ = doc_scores_bwd(ones, None, prior, query, fresh, None, 1.0, True, False)
    assert dq.sum(0).tolist() == [6.0] * 8


def test_offsets_beyond_two_to_the_31() -> None:
    """Row and stride fit 32 bits, their product does not. Untouched pages cost nothing."""
    n, stride = 2050, 1 << 20
    storage = torch.UntypedStorage(2 * (n * stride + 8))  # float16
    index = torch.tensor([], dtype=torch.float16).set_(storage, 0, (n, 8), (stride, 1))
    index[0], index[n - 1] = 1.0, 3.0
    query, rows = torch.ones(1, 8).half(), torch.tensor([[n - 1, 0]])
    scores, prior = doc_scores_fwd(query, index, rows, 1.0)
    assert scores.tolist() == [[24.0, 8.0]]
    ones = torch.ones_like(prior)
    dq, _ = doc_scores_bwd(ones, None, prior, query, index, rows, 1.0, True, False)
    assert (dq == 4.0).all()


def test_int8_offsets_beyond_two_to_the_31() -> None:
    n, stride = 2050, 1 << 20
    storage = torch.UntypedStorage(n * stride + 8)
    codes = torch.tensor([], dtype=torch.int8).set_(storage, 0, (n, 8), (stride, 1))
    codes[0], codes[n - 1] = 1, -3
    query, rows, scale = torch.ones(1, 8), torch.tensor([[n - 1, 0]]), torch.full((8,), 0.5)
    scores, prior = doc_scores_fwd(query, codes, rows, 1.0, scale)
    assert scores.tolist() == [[-12.0, 4.0]]
    ones = torch.ones_like(prior)
    dq, _ = doc_scores_bwd(ones, None, prior, query, codes, rows, 1.0, True, False, scale)
    assert (dq == -1.0).all()


def test_more_passages_than_the_largest_block() -> None:
    assert blocks(TRITON_MAX_PASSAGES)["BLOCK_K"] == TRITON_MAX_PASSAGES
    with pytest.raises(ValueError, match="expected K of at most 1024, got 1025"):
        blocks(1025)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_forced_backend_runs_the_kernel(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTRAG_BACKEND=triton sends the public function, forward and backward, through it."""
    import fastrag.kernels.doc_scores as module

    calls = []
    for name in ("doc_scores_fwd", "doc_scores_bwd"):
        launcher = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _f=launcher, _n=name: (calls.append(_n), _f(*a))[1]
        )
    query, index, rows = inputs(SHAPES["plain"], torch.float32)
    more = {}
    if int8:
        stored = random_codes(*index.shape)
        index, more = stored.codes, stored.options()
    query.requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        prior = F.doc_scores(query, index, rows=rows, tau=TAU, return_log_prior=True, **more)[1]
        return prior, torch.autograd.grad(finite(prior).square().sum(), query)[0]

    expected = run()
    assert not calls
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    for found, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    assert calls == ["doc_scores_fwd", "doc_scores_bwd"]
    with pytest.raises(RuntimeError, match="compute in float32, got float64"):
        F.doc_scores(query.double(), index if int8 else index.double(), rows=rows, **more)
