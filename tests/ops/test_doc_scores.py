from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends
from fastrag.ops.doc_scores import TRITON_MAX_PASSAGES, doc_scores, doc_scores_backward
from fastrag.testing import assert_close

TAU = 0.5


def inputs(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int, int] = (3, 4, 5, 9)
) -> tuple[Tensor, Tensor, Tensor]:
    n_examples, n_passages, width, n = sizes
    query = torch.randn(n_examples, width, dtype=dtype).requires_grad_()
    index = torch.randn(n, width, dtype=dtype)
    rows = torch.randint(n, (n_examples, n_passages))
    rows[0, -1] = -1
    rows[1, 0] = rows[1, 1]  # a duplicate
    return query, index, rows


def both(query: Tensor, passages: Tensor, rows: Tensor | None, tau: object = TAU) -> tuple:
    return F.doc_scores(query, passages, rows=rows, tau=tau, return_log_prior=True)


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["gathered", "fresh"])
def test_three_way(dtype: torch.dtype, mode: str) -> None:
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


def test_missing_is_minus_infinity_and_never_read() -> None:
    query, index, rows = inputs()
    fresh = index[rows.clamp(min=0)]
    fresh[rows < 0] = torch.nan
    fresh.requires_grad_()
    for passages in (index, fresh):
        scores, prior = both(query, passages, rows)
        assert scores[0, -1] == -torch.inf and prior[0, -1] == -torch.inf
        torch.testing.assert_close(prior[0, :-1].exp().sum(), torch.ones_like(prior[0, 0]))
    grads = torch.autograd.grad(finite(prior).square().sum(), (query, fresh))
    assert all(g.isfinite().all() for g in grads) and (grads[1][rows < 0] == 0).all()


def test_entropy_of_the_prior() -> None:
    """p log p is 0 * -inf where a passage is missing, and so NaN upstream, which must end there."""
    query, index, rows = inputs()
    prior = both(query, index, rows)[1]
    upstream = torch.where(prior == -torch.inf, torch.nan, 1.0 + prior)
    found = torch.autograd.grad(prior, query, upstream)[0]
    expected = torch.autograd.grad(
        both(query, index, rows)[1], query, torch.where(prior == -torch.inf, 0.0, upstream)
    )[0]
    assert torch.equal(found, expected) and found.isfinite().all()
    scores = F.doc_scores(query, index, rows=rows)
    assert torch.autograd.grad(scores, query, upstream)[0].isfinite().all()


def test_all_missing() -> None:
    query, index, rows = inputs()
    rows[2] = -1
    scores, prior = both(query, index, rows)
    assert (scores[2] == -torch.inf).all() and (prior[2] == -torch.inf).all()
    grad = torch.autograd.grad((prior.exp() * scores.clamp(min=-9)).sum(), query)[0]
    assert (grad[2] == 0).all() and grad.isfinite().all()


def test_one_passage_and_large_scores() -> None:
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


def test_under_autocast() -> None:
    """Scores in bfloat16 at tau = .05 would be off by .05 nats."""
    query, index, rows = inputs(torch.float32)
    expected = F.doc_scores(query, index, rows=rows, tau=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.doc_scores(query, index, rows=rows, tau=0.05), expected)


def test_under_reduced_matmul_precision() -> None:
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


def test_strided_inputs() -> None:
    query, index, rows = inputs()
    expected = both(query, index, rows)
    strided = [x.detach().t().contiguous().t() for x in (query, index, rows)]
    for found, want in zip(both(*strided), expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("gathered", [True, False])
def test_opcheck(gathered: bool) -> None:
    query, index, rows = inputs()
    passages = index if gathered else index[rows.clamp(min=0)].requires_grad_()
    torch.library.opcheck(doc_scores, (query, passages, rows, TAU))
    prior = both(query, passages, rows)[1].detach()
    args = (torch.randn_like(prior), None, prior, query.detach(), passages.detach(), rows, TAU,
            True, not gathered)  # fmt: skip
    torch.library.opcheck(doc_scores_backward, args)


def test_compile() -> None:
    query, index, rows = inputs()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found, expected = compiled(query, index, rows), both(query, index, rows)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(finite(x[1]).square().sum(), query)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads)


def test_compile_with_changing_tau() -> None:
    query, index, rows = inputs()
    compiled = torch.compile(F.doc_scores, fullgraph=True, backend="aot_eager")
    for tau in (1.0, 0.5, 0.25, torch.tensor(0.5, dtype=torch.float64)):
        found = compiled(query, index, rows=rows, tau=tau)
        torch.testing.assert_close(found, F.doc_scores(query, index, rows=rows, tau=tau))


@pytest.mark.parametrize("place", [0, 1])
def test_forward_mode_is_refused(place: int) -> None:
    query, index, rows = inputs()
    args = [query.detach(), index]

    def f(x: Tensor) -> Tensor:
        return F.doc_scores(*[x if i == place else args[i] for i in (0, 1)], rows=rows)

    with pytest.raises(RuntimeError, match="doc_scores does not support forward-mode"):
        torch.func.jvp(f, (args[place],), (torch.ones_like(args[place]),))


def test_double_backward_is_refused() -> None:
    query, index, rows = inputs()
    scores = finite(F.doc_scores(query, index, rows=rows))
    grad = torch.autograd.grad(scores.square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="doc_scores does not support double backward"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_emb": torch.zeros(3)}, r"query_emb: expected \[B, D\], got \[3\] float32"),
        ({"query_emb": torch.zeros(3, 5).long()}, "query_emb: expected a floating point dtype"),
        ({"passage_emb": torch.zeros(9, 4)}, r"passage_emb: expected \[N, D\].*\[\*, 5\], got"),
        ({"passage_emb": torch.zeros(2, 4, 5)}, r"passage_emb: expected \[B, K, D\].*\[3, \*, 5"),
        (
            {"passage_emb": torch.zeros(3, 0, 5), "rows": None},
            r"passage_emb: expected at least one .* K = 0 .*query_emb \[3, 5\].* \[3, 0, 5\]",
        ),
        (
            {"passage_emb": torch.zeros(3, 0, 5), "rows": torch.zeros(3, 0).long()},
            "passage_emb: expected at least one passage per question",
        ),
        ({"passage_emb": torch.zeros(0, 5)}, "passage_emb: expected at least one row"),
        ({"rows": None}, r"rows: expected \[B, K\] because passage_emb is the index matrix"),
        (
            {"rows": torch.zeros(3, 0).long()},
            r"rows: expected at least one .* K = 0 .*passage_emb \[9, 5\].*rows \[3, 0\] int64",
        ),
        ({"rows": torch.zeros(3, 4)}, "rows: expected int64 or int32, got .* float32"),
        ({"rows": torch.full((3, 4), 9)}, r"rows: expected values in \[0, 9\).* got 9 at \[0, 0"),
        ({"rows": torch.full((3, 4), -2)}, r"rows: expected values in .* got -2 at \[0, 0\]"),
        ({"tau": 0.0}, "tau: expected a positive number, got 0.0"),
        ({"tau": float("nan")}, "tau: expected a positive number, got nan"),
        ({"tau": torch.tensor(-1.0)}, "tau: expected a positive number, got -1.0"),
        ({"tau": torch.ones(1)}, "tau: expected a positive number or a 0-d tensor"),
    ],
)
def test_rejects_bad_input(changes: dict[str, object], message: str) -> None:
    query, index, rows = inputs(torch.float32)
    args = {"query_emb": query, "passage_emb": index, "rows": rows, **changes}
    with pytest.raises(ValueError, match=message):
        F.doc_scores(args.pop("query_emb"), args.pop("passage_emb"), **args)
