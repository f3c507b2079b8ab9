"""RAG-Token and RAG-Sequence in what training code does with them, on each backend of a CPU."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastrag import reference
from fastrag.ops import workspace
from fastrag.ops.chunks import HeadGradients
from fastrag.testing import assert_close

from .cases import (
    IGNORE,
    LOSSES,
    MANY,
    SHAPES,
    Problem,
    both_marginals,
    grads,
    make,
    oracle,
    with_and_without_smoothing,
)

# B, K, T, H, V: one comment per regime
EDGES = {
    **SHAPES,
    "two token ids": (3, 2, 3, 4, 2),  # fewer than a vector has lanes
    "one word": (2, 3, 2, 4, 1),  # certain, whatever the weights
    "one unit": (2, 3, 2, 1, 9),
    "many passages": (2, 33, 2, 4, 9),
}


def check(marginal: str, p: Problem, smoothing: float = 0.0) -> None:
    """Loss and gradients in float32 err no more than plain torch's, against float64."""
    exact = p.to(torch.float64)
    loss = LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing)
    plain = reference.reduce(oracle(marginal, p, smoothing)[0], p.labels)
    true = reference.reduce(oracle(marginal, exact, smoothing)[0], exact.labels)
    assert_close(loss, plain, true, name="loss", scale=1.0)
    found, base, expected = grads(loss, p), grads(plain, p), grads(true, exact)
    # Differences of probabilities, over the number of labels that count.
    scale = 1.0 / max(int((p.labels != IGNORE).sum()), 1)
    for name in expected:
        assert_close(found[name], base[name], expected[name], name=name, scale=scale)


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("shape", EDGES.values(), ids=EDGES.keys())
@pytest.mark.usefixtures("each_backend")
def test_edge_shapes(marginal: str, smoothing: float, shape: tuple[int, ...]) -> None:
    """With an example that has no label and one that has no passage, where there are three."""
    p = make(shape, head="softcap")
    if shape[0] > 2:
        p.labels[1] = IGNORE
        with torch.no_grad():
            p.doc_scores[2] = -torch.inf
    check(marginal, p.to(torch.float32), smoothing)


@both_marginals
@with_and_without_smoothing
@pytest.mark.usefixtures("each_backend")
def test_logits_around_minus_ten_thousand(marginal: str, smoothing: float) -> None:
    p = make(MANY, head="bias")
    with torch.no_grad():
        p.bias -= 1e4
    check(marginal, p.to(torch.float32), smoothing)


@both_marginals
@pytest.mark.usefixtures("each_backend")
def test_strided_inputs(marginal: str) -> None:
    """Hidden states cut out of a longer sequence, as generators do, and a transposed head."""
    q = make(SHAPES["odd"]).to(torch.float32)
    padded = torch.nn.functional.pad(q.hidden.detach(), (0, 0, 3, 2), value=torch.nan)
    q.hidden = padded[:, :, 3:-2].requires_grad_()
    q.weight = q.weight.detach().t().contiguous().t().requires_grad_()
    q.doc_scores = q.doc_scores.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    assert not any(x.is_contiguous() for x in q.leaves().values())
    check(marginal, q)


class Generator(nn.Module):
    """Embedding of a passage's tokens, a body, and a head that may be the embedding."""

    def __init__(self, vocab: int = 131, width: int = 16, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.body = nn.Linear(width, width)
        self.head = self.embed.weight if tied else nn.Parameter(torch.randn(vocab, width))
        self.scores = nn.Parameter(torch.randn(3, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embed(tokens)))

    def loss(self, nll: object, tokens: Tensor, labels: Tensor) -> Tensor:
        return nll(self(tokens), self.head, labels, self.scores)


def tokens_and_labels(vocab: int = 131) -> tuple[Tensor, Tensor]:
    tokens, labels = torch.randint(vocab, (3, 5, 7)), torch.randint(vocab, (3, 7))
    labels[0, -2:] = IGNORE
    return tokens, labels


def literal(marginal: str) -> object:
    """The reference, with the signature of the op."""

    def nll(hidden: Tensor, weight: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        p = Problem(hidden, weight, labels, scores)
        return reference.reduce(oracle(marginal, p)[0], labels)

    return nll


@both_marginals
@pytest.mark.usefixtures("each_backend")
def test_weight_tied_to_the_embedding(marginal: str) -> None:
    """One parameter looks tokens up and scores them; both gradients arrive, added up."""
    model, (tokens, labels) = Generator(tied=True), tokens_and_labels()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert exact.head is exact.embed.weight
    for m, nll in (
        (model, LOSSES[marginal]),
        (plain, literal(marginal)),
        (exact, literal(marginal)),
    ):
        m.loss(nll, tokens, labels).backward()
    for (name, x), y, z in zip(
        model.named_parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        assert_close(x.grad, y.grad, z.grad, name=name)
    head = nn.Parameter(exact.head.detach().clone())
    found = literal(marginal)(exact(tokens), head, labels, exact.scores)
    (alone,) = torch.autograd.grad(found, head)
    assert (exact.head.grad - alone).norm() > 0.1 * alone.norm()  # the lookup has its share


@both_marginals
@pytest.mark.usefixtures("each_backend")
def test_grad_scaler(marginal: str) -> None:
    """float16 under autocast and float32 masters: a step that overflows is skipped, the next holds.

    The hidden states of improbable passages get gradients that float16 has only with the scale.
    """
    model, (tokens, labels) = Generator(), tokens_and_labels()
    with torch.no_grad():
        model.scores[:, 1:] -= 16.0
    exact = copy.deepcopy(model).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step() -> tuple[Tensor, Tensor]:
        """Returns the loss and the gradient of the hidden states of improbable passages."""
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            hidden = model(tokens)
            hidden.retain_grad()
            loss = LOSSES[marginal](hidden, model.head, labels, model.scores)
        assert hidden.dtype == torch.float16 and loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), hidden.grad[:, 1:].float()

    before = [x.detach().clone() for x in model.parameters()]
    step()
    assert scaler.get_scale() == 2.0**16
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    loss, small = step()
    assert scaler.get_scale() == 2.0**16  # nothing overflowed
    rescued = (small != 0) & ((small / 2.0**16).half() == 0)
    assert rescued.float().mean() > 0.2
    true = exact.loss(literal(marginal), tokens, labels)
    true.backward()
    torch.testing.assert_close(loss.double(), true.detach(), rtol=2e-3, atol=0)
    for (name, x), y, start in zip(
        model.named_parameters(), exact.parameters(), before, strict=True
    ):
        error = ((start - x.detach()).double() - 0.5 * y.grad).norm()
        # Prior and posterior nearly cancel: their difference is as exact as they are.
        terms = 1.0 / int((labels != IGNORE).sum()) if name == "scores" else 0.0
        # Five roundings to float16, of 2**-11 each.
        assert error < 2.5e-3 * 0.5 * (y.grad.norm() + terms), name


@both_marginals
@pytest.mark.usefixtures("each_backend")
def test_autocast_with_masters(marginal: str) -> None:
    """bfloat16 hidden states, a float32 head: its gradient is rounded only by bfloat16 products."""
    model, (tokens, labels) = Generator(), tokens_and_labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(tokens)
            loss = LOSSES[marginal](hidden, model.head, labels, model.scores)
        loss.backward()
        losses.append(loss.item())
        grad = model.head.grad
        assert hidden.dtype == torch.bfloat16 and grad.dtype == torch.float32
        if not workspace.multiplies(torch.bfloat16):
            assert (grad != grad.bfloat16().float()).float().mean() > 0.9
        optimizer.step()
    assert all(b < a for a, b in pairwise(losses))


class Lora(nn.Module):
    """W x + B A x around a frozen layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


@both_marginals
def test_lora_on_the_body_of_a_frozen_model(marginal: str) -> None:
    model, (tokens, labels) = Generator().double(), tokens_and_labels()
    model.requires_grad_(False)
    model.body = Lora(model.body)
    model.scores.requires_grad_()
    model.loss(LOSSES[marginal], tokens, labels).backward()
    trained = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert set(trained) == {"body.a", "body.b", "scores"}
    model.zero_grad()
    model.loss(literal(marginal), tokens, labels).backward()
    for name, grad in trained.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-11, atol=1e-13)


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_head_has_no_gradient_made(
    marginal: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither dW nor db: not made and thrown away, but never asked for."""
    p = make(head="bias")
    p.weight.requires_grad_(False), p.bias.requires_grad_(False)
    made = []
    init = HeadGradients.__init__

    def spy(self: HeadGradients, *args: object, **needs: bool) -> None:
        made.append(needs)
        init(self, *args, **needs)

    monkeypatch.setattr(HeadGradients, "__init__", spy)
    LOSSES[marginal](*p.args(), **p.head(), reduction=reduction).sum().backward()
    assert p.hidden.grad is not None and p.doc_scores.grad is not None
    assert made[-1]["need_dx"] and not any(n["need_dw"] or n["need_db"] for n in made)
