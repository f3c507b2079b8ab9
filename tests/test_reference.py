"""The oracles against the definitions, spelled out by loops over probabilities."""

from __future__ import annotations

import ast
import inspect
import math

import torch

from fastrag import reference

B, K, T, H, V = 2, 3, 4, 5, 7


def inputs() -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(B, K, T, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64)
    labels = torch.randint(V, (B, T))
    labels[0, -1] = -100
    return hidden, weight, labels, torch.randn(B, K, dtype=torch.float64)


def test_imports_nothing_of_ours() -> None:
    tree = ast.parse(inspect.getsource(reference))
    modules = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert modules == {"__future__", "torch"}


def test_both_losses_by_hand() -> None:
    hidden, weight, labels, scores = inputs()
    token, token_posterior = reference.rag_token_nll(hidden, weight, labels, scores)
    sequence, sequence_posterior = reference.rag_sequence_nll(hidden, weight, labels, scores)
    for b in range(B):
        prior = [math.exp(s) for s in scores[b].tolist()]
        prior = [p / sum(prior) for p in prior]
        nll, products = 0.0, [1.0] * K
        for t in range(T):
            if labels[b, t] == -100:
                continue
            p = [(weight @ hidden[b, k, t]).softmax(0)[labels[b, t]].item() for k in range(K)]
            mixture = sum(prior[k] * p[k] for k in range(K))
            nll -= math.log(mixture)
            products = [products[k] * p[k] for k in range(K)]
            for k in range(K):
                found = token_posterior[b, k, t].exp().item()
                assert math.isclose(found, prior[k] * p[k] / mixture, rel_tol=1e-12)
        assert math.isclose(token[b].item(), nll, rel_tol=1e-12)
        total = sum(prior[k] * products[k] for k in range(K))
        assert math.isclose(sequence[b].item(), -math.log(total), rel_tol=1e-12)
        for k in range(K):
            found = sequence_posterior[b, k].exp().item()
            assert math.isclose(found, prior[k] * products[k] / total, rel_tol=1e-12)


def test_smoothing_of_one_passage_is_that_of_cross_entropy() -> None:
    hidden, weight, labels, scores = inputs()
    for loss in (reference.rag_token_nll, reference.rag_sequence_nll):
        nll = loss(hidden[:, :1], weight, labels, scores[:, :1], label_smoothing=0.2)[0]
        expected = torch.nn.functional.cross_entropy(
            (hidden[:, 0] @ weight.t()).flatten(0, 1),
            labels.flatten(),
            label_smoothing=0.2,
            reduction="sum",
        )
        torch.testing.assert_close(nll.sum(), expected)


def test_example_without_passages() -> None:
    hidden, weight, labels, scores = inputs()
    scores[1] = -torch.inf
    leaves = [x.requires_grad_() for x in (hidden, weight, scores)]
    for loss in (reference.rag_token_nll, reference.rag_sequence_nll):
        nll, posterior = loss(hidden, weight, labels, scores, label_smoothing=0.1)
        assert nll[1] == 0 and (posterior[1] == -torch.inf).all()
        grads = torch.autograd.grad(nll.sum(), leaves)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][1] == 0).all() and (grads[2][1] == 0).all()


def test_reduce() -> None:
    nll, labels = torch.tensor([2.0, 4.0]), torch.tensor([[1, 2], [3, -100]])
    weight = torch.tensor([1.0, 0.5])
    assert reference.reduce(nll, labels) == 2.0
    assert reference.reduce(nll, labels, "sum", example_weight=weight) == 4.0
    assert reference.reduce(nll, labels, normalizer=12) == 0.5
    assert reference.reduce(nll, torch.full_like(labels, -100)) == 0.0
