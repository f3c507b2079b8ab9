from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import vocab_major
from fastrag.ops.token_logp import token_logp, token_logp_backward
from fastrag.testing import assert_close, cpu_memory

from .cases import IGNORE, MANY, SHAPES, Problem, grads, make


def problem(shape: tuple[int, ...] = SHAPES["plain"], head: str = "plain") -> Problem:
    p = make(shape, head=head, missing=False)
    p.doc_scores.requires_grad_(False)
    return p


def run(p: Problem) -> Tensor:
    return F.token_logp(p.hidden, p.weight, p.labels, **p.head())


def oracle(p: Problem) -> Tensor:
    return reference.token_logp(p.hidden, p.weight, p.labels, **p.head())


def head_grads(out: Tensor, p: Problem, upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: x for name, x in p.leaves().items() if name != "doc_scores"}
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("op", ["reference", "op"])
def test_gradcheck(op: str, workspace: str) -> None:
    p = problem((2, 2, 2, 3, 4), head="softcap")
    f = reference.token_logp if op == "reference" else F.token_logp

    def logp(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return f(hidden, weight, p.labels, **{**p.head(), "bias": bias})

    assert torch.autograd.gradcheck(logp, (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("head", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64(head: str, shape: tuple[int, ...], workspace: str) -> None:
    p = problem(shape, head)
    out, true = run(p), oracle(p)
    torch.testing.assert_close(out, true, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    expected = head_grads(true, p, upstream)
    for name, grad in head_grads(out, p, upstream).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.usefixtures("each_backend")
def test_three_way(dtype: torch.dtype, head: str) -> None:
    p = problem(MANY, head).to(dtype)
    exact = p.to(torch.float64)
    out, plain, true = run(p), oracle(p), oracle(exact)
    assert out.dtype == torch.float32
    assert_close(out, plain.float(), true)
    upstream = torch.randn_like(out)
    base = head_grads(plain, p, upstream.to(plain.dtype))
    expected = head_grads(true, exact, upstream.double())
    for name, grad in head_grads(out, p, upstream).items():
        assert grad.dtype == dtype
        assert_close(grad, base[name], expected[name], name=name)


@pytest.mark.usefixtures("each_backend")
def test_logits_around_ten_thousand() -> None:
    p = problem(MANY, "bias")
    with torch.no_grad():
        p.bias += 1e4
    p = p.to(torch.float32)
    assert_close(run(p), oracle(p), oracle(p.to(torch.float64)))


def test_ignored_labels() -> None:
    p = problem()
    with torch.no_grad():
        p.hidden[0, :, -1] = torch.nan
    out = run(p)
    assert (out[0, :, -1] == 0).all() and out.isfinite().all()
    found = head_grads(out, p, torch.full_like(out, 3.0))
    assert (found["hidden"][0, :, -1] == 0).all() and found["weight"].isfinite().all()
    p.labels.fill_(IGNORE)
    assert (run(p) == 0).all()


def test_blind(workspace: str, blind: None) -> None:
    """Where values may not be looked at, a bad label gives NaN, forward and backward."""
    p = problem(SHAPES["odd"], "softcap")
    with torch.no_grad():
        p.hidden[0, :, -1] = torch.nan  # ignored
    expected = run(p)
    assert (expected[0, :, -1] == 0).all()
    upstream = torch.randn_like(expected)
    clean = head_grads(expected, p, upstream)
    true = p.to(torch.float64)
    true.hidden = p.hidden.detach().nan_to_num(0.0).requires_grad_()
    torch.testing.assert_close(expected, oracle(true), rtol=1e-12, atol=1e-12)
    for name, grad in head_grads(oracle(true), true, upstream).items():
        torch.testing.assert_close(clean[name], grad, rtol=1e-11, atol=1e-12)
    p.labels[1, 2] = 131
    out = run(p)
    assert out[1, :, 2].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
    found = head_grads(out, p, upstream)
    assert found["hidden"][1, :, 2].isnan().all() and found["weight"].isnan().any()
    assert torch.equal(found["hidden"][[0, 2]], clean["hidden"][[0, 2]])


def test_strided_inputs() -> None:
    p = problem(SHAPES["odd"])
    expected = run(p)
    hidden = p.hidden.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    weight = p.weight.detach().t().contiguous().t()
    out = F.token_logp(hidden, weight, p.labels.t().contiguous().t())
    torch.testing.assert_close(out, expected)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 20
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(limit))
    p = problem((2, 4, 64, 8, 4099)).to(torch.float32)  # [B, K, T, V]: 8.4 MB

    def both_ways() -> dict[str, Tensor]:
        out = run(p)
        return head_grads(out, p, torch.ones_like(out))

    both_ways()
    peak, largest = cpu_memory(both_ways)
    kept = 4 * (p.hidden.numel() + p.weight.numel())
    assert largest <= limit
    assert peak <= limit + kept + (1 << 17)


def test_opcheck() -> None:
    p = problem(head="softcap")
    args = (p.hidden, p.weight, p.bias, p.labels, 2.0, 0.7, IGNORE)
    for need in ((True, True, True), (True, False, False), (False, False, False)):
        # What is not needed is told so by its tensor too.
        leaves = [
            x.detach().requires_grad_(needed) for x, needed in zip(args[:3], need, strict=True)
        ]
        # The last check compares outputs after a backward that may have scaled them, its own.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        if need[1] or not need[0]:
            checks += ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(token_logp, (*leaves, *args[3:], *need), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need", [(True, False, True), (False, True, False)], ids=str)
def test_opcheck_backward(dtype: torch.dtype, need: tuple[bool, bool, bool]) -> None:
    p = problem(head="softcap").to(dtype)
    inputs = [x.detach() for x in (p.hidden, p.weight, p.bias, p.labels)]
    logp, log_z, _ = token_logp(*inputs, 2.0, 0.7, IGNORE, True, True, True)
    present = torch.rand(p.hidden.shape[:2]) < 0.8
    args = (torch.randn_like(logp), log_z, *inputs, present, None, 2.0, 0.7, 0.1, IGNORE, *need)
    torch.library.opcheck(token_logp_backward, args)


@pytest.mark.parametrize("head", ["plain", "softcap"])
def test_frozen_head(head: str, workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward makes dX, which backward scales: the logits are made once."""
    p = problem(head=head)
    upstream = torch.randn(p.hidden.shape[:-1], dtype=torch.float64)
    expected = head_grads(run(p), p, upstream)["hidden"]
    for x in (p.weight, p.bias):
        if x is not None:
            x.requires_grad_(False)
    out = run(p)
    monkeypatch.setattr(vocab_major, "add_gradients", None)
    (found,) = torch.autograd.grad(out, p.hidden, upstream, retain_graph=True)
    torch.testing.assert_close(found, expected)
    (again,) = torch.autograd.grad(out, p.hidden, upstream)
    assert torch.equal(found, again)


def test_compile() -> None:
    p = problem()
    compiled = torch.compile(F.token_logp, fullgraph=True, backend="aot_eager")
    out, expected = compiled(p.hidden, p.weight, p.labels), run(p)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    found = head_grads(out, p, upstream)
    for name, grad in head_grads(expected, p, upstream).items():
        torch.testing.assert_close(found[name], grad)


def test_double_backward_is_refused() -> None:
    p = problem()
    grad = torch.autograd.grad(run(p).sum(), p.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="token_logp does not support double backward"):
        torch.autograd.grad(grad.square().sum(), p.hidden)


def test_forward_mode_is_refused() -> None:
    p = problem()
    with pytest.raises(RuntimeError, match="token_logp does not support forward-mode"):
        torch.func.jvp(
            lambda x: F.token_logp(x, p.weight, p.labels), (p.hidden,), (torch.ones_like(p.hidden),)
        )


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_empty(sizes: tuple[int, ...]) -> None:
    p = make((*sizes, 5, 7), padding=False, missing=False)
    out = run(p)
    assert out.shape == sizes
    assert all((grad == 0).all() for grad in head_grads(out, p, out).values())


def test_composes_into_the_marginal() -> None:
    """The sum the fused losses form themselves, from token_logp and plain torch."""
    p = make(missing=False)
    prior = p.doc_scores.log_softmax(1)
    logp = F.token_logp(p.hidden, p.weight, p.labels)
    nll = -(prior + logp.sum(2)).logsumexp(1)
    fused = F.rag_sequence_nll(*p.args(), reduction="none")
    torch.testing.assert_close(nll, fused)
    expected = grads(fused.sum(), p)
    for name, grad in grads(nll.sum(), p).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(2, 4).long()),
         r"hidden: expected \[B, K, T, H\], got \[2, 3, 4\]"),
        ((torch.zeros(2, 0, 3, 4), torch.zeros(7, 4), torch.zeros(2, 3).long()), "K = 0"),
        ((torch.zeros(1, 1, 1, 4), torch.zeros(7, 4), torch.tensor([[7]])),
         r"labels: expected values in \[0, 7\) or ignore_index, got 7 at \[0, 0\]"),
        (([1.0], torch.zeros(7, 4), torch.zeros(2, 3).long()), "hidden: expected a tensor"),
    ],
)  # fmt: skip
def test_rejects_bad_input(args: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.token_logp(*args)


def test_rejects_an_ignore_index_that_is_no_whole_number() -> None:
    with pytest.raises(ValueError, match="^ignore_index: expected a whole number, got 'none'$"):
        F.token_logp(
            torch.zeros(1, 1, 1, 4),
            torch.zeros(7, 4),
            torch.zeros(1, 1).long(),
            ignore_index="none",
        )
