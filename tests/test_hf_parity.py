"""Our losses against transformers' own loss code, unbound, in float64.

`get_nll` shifts its targets left by one and calls a position ignored whose target is the pad token.
It takes logits; an identity head turns our hidden states into the same logits.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fastrag.functional as F

modeling_rag = pytest.importorskip("transformers.models.rag.modeling_rag")

PAD, VOCAB = 0, 11
OURS = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

both = pytest.mark.parametrize("marginal", ["token", "sequence"])


def hf_nll(
    marginal: str, logits: Tensor, labels: Tensor, scores: Tensor, smoothing: float = 0.0
) -> Tensor:
    """transformers' nll [B] for targets labels [B, T], of which PAD are ignored."""
    generator = SimpleNamespace(pad_token_id=PAD, bos_token_id=None)
    stub = SimpleNamespace(
        config=SimpleNamespace(n_docs=logits.shape[1], bos_token_id=None, generator=generator)
    )
    kind = (
        modeling_rag.RagTokenForGeneration
        if marginal == "token"
        else modeling_rag.RagSequenceForGeneration
    )
    if marginal == "token":
        stub.marginalize = lambda *args: kind.marginalize(stub, *args)
    # get_nll drops the first column and appends a pad: one column of logits more than targets.
    start = labels.new_ones(len(labels), 1)
    target = torch.cat([start, labels], 1)
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    return kind.get_nll(stub, logits.flatten(0, 1), scores, target, epsilon=smoothing)


def our_nll(
    marginal: str, logits: Tensor, labels: Tensor, scores: Tensor, smoothing: float = 0.0
) -> Tensor:
    head = torch.eye(VOCAB, dtype=logits.dtype)
    return OURS[marginal](
        logits, head, labels, scores, label_smoothing=smoothing, ignore_index=PAD, reduction="none"
    )


def inputs(
    n_passages: int = 4, n_tokens: int = 6, padding: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, n_passages, n_tokens, VOCAB, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, VOCAB, (3, n_tokens))
    if padding:
        labels[0, 3:] = PAD
        labels[1, 5:] = PAD
    scores = (3.0 * torch.randn(3, n_passages, dtype=torch.float64)).requires_grad_()
    return logits, labels, scores


def agree(marginal: str, args: tuple[Tensor, Tensor, Tensor], smoothing: float) -> None:
    ours, theirs = our_nll(marginal, *args, smoothing), hf_nll(marginal, *args, smoothing)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    upstream = torch.randn_like(ours)
    leaves = (args[0], args[2])
    found = torch.autograd.grad(ours, leaves, upstream)
    expected = torch.autograd.grad(theirs, leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@both
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("n_passages", [1, 4])
def test_parity(marginal: str, padding: bool, n_passages: int) -> None:
    agree(marginal, inputs(n_passages, padding=padding), 0.0)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("n_passages", [1, 4])
def test_parity_token_smoothing(padding: bool, n_passages: int) -> None:
    agree("token", inputs(n_passages, padding=padding), 0.1)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_parity_sequence_smoothing_with_one_passage(padding: bool) -> None:
    """With one passage the prior is 0, and so is V times the prior."""
    agree("sequence", inputs(1, padding=padding), 0.1)


def test_departure_prior_where_the_second_target_is_padding() -> None:
    """A one-token target in a longer batch: HF loses the prior, and its gradient to the scores."""
    logits, labels, scores = inputs()
    labels[:, 1:] = PAD
    logp = logits.log_softmax(-1)[:, :, 0].gather(2, labels[:, :1, None].expand(3, 4, 1))[..., 0]

    theirs = hf_nll("sequence", logits, labels, scores)
    torch.testing.assert_close(theirs, -logp.logsumexp(1), **TOLERANCE)
    assert (torch.autograd.grad(theirs.sum(), scores, retain_graph=True)[0] == 0).all()

    ours = our_nll("sequence", logits, labels, scores)
    expected = -(scores.log_softmax(1) + logp).logsumexp(1)
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert (torch.autograd.grad(ours.sum(), scores)[0].abs() > 1e-6).all()
    assert (theirs < ours).all() and (ours - theirs).max() > 0.5


def test_departure_a_target_of_one_column() -> None:
    """HF's shifted target is the pad alone: its loss is -log K, below zero, whatever the model."""
    logits, labels, scores = inputs(n_tokens=1, padding=False)
    generator = SimpleNamespace(pad_token_id=PAD, bos_token_id=None)
    stub = SimpleNamespace(config=SimpleNamespace(n_docs=4, bos_token_id=None, generator=generator))
    theirs = modeling_rag.RagSequenceForGeneration.get_nll(
        stub, logits.flatten(0, 1), scores, labels
    )
    torch.testing.assert_close(theirs, torch.full_like(theirs, -math.log(4)), **TOLERANCE)

    ours = our_nll("sequence", logits, labels, scores)
    logp = logits.log_softmax(-1)[:, :, 0].gather(2, labels[:, :, None].expand(3, 4, 1))[..., 0]
    expected = -(scores.log_softmax(1) + logp).logsumexp(1)
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert (ours > 0).all()


def test_departure_sequence_smoothing() -> None:
    """HF multiplies the prior by V in the smoothing term, and marginalises it on its own."""
    logits, labels, scores = inputs()
    smoothing = 0.1
    logp, prior = logits.log_softmax(-1), scores.log_softmax(1)
    counts = (labels != PAD).unsqueeze(1)
    gold = logp.gather(-1, labels[:, None, :, None].expand(3, 4, 6, 1))[..., 0]
    gold = torch.where(counts, gold, 0.0).sum(2)
    every = torch.where(counts, logp.sum(-1), 0.0).sum(2)

    theirs = hf_nll("sequence", logits, labels, scores, smoothing)
    nll, smooth = -(prior + gold).logsumexp(1), -(VOCAB * prior + every).logsumexp(1)
    value = (1 - smoothing) * nll + smoothing / VOCAB * smooth
    torch.testing.assert_close(theirs, value, **TOLERANCE)

    ours = our_nll("sequence", logits, labels, scores, smoothing)
    mixed = (1 - smoothing) * gold + smoothing / VOCAB * every
    torch.testing.assert_close(ours, -(prior + mixed).logsumexp(1), **TOLERANCE)
    assert (ours - theirs).abs().min() > 1e-3


@both
def test_departure_missing_hits(marginal: str) -> None:
    """HF scores a missing hit 0, so that it takes mass; ours is a loss over the hits alone."""
    logits, labels, scores = inputs()
    hits = scores.detach() - 3.0  # every hit scores below 0
    zero, missing = hits.clone(), hits.clone()
    zero[:, -1], missing[:, -1] = 0.0, -torch.inf

    theirs = hf_nll(marginal, logits, labels, zero)
    torch.testing.assert_close(theirs, our_nll(marginal, logits, labels, zero), **TOLERANCE)
    assert (zero.softmax(1)[:, -1] > 0.05).all()

    ours = our_nll(marginal, logits, labels, missing)
    fewer = hf_nll(marginal, logits[:, :-1], labels, hits[:, :-1])
    torch.testing.assert_close(ours, fewer, **TOLERANCE)
    assert (ours - theirs).abs().min() > 1e-3


def test_departure_reduction() -> None:
    """HF's reduced loss is a sum over the batch; our mean is that over the number of tokens."""
    logits, labels, scores = inputs()
    head = torch.eye(VOCAB, dtype=torch.float64)
    ours = F.rag_token_nll(logits, head, labels, scores, ignore_index=PAD)
    total = hf_nll("token", logits, labels, scores).sum()
    torch.testing.assert_close(ours, total / (labels != PAD).sum(), **TOLERANCE)
