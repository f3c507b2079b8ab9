"""Posterior-pruned training against the plain path and a literal reference."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fastrag import reference
from fastrag.data.processor import Contexts
from fastrag.nn import LMHead, RagLoss, Reader
from fastrag.nn.pruning import pruned_loss
from tests.tiny import CHECKPOINTING, T5, batch, rag_model

OBJECTIVES = ["marginal", "emdr2", "pdist", "topk:2"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}  # scores are in float32, whatever the model is in
ROWS = torch.tensor([[0, 3, 1], [4, 1, -1], [2, 5, 6], [7, 8, 9]])


def model_of(kind="seq2seq", **settings):
    """A model in float64 whose posterior over ROWS is neither flat nor decided."""
    model = rag_model(kind, tau=0.3, **settings).double()
    model.index.to("cpu")
    return model


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model, seed=0, **inputs):
    torch.manual_seed(seed)
    out = model(**batch(), rows=ROWS, **inputs)
    out.loss.backward()
    return out, gradients(model)


def assert_same(got, want):
    assert got.keys() == want.keys()
    torch.testing.assert_close(got, want, **TOLERANCE)  # names the parameter


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_is_lost_at_zero(objective, marginal):
    model = model_of(objective=objective, marginal=marginal)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    plain, expected = step(model, example_weight=weights, num_items_in_batch=11)
    model.prune = 0.0
    pruned, got = step(model, example_weight=weights, num_items_in_batch=11)
    torch.testing.assert_close(pruned.loss, plain.loss)
    torch.testing.assert_close(pruned.log_posterior, plain.log_posterior)
    assert_same(got, expected)
    # topk reads two passages of each question, the others eleven: one is missing
    assert int(pruned.n_kept) == (8 if objective == "topk:2" else 11)


def test_dropout_masks_are_those_of_the_plain_path():
    """The first pass draws no random numbers."""
    model = model_of(
        make_generator=lambda: T5ForConditionalGeneration(T5Config(**T5 | {"dropout_rate": 0.3}))
    )
    data = {**batch(), "rows": ROWS.clamp(min=0)}  # all kept
    found = []
    for model.prune in (None, 0.0):
        torch.manual_seed(1)
        out = model(**data)
        out.loss.backward()
        found.append((out.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same(found[1][1], found[0][1])


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_error_is_bounded_by_the_dropped_posterior(kind, marginal):
    model = model_of(kind, marginal=marginal)
    plain, expected = step(model)
    largest = plain.log_posterior.detach().exp()
    largest = largest if marginal == "sequence" else largest.amax(2)
    eps = float(largest.flatten().sort().values[5:7].mean())  # drops up to six of twelve
    model.prune = eps
    pruned, got = step(model)
    kept = (largest > eps) | (largest == largest.amax(1, keepdim=True))
    assert int(pruned.n_kept) == int(kept.sum()) < 11
    torch.testing.assert_close(pruned.loss, plain.loss)
    mass = plain.log_posterior.detach().exp()
    mass = (mass * (~kept if marginal == "sequence" else ~kept.unsqueeze(2))).sum(1)
    counted = batch()["labels"] != -100
    per_label = mass if marginal == "sequence" else mass[counted]
    torch.testing.assert_close(pruned.dropped, per_label.mean())
    retriever = "retriever."
    exact = {n: g for n, g in got.items() if n.startswith(retriever)}
    assert_same(exact, {n: g for n, g in expected.items() if n.startswith(retriever)})
    # The gradients of single contexts, each with weight 1: |error| <= dropped mass x the largest.
    names = [n for n in got if n.startswith("reader.")]
    error = torch.cat([(got[n] - expected[n]).flatten() for n in names]).norm()
    context = model.contexts(ROWS, batch()["prompt_ids"], batch()["prompt_mask"])
    hidden = model.reader(context.ids, context.mask, batch()["labels"])
    pairs = model.loss_fn.pairs(hidden, model.reader.head(), batch()["labels"], 3)
    total = 0.0
    for b in range(4):
        for t in range(pairs.evidence.shape[2]):
            if marginal == "token" and not counted[b, t]:
                continue
            norms = []
            for k in range(3):
                parameters = list(model.reader.parameters())
                grads = torch.autograd.grad(
                    pairs.evidence[b, k, t], parameters, retain_graph=True, allow_unused=True
                )
                norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
            total += float((mass[b] if marginal == "sequence" else mass[b, t]) * max(norms))
    assert 0 < error <= total / int(counted.sum())


class Given(Reader):
    """A reader whose hidden states are given: context i of them is the token id i."""

    kind = "seq2seq"

    def __init__(self, hidden, weight):
        torch.nn.Module.__init__(self)
        self.given, self.weight = hidden, weight

    def forward(self, ids, mask, labels):
        return self.given.flatten(0, 1)[ids[:, 0]].unflatten(0, (len(labels), -1))

    def head(self):
        return LMHead(self.weight)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_equals_the_literal_reference(marginal):
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, 3], [1, 2, -100]])
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, 3, 5), (9, 5), (2, 4))]
    hidden, weight, scores = (leaf.requires_grad_() for leaf in leaves)
    ids = torch.arange(8).unsqueeze(1)
    contexts = Contexts(ids, torch.ones_like(ids), *torch.zeros(3))
    plain = RagLoss(marginal)(hidden, LMHead(weight), labels, scores).log_posterior.exp()
    largest = (
        plain
        if marginal == "sequence"
        else plain.masked_fill((labels < 0).unsqueeze(1), 0.0).amax(2)
    )
    eps = float(largest.flatten().sort().values[3:5].mean())
    read = (largest > eps) | (largest == largest.amax(1, keepdim=True))
    got = pruned_loss(Given(hidden, weight), RagLoss(marginal), contexts, labels, scores, eps=eps)
    logp = reference.token_logp(hidden, weight, labels)
    nll = reference.pruned_nll(logp, logp, read, scores, labels >= 0, marginal)
    want = reference.reduce(nll, labels)
    assert int(got.n_kept) == int(read.sum()) < 8
    torch.testing.assert_close(got.loss, want)
    grads = [torch.autograd.grad(each, (hidden, weight, scores)) for each in (got.loss, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_unbiased_gradient_is_the_plain_one_on_average(marginal):
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, 3], [1, 2, -100]])
    scores = torch.randn(2, 4, dtype=torch.float64)
    weight = torch.randn(9, 5, dtype=torch.float64)
    hidden = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(8).unsqueeze(1)
    contexts = Contexts(ids, torch.ones_like(ids), *torch.zeros(3))
    loss_fn = RagLoss(marginal)
    loss_fn(hidden, LMHead(weight), labels, scores).loss.backward()
    expected, hidden.grad = hidden.grad, None
    reader, n = Given(hidden, weight), 400
    kept = 0
    for _ in range(n):
        out = pruned_loss(reader, loss_fn, contexts, labels, scores, eps=0.4, unbiased=True)
        (out.loss / n).backward()
        kept += int(out.n_kept)
    assert 2 <= kept / n < 8
    biased = torch.autograd.grad(
        pruned_loss(reader, loss_fn, contexts, labels, scores, eps=0.4).loss, hidden
    )[0]
    error = (hidden.grad - expected).norm()
    assert error < 0.1 * expected.norm() and error < 0.5 * (biased - expected).norm()


def test_autocast_and_checkpointing_keep_the_gradients():
    plain = rag_model(tau=0.3)
    getattr(plain, f"{CHECKPOINTING}_enable")()
    losses = []
    for plain.prune in (None, 0.0):
        with torch.autocast("cpu", torch.bfloat16):
            out = plain(**batch(), rows=ROWS)
        out.loss.backward()
        losses.append((out.loss.detach(), gradients(plain)))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-2, atol=1e-2)
    assert losses[0][1].keys() == losses[1][1].keys()
    for name, grad in losses[1][1].items():
        assert (grad - losses[0][1][name]).norm() <= 0.1 * losses[0][1][name].norm() + 1e-3, name


def test_evaluation_reads_every_context_once(monkeypatch):
    model = model_of()
    expected = model.eval()(**batch(), rows=ROWS).loss
    model.prune = 0.5
    out = model(**batch(), rows=ROWS)
    assert out.n_kept is None
    torch.testing.assert_close(out.loss, expected)


def test_questions_without_passages_or_labels_have_no_gradient():
    model = model_of(prune=0.01)
    data = batch()
    data["labels"][3] = -100
    rows = ROWS.clone()
    rows[1] = -1
    out = model(**data, rows=rows)
    out.loss.backward()
    expected = model.eval()(**data, rows=rows)
    torch.testing.assert_close(out.loss, expected.loss)
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_smoothed_sequence():
    model = model_of(marginal="sequence", label_smoothing=0.1)
    plain, expected = step(model)
    model.prune = 0.0
    pruned, got = step(model)
    torch.testing.assert_close(pruned.loss, plain.loss)
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune": 1.0}, "prune: expected 0 <= number < 1 or None, got 1.0"),
        ({"prune_unbiased": True}, "prune_unbiased: expected False without prune, got True"),
        ({"prune": 0.1, "objective": "replug"}, "prune: expected None with the objective replug"),
        ({"prune": 0.1, "label_smoothing": 0.1}, "prune: expected None where the Token marginal"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        rag_model(**settings)
