"""RAG-Token and RAG-Sequence under autograd and torch.compile: what is saved, allowed, refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrag.ops.chunks import HeadGradients
from fastrag.ops.marginal_nll import marginal_nll
from fastrag.testing import cpu_memory

from .cases import (
    IGNORE,
    LOSSES,
    SHAPES,
    Problem,
    both_marginals,
    grads,
    make,
    with_and_without_smoothing,
)


@both_marginals
def test_frozen_parts(marginal: str) -> None:
    """Each input may be frozen; the gradients of the others do not change."""
    p = make(head="bias")
    expected = grads(LOSSES[marginal](*p.args(), **p.head()), p)
    for frozen in expected:
        q = p.to(torch.float64)
        getattr(q, frozen).requires_grad_(False)
        LOSSES[marginal](*q.args(), **q.head()).backward()
        for name, x in q.leaves().items():
            if name == frozen:
                assert x.grad is None
            else:
                torch.testing.assert_close(x.grad, expected[name])


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph(marginal: str, reduction: str) -> None:
    """What the first backward returned stays as it is, whatever later ones do."""
    p = make(head="bias")
    leaves = list(p.leaves().values())
    loss = LOSSES[marginal](*p.args(), **p.head(), reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    # Powers of two: every term of every sum scales exactly, and so does the sum.
    second = torch.autograd.grad(2.0 * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(4.0 * loss, leaves)
    for one, before, two, four in zip(first, kept, second, last, strict=True):
        assert torch.equal(one, before)
        assert torch.equal(two, 2.0 * one) and torch.equal(four, 4.0 * one)


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_with_a_graph_of_their_own(marginal: str, reduction: str) -> None:
    """create_graph asks for a graph of the gradients, not to keep that of the loss."""
    p = make(head="bias")
    leaves = list(p.leaves().values())

    def loss() -> Tensor:
        return LOSSES[marginal](*p.args(), **p.head(), reduction=reduction).sum()

    expected = torch.autograd.grad(loss(), leaves)
    found = torch.autograd.grad(loss(), leaves, create_graph=True, retain_graph=False)
    for a, b in zip(found, expected, strict=True):
        assert a.requires_grad and torch.equal(a, b)


@both_marginals
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_copies_no_gradient(marginal: str, weight_dtype: torch.dtype) -> None:
    """Where the graph is freed, the gradients that the forward made are scaled in place."""
    p = make((2, 3, 4, 64, 4099)).to(torch.float32)
    p.weight = p.weight.detach().to(weight_dtype).requires_grad_()
    loss = LOSSES[marginal](*p.args())
    kept = cpu_memory(lambda: loss.backward(retain_graph=True))[0]
    p.weight.grad = None
    freed = cpu_memory(lambda: loss.backward())[0]
    assert kept >= p.weight.nbytes
    assert freed < p.weight.nbytes / 2


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leaf", ["hidden", "weight", "doc_scores"])
def test_double_backward_is_refused(marginal: str, reduction: str, leaf: str) -> None:
    p = make()
    loss = LOSSES[marginal](*p.args(), reduction=reduction).sum()
    x = p.leaves()[leaf]
    grad = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="marginal_nll does not support double backward"):
        torch.autograd.grad(grad.square().sum() + x.square().sum(), x)


@both_marginals
@pytest.mark.parametrize("leaf", ["hidden", "weight", "doc_scores", "example_weight"])
def test_forward_mode_is_refused(marginal: str, leaf: str) -> None:
    """Without a refusal the tangent would be dropped: a derivative of 0, and no word about it."""
    p = make()
    inputs = {**p.leaves(), "example_weight": torch.ones(2, dtype=torch.float64)}
    inputs = {name: x.detach() for name, x in inputs.items()}

    def loss(x: Tensor) -> Tensor:
        return LOSSES[marginal](labels=p.labels, **{**inputs, leaf: x})

    with pytest.raises(RuntimeError, match="marginal_nll does not support forward-mode"):
        torch.func.jvp(loss, (inputs[leaf],), (torch.ones_like(inputs[leaf]),))


@both_marginals
def test_vmap_is_refused_where_gradients_are_wanted(marginal: str) -> None:
    """vmap loops over an op below autograd: values are right, gradients would be lost."""
    p = make()
    hidden = torch.stack([p.hidden.detach(), 2.0 * p.hidden.detach()]).requires_grad_()
    loss = torch.func.vmap(lambda x: LOSSES[marginal](x, *p.args()[1:]))(hidden)
    expected = [LOSSES[marginal](x, *p.args()[1:]) for x in hidden]
    torch.testing.assert_close(loss, torch.stack(expected))
    with pytest.raises(RuntimeError, match="was told not to differentiate input 0"):
        torch.autograd.grad(loss.sum(), hidden)


@both_marginals
def test_activation_checkpoint(marginal: str) -> None:
    p = make()
    expected = grads(LOSSES[marginal](*p.args()), p)
    loss = torch.utils.checkpoint.checkpoint(LOSSES[marginal], *p.args(), use_reentrant=False)
    for name, grad in grads(loss, p).items():
        torch.testing.assert_close(grad, expected[name])


@both_marginals
@with_and_without_smoothing
def test_no_grad_computes_no_gradients(
    marginal: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make(SHAPES["odd"])
    expected = LOSSES[marginal](*p.args(), label_smoothing=smoothing).detach()
    monkeypatch.setattr(HeadGradients, "add", None)  # every gradient passes through it
    with pytest.raises(TypeError):
        LOSSES[marginal](*p.args(), label_smoothing=smoothing)
    with torch.no_grad():
        loss = LOSSES[marginal](*p.args(), label_smoothing=smoothing)
    assert torch.equal(loss, expected) and not loss.requires_grad


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("head", ["plain", "softcap"])
def test_memory(
    marginal: str, smoothing: float, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never [B*K, T, V]: beyond the gradients, one workspace and what is O(B K T)."""
    limit = 1 << 20
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(limit))
    shape = (2, 4, 64, 8, 4099)  # B*K*T*V float32 numbers: 8.4 MB; an example: 4.2 MB
    p = make(shape, head=head).to(torch.float32)

    def run() -> Tensor:
        return LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing)

    run()
    peak, largest = cpu_memory(run)
    full = 4 * math.prod((2, 4, 64, 4099))
    kept = 4 * (p.hidden.numel() + p.weight.numel() + len(p.weight))
    assert largest <= limit < full / 8 + 1
    assert peak <= limit + kept + (1 << 17)


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("deferred", [False, True], ids=["mean", "none"])
def test_opcheck(marginal: str, smoothing: float, deferred: bool) -> None:
    p = make(head="softcap")
    needs = (True, True, True, True)
    args = (p.hidden, p.weight, p.bias, p.labels, p.doc_scores, None, None, marginal, 2.0, 0.7,
            smoothing, IGNORE, deferred, *needs)  # fmt: skip
    torch.library.opcheck(marginal_nll, args)


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(marginal: str, reduction: str) -> None:
    p = make()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        return LOSSES[marginal](hidden, weight, labels, scores, reduction=reduction).sum() * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(*p.args()), compiled(*p.args())
    torch.testing.assert_close(found, expected)
    expected_grads = grads(expected, p)
    for name, grad in grads(found, p).items():
        torch.testing.assert_close(grad, expected_grads[name])


@both_marginals
def test_compile_with_changing_sizes_and_settings(marginal: str) -> None:
    """The second size or setting is a symbol to the compiler, and no reason for a graph break."""

    def loss(p: Problem, softcap: float, smoothing: float, normalizer: float) -> Tensor:
        options = {"softcap": softcap, "label_smoothing": smoothing, "normalizer": normalizer}
        return LOSSES[marginal](torch.tanh(p.hidden), *p.args()[1:], **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape, *settings in (((2, 3, 4, 5, 7), 2.0, 0.1, 3.0), ((3, 2, 6, 5, 9), 3.0, 0.2, 4.0)):
        p = make(shape)
        expected, found = loss(p, *settings), compiled(p, *settings)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads(found, p), grads(expected, p))


@both_marginals
def test_deterministic(marginal: str) -> None:
    p = make(SHAPES["odd"]).to(torch.float32)
    first = grads(LOSSES[marginal](*p.args()), p)
    for _ in range(3):
        for name, grad in grads(LOSSES[marginal](*p.args()), p).items():
            assert torch.equal(grad, first[name])
