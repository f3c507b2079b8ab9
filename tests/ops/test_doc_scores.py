from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends
from fastrag.ops.doc_scores import (
    TRITON_MAX_PASSAGES,
    doc_scores,
    doc_scores_backward_op,
    doc_scores_op,
)
from fastrag.testing import assert_close, cpu_memory

from .codes import random_codes
from .score_inputs import finite, inputs, int8_inputs

TAU = 0.5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["gathered", "fresh", "fresh without rows"]
offsets = pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])


def both(
    query: Tensor, passages: Tensor, rows: Tensor | None, tau: object = TAU, **more: object
) -> tuple:
    return F.doc_scores(query, passages, rows=rows, tau=tau, return_log_prior=True, **more)


def test_reference_gradcheck() -> None:
    query, index, rows = inputs()
    fresh = index[rows.clamp(min=0)].requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, d: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        scores = reference.doc_scores(q, d, rows, t)
        return finite(scores), finite(reference.log_prior(scores))

    assert torch.autograd.gradcheck(f, (query, fresh, tau))


@pytest.mark.parametrize("with_rows", [True, False])
def test_op_gradcheck(with_rows: bool) -> None:
    query, index, rows = inputs()
    fresh = index[rows.clamp(min=0)].requires_grad_()
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, d: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return tuple(finite(x) for x in both(q, d, rows if with_rows else None, t))

    assert torch.autograd.gradcheck(f, (query, fresh, tau))


def test_index_gradcheck() -> None:
    query, index, rows = inputs()
    index.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, x: finite(F.doc_scores(q, x, rows=rows, tau=TAU)), (query, index)
    )


@offsets
@pytest.mark.parametrize("with_rows", [True, False])
def test_int8_gradcheck(with_rows: bool, with_offset: bool) -> None:
    query, stored, rows = int8_inputs(with_offset=with_offset)
    tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    fresh = stored.fresh(rows)

    def f(q: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        chosen = rows if with_rows else None
        passages = stored.codes if with_rows else fresh.codes
        return tuple(finite(x) for x in both(q, passages, chosen, t, **stored.options()))

    assert torch.autograd.gradcheck(f, (query, tau))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["gathered", "fresh"])
def test_three_way(dtype: torch.dtype, mode: str, each_backend: str) -> None:
    query, index, rows = inputs(dtype, (16, 10, 96, 50))
    passages = index if mode == "gathered" else index[rows.clamp(min=0)]
    exact = query.detach().double().requires_grad_()
    scores, prior = both(query, passages, rows)
    true = reference.doc_scores(exact, passages.double(), rows, TAU)
    plain = reference.doc_scores(query, passages, rows, TAU)
    assert scores.dtype == prior.dtype == torch.float32
    assert_close(scores, plain.float(), true, name="scores")
    assert_close(prior, reference.log_prior(plain).float(), reference.log_prior(true), name="prior")
    upstream = torch.randn_like(prior)
    sums = [(finite(x) * upstream.to(x.dtype)).sum()
            for x in (prior, reference.log_prior(plain), reference.log_prior(true))]  # fmt: skip
    found = torch.autograd.grad(sums[0], query)[0]
    base = torch.autograd.grad(sums[1], query)[0]
    expected = torch.autograd.grad(sums[2], exact)[0]
    assert found.dtype == dtype
    assert_close(found, base, expected, name="query")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_float32_query_meets_reduced_storage(stored: torch.dtype, each_backend: str) -> None:
    """The usual mix: the index in 16 bits, the query in 32, and nothing rounded to 16 again."""
    query, index, rows = inputs(torch.float32, (16, 10, 96, 50))
    index = index.to(stored)

    def grad(scores: Tensor, q: Tensor) -> Tensor:
        return torch.autograd.grad(finite(reference.log_prior(scores)).square().sum(), q)[0]

    exact = query.detach().double().requires_grad_()
    found = F.doc_scores(query, index, rows=rows, tau=TAU)
    plain = reference.doc_scores(query, index.float(), rows, TAU)
    true = reference.doc_scores(exact, index.double(), rows, TAU)
    assert found.dtype == torch.float32
    assert_close(found, plain, true, name="scores")
    assert_close(grad(found, query), grad(plain, query), grad(true, exact), name="query")


@offsets
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes",
    [(16, 10, 96, 50), (3, 7, 33, 9), (4, 1, 5, 9), (2, 3, 1, 4)],
    ids=["plain", "odd D", "one passage", "one component"],
)
def test_int8_three_way(
    sizes: tuple[int, int, int, int], mode: str, with_offset: bool, each_backend: str
) -> None:
    """Against the dequantised vectors in float64; plain torch dequantises them in float32."""
    query, stored, rows = int8_inputs(torch.float32, sizes, with_offset)
    stored = stored if mode == "gathered" else stored.fresh(rows)
    chosen = None if mode == "fresh without rows" else rows
    exact = query.detach().double().requires_grad_()
    up = torch.randn(2, *rows.shape)

    def run(q: Tensor, scores: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        total = (finite(scores) * up[0]).sum() + (finite(prior) * up[1]).sum()
        return scores, prior, torch.autograd.grad(total, q)[0]

    plain, true = (stored.scores(q, chosen, TAU) for q in (query, exact))
    found = run(query, *both(query, stored.codes, chosen, **stored.options()))
    plain = run(query, plain, reference.log_prior(plain))
    true = run(exact, true, reference.log_prior(true))
    for name, a, b, c in zip(("scores", "prior", "query"), found, plain, true, strict=True):
        # The prior is a difference of scores, and terms of the gradient may cancel.
        assert_close(a, b, c, name=name, scale=0.0 if name == "scores" else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rounds_the_gradient_once(dtype: torch.dtype, each_backend: str) -> None:
    """A query in 16 bits meets int8 codes in float32, and its gradient goes back to 16 bits."""
    query, stored, rows = int8_inputs(dtype, (8, 5, 33, 20))
    wide = query.detach().float().requires_grad_()
    found, expected = (both(q, stored.codes, rows, **stored.options()) for q in (query, wide))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    grads = [
        torch.autograd.grad(finite(prior).square().sum(), q)[0]
        for (_, prior), q in ((found, query), (expected, wide))
    ]
    assert grads[0].dtype == dtype and torch.equal(grads[0], grads[1].to(dtype))


def test_int8_index_is_not_dequantised(each_backend: str) -> None:
    query, stored, rows = int8_inputs(torch.float32, (2, 3, 64, 20_000))
    peak, _ = cpu_memory(lambda: both(query, stored.codes, rows, **stored.options()))
    assert peak < stored.codes.numel() / 4


def test_int8_missing_takes_no_offset(each_backend: str) -> None:
    """A missing passage is the zero vector, not the offset: no gradient comes from it."""
    query, stored, rows = int8_inputs(torch.float32)
    rows[1] = -1
    scores, prior = both(query, stored.codes, rows, **stored.options())
    assert scores.isneginf().equal(rows < 0) and prior.isneginf().equal(rows < 0)
    up = torch.full_like(scores, 3.0)
    found = torch.autograd.grad((scores, prior), query, (up, up))[0]
    assert (found[1] == 0).all() and found.isfinite().all()
    kept = torch.autograd.grad(
        both(query, stored.codes, rows[:, :-1], **stored.options()), query, (up[:, :-1],) * 2
    )[0]
    torch.testing.assert_close(found[0], kept[0])


def test_int8_blind_row_beyond_the_index_is_nan(blind: None) -> None:
    query, stored, rows = int8_inputs()
    rows[1, 2] = len(stored.codes) + 7
    prior = both(query, stored.codes, rows, **stored.options())[1]
    assert prior[1].isnan().all() and not prior[[0, 2]].isnan().any()
    grad = torch.autograd.grad(finite(prior).square().sum(), query)[0]
    assert grad[[0, 2]].isfinite().all() and grad[1].isnan().all()


def test_int8_index_takes_no_gradient_from_a_scale_that_wants_one() -> None:
    """The public function refuses it; called past that, the op must not drop it in silence."""
    query, stored, rows = int8_inputs()
    for name, x in stored.options().items():
        more = stored.options() | {name: x.clone().requires_grad_()}
        with torch.no_grad():  # where nobody asks for a gradient, nothing is refused
            F.doc_scores(query, stored.codes, rows=rows, **more)
        scores = doc_scores(query, stored.codes, rows, TAU, *more.values())[0]
        with pytest.raises(RuntimeError, match="gives no gradient to scale and offset"):
            finite(scores).sum().backward()


@pytest.mark.parametrize("stored", ["float32", "int8"])
def test_no_questions(stored: str, each_backend: str) -> None:
    query = torch.zeros(0, 5, requires_grad=True)
    rows = torch.zeros(0, 4).long()
    passages, more = torch.randn(9, 5), {}
    if stored == "int8":
        codes = random_codes(9, 5)
        passages, more = codes.codes, codes.options()
    scores, prior = both(query, passages, rows, **more)
    assert scores.shape == prior.shape == (0, 4)
    assert torch.autograd.grad(prior.sum(), query)[0].shape == (0, 5)


def test_missing_is_minus_infinity_and_never_read(each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    fresh = index[rows.clamp(min=0)]
    fresh[rows < 0] = torch.nan
    fresh.requires_grad_()
    for passages in (index, fresh):
        scores, prior = both(query, passages, rows)
        assert scores[0, -1] == -torch.inf and prior[0, -1] == -torch.inf
        torch.testing.assert_close(prior[0, :-1].exp().sum(), torch.ones_like(prior[0, 0]))
    grads = torch.autograd.grad(finite(prior).square().sum(), (query, fresh))
    assert all(g.isfinite().all() for g in grads) and (grads[1][rows < 0] == 0).all()


def test_entropy_of_the_prior(each_backend: str) -> None:
    """p log p is 0 * -inf where a passage is missing, and so NaN upstream, which must end there."""
    query, index, rows = inputs(torch.float32)
    prior = both(query, index, rows)[1]
    upstream = torch.where(prior == -torch.inf, torch.nan, 1.0 + prior)
    found = torch.autograd.grad(prior, query, upstream)[0]
    expected = torch.autograd.grad(
        both(query, index, rows)[1], query, torch.where(prior == -torch.inf, 0.0, upstream)
    )[0]
    assert torch.equal(found, expected) and found.isfinite().all()
    scores = F.doc_scores(query, index, rows=rows)
    assert torch.autograd.grad(scores, query, upstream)[0].isfinite().all()


def test_all_missing(each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    rows[2] = -1
    scores, prior = both(query, index, rows)
    assert (scores[2] == -torch.inf).all() and (prior[2] == -torch.inf).all()
    grad = torch.autograd.grad((prior.exp() * scores.clamp(min=-9)).sum(), query)[0]
    assert (grad[2] == 0).all() and grad.isfinite().all()


def test_one_passage_and_large_scores(each_backend: str) -> None:
    query = torch.full((1, 4), 100.0)
    scores, prior = both(query, torch.full((1, 1, 4), 100.0), None, 1.0)
    assert scores.item() == 40000.0 and prior.item() == 0.0
    scores, prior = both(query, torch.full((1, 3, 4), 100.0), None, 1.0)
    torch.testing.assert_close(prior.exp(), torch.full((1, 3), 1 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("index_grad", [False, True])
def test_blind_row_beyond_the_index_is_nan(index_grad: bool, blind: None) -> None:
    """Where values may not be looked at, such a row is NaN for its question and no fault."""
    query, index, rows = inputs()
    index.requires_grad_(index_grad)
    rows[1, 2] = len(index) + 7
    scores, prior = both(query, index, rows)
    assert scores[1, 2].isnan() and prior[1].isnan().all()
    assert not scores[[0, 2]].isnan().any() and not prior[[0, 2]].isnan().any()
    grad = torch.autograd.grad(finite(prior).square().sum(), query)[0]
    assert grad[[0, 2]].isfinite().all() and grad[1].isnan().all()


def test_more_passages_than_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU then runs the torch implementation; only a forced kernel is an error."""
    seen = []
    monkeypatch.setattr(backends, "why_not", lambda name: "")  # as on a machine with a GPU
    monkeypatch.setattr(
        backends, "choose", lambda *a, _f=backends.choose: (seen.append(a), _f(*a))[1]
    )
    for n_passages in (TRITON_MAX_PASSAGES, TRITON_MAX_PASSAGES + 1):
        both(torch.randn(1, 2, requires_grad=True), torch.randn(1, n_passages, 2), None)
    fitting, too_many = seen
    gpu = torch.device("cuda")
    assert backends.choose("doc_scores", gpu, *fitting[2:]) == "triton"
    assert backends.choose("doc_scores", gpu, *too_many[2:]) == "torch"
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="cannot run doc_scores: its kernel takes K of at most"):
        backends.choose("doc_scores", gpu, *too_many[2:])


def test_under_autocast(each_backend: str) -> None:
    """Scores in bfloat16 at tau = .05 would be off by .05 nats."""
    query, index, rows = inputs(torch.float32)
    expected = F.doc_scores(query, index, rows=rows, tau=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.doc_scores(query, index, rows=rows, tau=0.05), expected)


def test_under_reduced_matmul_precision(each_backend: str) -> None:
    """Trainers switch TF32 on for the generator; scores are float32 all the same, to the bit."""
    query, index = torch.randn(16, 512, requires_grad=True), torch.randn(90, 512)
    rows = torch.randint(90, (16, 8))

    def step() -> tuple[Tensor, Tensor]:
        scores = F.doc_scores(query, index, rows=rows, tau=0.05)
        return scores, torch.autograd.grad(scores.square().sum(), query)[0]

    expected, before = step(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = step()
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strided_inputs(each_backend: str) -> None:
    """Whatever lies with gaps; a transposed index a CPU leaves to torch, for to copy it is much."""
    query, index, rows = inputs(torch.float32)
    wide = torch.full((9, 8), torch.nan)
    wide[:, 2:7] = index
    turned = [x.detach().t().contiguous().t() for x in (query, rows)]
    fresh = index[rows.clamp(min=0)]
    pairs = [
        (both(turned[0], wide[:, 2:7], turned[1]), both(query, index, rows)),
        (both(query, fresh.mT.contiguous().mT, rows), both(query, fresh, rows)),
    ]
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_transposed_index(monkeypatch: pytest.MonkeyPatch) -> None:
    query, index, rows = inputs(torch.float32)
    expected = both(query, index, rows)
    turned = index.t().contiguous().t()
    for found, want in zip(both(query, turned, rows), expected, strict=True):
        torch.testing.assert_close(found, want)
    if not backends.why_not("cpp"):
        monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpp")
        with pytest.raises(RuntimeError, match="cpp cannot run doc_scores: it reads rows in place"):
            both(query, turned, rows)


def test_int8_strided_inputs(each_backend: str) -> None:
    query, stored, rows = int8_inputs(torch.float32)
    stored.scale = stored.scale[:1].expand(5)  # one scale for all components
    stored.offset = torch.randn(10)[::2]
    dense = {name: x.contiguous() for name, x in stored.options().items()}
    expected = both(query, stored.codes, rows, **dense)
    wide = torch.cat((stored.codes, stored.codes), 1)[:, :5]
    for found, want in zip(both(query, wide, rows, **stored.options()), expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("mode", ["gathered", "fresh"])
def test_not_finite(mode: str, each_backend: str) -> None:
    """NaN and infinity end where log_softmax has them, and never at a missing passage."""
    query, index, rows = inputs(torch.float32, (5, 4, 33, 9))
    rows[:] = torch.tensor([0, 1, 2, -1])
    index[3], index[4], index[5] = torch.nan, torch.inf, -torch.inf
    query.detach().abs_()
    rows[1, 1], rows[2, 1], rows[3, 1], rows[4, :3] = 3, 4, 5, 5
    passages = index if mode == "gathered" else index[rows.clamp(min=0)].requires_grad_()
    leaves = (query, passages)[: 1 + (mode == "fresh")]
    scores, prior = both(query, passages, rows)
    expected = (query.detach().unsqueeze(1) * index[rows.clamp(min=0)]).sum(2) / TAU
    expected = expected.masked_fill(rows < 0, -torch.inf)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    expected = expected.log_softmax(1).masked_fill(rows < 0, -torch.inf)
    torch.testing.assert_close(prior, expected, equal_nan=True)
    assert prior[[1, 2, 4], :3].isnan().all() and prior[3, 1] == -torch.inf
    grads = torch.autograd.grad((scores, prior), leaves, (torch.ones_like(prior),) * 2)
    assert all(g[0].isfinite().all() and g[1].isnan().any() for g in grads)
    if mode == "fresh":
        assert (grads[1][:, 3] == 0).all() and (grads[1][3, 1] == 0).all()


def test_cpp_is_what_a_cpu_takes() -> None:
    expected = "torch" if backends.why_not("cpp") else "cpp"
    assert backends.choose("doc_scores", torch.device("cpu"), torch.float32) == expected
    assert backends.choose("doc_scores", torch.device("cpu"), torch.float64) == "torch"


@offsets
def test_int8_opcheck(with_offset: bool, each_backend: str) -> None:
    query, stored, rows = int8_inputs(torch.float32, with_offset=with_offset)
    more = tuple(stored.options().values())
    torch.library.opcheck(doc_scores_op, (query, stored.codes, rows, TAU, *more))
    prior = both(query, stored.codes, rows, **stored.options())[1].detach()
    args = (None, torch.randn_like(prior), prior, query.detach(), stored.codes, rows, TAU,
            True, False, *more)  # fmt: skip
    torch.library.opcheck(doc_scores_backward_op, args)


@pytest.mark.parametrize("gathered", [True, False])
def test_opcheck(gathered: bool, each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    passages = index if gathered else index[rows.clamp(min=0)].requires_grad_()
    torch.library.opcheck(doc_scores_op, (query, passages, rows, TAU))
    prior = both(query, passages, rows)[1].detach()
    args = (torch.randn_like(prior), None, prior, query.detach(), passages.detach(), rows, TAU,
            True, not gathered)  # fmt: skip
    torch.library.opcheck(doc_scores_backward_op, args)


class Seen(TorchDispatchMode):
    """Writes down the ops of fastrag that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] * func.name().startswith("fastrag::")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_modes_see_the_op_that_a_plain_call_goes_around(mode: str, each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    chosen = None if mode == "fresh without rows" else rows
    passages = index if mode == "gathered" else index[rows.clamp(min=0)].requires_grad_()
    leaves = (query, passages)[: 1 + (mode != "gathered")]

    def step() -> list[Tensor]:
        scores, prior = both(query, passages, chosen)
        total = finite(scores).sum() + finite(prior).square().sum()
        return [scores, prior, *torch.autograd.grad(total, leaves)]

    plain = step()
    with Seen() as seen:
        watched = step()
    assert seen.names == ["fastrag::doc_scores", "fastrag::doc_scores_backward"]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert plain[0].grad_fn.name() == "DocScoresBackward" != watched[0].grad_fn.name()


def test_compile(each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = compiled(query, index, rows), both(query, index, rows)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(finite(x[1]).square().sum(), query)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


@offsets
def test_int8_compile(with_offset: bool, each_backend: str) -> None:
    query, stored, rows = int8_inputs(torch.float32, with_offset=with_offset)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, both):
        scores, prior = run(query, stored.codes, rows, **stored.options())
        results.append((scores, prior, *torch.autograd.grad(finite(prior).square().sum(), query)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile_with_changing_tau(each_backend: str) -> None:
    query, index, rows = inputs(torch.float32)
    compiled = torch.compile(F.doc_scores, fullgraph=True, backend="aot_eager")
    for tau in (1.0, 0.5, 0.25, torch.tensor(0.5, dtype=torch.float64)):
        found = compiled(query, index, rows=rows, tau=tau)
        torch.testing.assert_close(found, F.doc_scores(query, index, rows=rows, tau=tau))
