"""Gradients by slices of the vocabulary: when, how many products, in which dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag.ops import vocab_major, workspace
from fastrag.ops.chunks import LinearHead, TorchChunkLogits
from fastrag.testing import cpu_memory
from tests.ops.cases import (
    LOSSES,
    SHAPES,
    both_marginals,
    grads,
    make,
    with_and_without_smoothing,
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect (rows, token ids) of every buffer of logits."""
    found = []
    init = TorchChunkLogits.__init__

    def spy(self: TorchChunkLogits, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        found.append((len(x), head.n_ids))
        init(self, head, x, gold)

    monkeypatch.setattr(TorchChunkLogits, "__init__", spy)
    return found


def test_is_better_for_few_rows_of_many() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert vocab_major.is_better(10_000, 1023, cuda)
    assert not vocab_major.is_better(10_000, 1024, cuda)
    assert not vocab_major.is_better(1000, 1000, cuda)  # one chunk: dW is written once
    assert not vocab_major.is_better(10_000, 512, cpu)
    assert vocab_major.is_better(10_000, 8, cpu)


@both_marginals
def test_logits_are_made_once_where_a_chunk_knows_its_weights(
    marginal: str, opened: list[tuple[int, int]]
) -> None:
    p = make(SHAPES["odd"], padding=False)
    LOSSES[marginal](*p.args()).backward()
    assert opened == [(3 * 5 * 7, 131)]


@both_marginals
def test_a_long_example_goes_by_vocab_slices(
    marginal: str, opened: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAG-Sequence, whose group is an example; RAG-Token cuts it between positions."""
    p = make(SHAPES["odd"], padding=False)
    monkeypatch.setattr(vocab_major, "LEAST_ROWS", {"cpu": 1})
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(20 * 131 * 8))  # an example has 35 rows
    LOSSES[marginal](*p.args()).backward()
    ids = [n for rows, n in opened if rows == 105]
    assert sum(ids) == (131 if marginal == "sequence" else 0)
    rows = [n for n, ids in opened if ids == 131]
    assert sum(rows) == 105 and max(rows) <= 20


@both_marginals
def test_vector_gradient_makes_the_logits_twice(
    marginal: str, opened: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make(SHAPES["odd"], padding=False)
    nll = LOSSES[marginal](*p.args(), reduction="none")
    assert opened == [(105, 131)]
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(105 * 40 * 8))
    nll.sum().backward()
    assert [rows for rows, _ in opened] == [105] * len(opened)
    assert sum(ids for _, ids in opened) == 2 * 131 and len(opened) > 2


@both_marginals
@with_and_without_smoothing
def test_vector_gradient_of_a_frozen_head_makes_them_once(
    marginal: str, smoothing: float, opened: list[tuple[int, int]]
) -> None:
    p = make(SHAPES["odd"], head="softcap")
    upstream = torch.randn(len(p.labels), dtype=torch.float64)
    settings = {**p.head(), "label_smoothing": smoothing, "reduction": "none"}
    expected = grads(LOSSES[marginal](*p.args(), **settings), p, upstream)
    opened.clear()
    assert p.bias is not None
    for x in (p.weight, p.bias):
        x.requires_grad_(False)
    nll = LOSSES[marginal](*p.args(), **settings)
    found = torch.autograd.grad(nll, (p.hidden, p.doc_scores), upstream, retain_graph=True)
    for name, grad in zip(("hidden", "doc_scores"), found, strict=True):
        torch.testing.assert_close(grad, expected[name])
    again = torch.autograd.grad(nll, (p.hidden, p.doc_scores), upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert len(opened) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradient_of_the_head_is_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sums in float32."""
    monkeypatch.setattr(workspace, "multiplies", lambda dtype: False)
    p = make((2, 3, 4, 8, 300), head="bias").to(dtype)
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", "6000")
    upstream = torch.randn(2, 3, 4)
    found = torch.autograd.grad(
        F.token_logp(p.hidden, p.weight, p.labels, bias=p.bias), (p.weight, p.bias), upstream
    )
    q = p.to(torch.float32)
    expected = torch.autograd.grad(
        F.token_logp(q.hidden, q.weight, q.labels, bias=q.bias), (q.weight, q.bias), upstream
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        bound = 0.5 * torch.finfo(dtype).eps * b.abs() + 1e-6 * b.abs().max()
        assert ((a.float() - b).abs() <= bound).all()


def test_no_float32_copy_of_the_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 18
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(limit))
    p = make((1, 2, 8, 64, 8192)).to(torch.bfloat16)
    logp = F.token_logp(p.hidden, p.weight, p.labels)
    peak, _ = cpu_memory(lambda: torch.autograd.grad(logp.sum(), p.weight))
    assert p.weight.nbytes <= peak <= p.weight.nbytes + limit + (1 << 17) < 2 * p.weight.nbytes
