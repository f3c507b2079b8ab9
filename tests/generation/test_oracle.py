"""Each decoder against every answer there is, over a vocabulary of six tokens, in float64.

A beam that is wide enough has to find the most probable answers of the marginal, in their order.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastrag.generation import DECODERS, Search
from fastrag.nn import RagGeneration, adapt_generator

V, T, K, EOS, PAD = 6, 3, 3, 2, 0
KINDS = ("seq2seq", "causal")
WIDE = {"num_beams": 64, "early_stopping": "never", "length_penalty": 0.0}
ANSWERS = [
    (*beginning, last)
    for n in range(T)
    for beginning in product([v for v in range(V) if v != EOS], repeat=n)
    for last in (range(V) if n == T - 1 else [EOS])
]


def adapted(kind: str) -> Any:
    torch.manual_seed({"seq2seq": 5, "causal": 1}[kind])
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    common = {"vocab_size": V, "max_position_embeddings": 32, "num_hidden_layers": 2, **ids}
    if kind == "seq2seq":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"d_model": 8, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **heads}
        layers = {"encoder_layers": 1, "decoder_layers": 2, "forced_eos_token_id": None}
        common |= {**sizes, **layers, "decoder_start_token_id": 1}
        model: Any = BartForConditionalGeneration(BartConfig(**common))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(
            LlamaConfig(**common, **heads, hidden_size=8, intermediate_size=16)
        )
    model = model.double().eval()
    with torch.no_grad():  # so that tokens and contexts matter
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return adapt_generator(model)


def case(kind: str, n: int = 3) -> tuple[Tensor, ...]:
    """Contexts of different lengths; the second and the third question miss a passage each."""
    drawn = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (n * K, 6), generator=drawn)
    lengths = torch.arange(n * K) % 5 + 2
    mask = (torch.arange(6) < lengths[:, None]).long()
    if kind == "causal":
        mask = mask.flip(1)
    rows = torch.arange(n * K).view(n, K)
    scores = torch.randn(n, K, dtype=torch.float64, generator=drawn)
    if n > 1:
        rows[1, 2] = rows[2, 0] = -1
    return ids * mask, mask, scores.masked_fill(rows < 0, -torch.inf), rows


@torch.no_grad()
def token_logp(adapter: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """log p(y_t|z,y_<t) of all answers under each context by the model itself, `[n, Y, T]`."""
    padded = torch.tensor([[*y, *[EOS] * (T - len(y))] for y in ANSWERS])
    counted = torch.tensor([[1.0] * len(y) + [0.0] * (T - len(y)) for y in ANSWERS]).double()
    found = []
    for context, own in zip(ids, mask, strict=True):
        read = context[own.bool()].expand(len(ANSWERS), -1)
        if adapter.kind == "seq2seq":
            start = torch.full((len(ANSWERS), 1), 1)
            decoder_ids = torch.cat([start, padded[:, :-1]], dim=1)
            logits = adapter.model(input_ids=read, decoder_input_ids=decoder_ids).logits
        else:
            logits = adapter.model(input_ids=torch.cat([read, padded[:, :-1]], dim=1)).logits
        logp = logits[:, -T:].log_softmax(-1).gather(2, padded.unsqueeze(2)).squeeze(2)
        found.append(logp * counted)
    return torch.stack(found)


def exact(adapter: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """log p(z) [B, K], and log p(z) p(y_t|z,y_<t) [B, K, Y, T] and log p(z) p(y|z) [B, K, Y]."""
    ids, mask, scores, _ = given
    log_prior = scores.log_softmax(1)
    logp = token_logp(adapter, ids, mask).unflatten(0, scores.shape)
    return log_prior, log_prior[:, :, None, None] + logp, log_prior[:, :, None] + logp.sum(3)


def decoded(adapter: Any, given: tuple[Tensor, ...], marginal: str, **settings: Any) -> Any:
    search = Search(adapter, *given, max_new_tokens=T, pad_id=PAD, eos_token_id=EOS, **settings)
    return DECODERS[marginal](search)


def answers_of(out: RagGeneration) -> list[tuple[int, ...]]:
    return [
        tuple(answer[:n])
        for answer, n in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marginal", ["token", "sequence-thorough"])
def test_a_wide_beam_finds_the_most_probable_answers(kind: str, marginal: str) -> None:
    n_return = 4
    adapter, given = adapted(kind), case(kind)
    log_prior, token_joint, joint = exact(adapter, given)
    score = token_joint.logsumexp(1).sum(2) if marginal == "token" else joint.logsumexp(1)  # [B, Y]
    torch.testing.assert_close(joint.logsumexp((1, 2)), torch.zeros(3).double())  # all answers
    best = score.topk(n_return, dim=1)
    out = decoded(adapter, given, marginal, num_return_sequences=n_return, **WIDE)
    assert answers_of(out) == [ANSWERS[y] for y in best.indices.flatten().tolist()]
    torch.testing.assert_close(out.scores, best.values.flatten(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.log_prior, log_prior)
    assert len({len(answer) for answer in answers_of(out)}) > 1
    if marginal == "token":
        for r, y in enumerate(best.indices.flatten().tolist()):
            n = len(ANSWERS[y])
            own = token_joint[r // n_return, :, y, :n].log_softmax(0)
            torch.testing.assert_close(out.log_posterior[r, :, :n], own)
            after = out.log_posterior[r, :, n:]
            own = log_prior[r // n_return, :, None].expand_as(after)
            torch.testing.assert_close(after, own)
    else:
        own = joint.gather(2, best.indices[:, None].expand(-1, K, -1)).log_softmax(1)
        own = own.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(out.log_posterior.double(), own, rtol=1e-5, atol=1e-5)
    one = decoded(adapter, given, marginal, **WIDE)
    assert answers_of(one) == answers_of(out)[::n_return]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_not_enough(kind: str) -> None:
    """The cases above tell a search for the best answer from one for the best next token."""
    adapter, given = adapted(kind), case(kind)
    for marginal in ("token", "sequence-thorough"):
        assert answers_of(decoded(adapter, given, marginal)) != answers_of(
            decoded(adapter, given, marginal, **WIDE)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_beams", [1, 3, 5])
def test_fast_and_thorough_sum_over_the_passages_they_say(kind: str, n_beams: int) -> None:
    adapter, given = adapted(kind), case(kind)
    _, _, joint = exact(adapter, given)
    fast, thorough = (
        decoded(adapter, given, marginal, num_beams=n_beams)
        for marginal in ("sequence", "sequence-thorough")
    )
    assert fast.candidates.equal(thorough.candidates)
    assert fast.candidates.shape[1] == K * n_beams
    shared = 0
    for b in range(3):
        proposed: list[list[tuple[int, ...]]] = [[] for _ in range(K)]
        candidates = fast.candidates[b].tolist()
        for c, tokens in enumerate(candidates):
            end = tokens.index(EOS) + 1 if EOS in tokens else T
            proposed[c // n_beams].append(tuple(tokens[:end]))
        for c in range(K * n_beams):
            k, y = c // n_beams, proposed[c // n_beams][c % n_beams]
            if given[3][b, k] < 0:
                assert fast.candidate_scores[b, c].isneginf()
                continue
            found = [j for j in range(K) if y in proposed[j]]
            shared += 1 < len(found) < K
            table = joint[b, :, ANSWERS.index(y)]
            assert fast.candidate_scores[b, c].item() == pytest.approx(
                table[found].logsumexp(0).item(), abs=1e-5
            )
            assert thorough.candidate_scores[b, c].item() == pytest.approx(
                table.logsumexp(0).item(), abs=1e-5
            )
    assert shared or n_beams < 5


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_marginal(kind: str) -> None:
    n = 4000
    adapter, given = adapted(kind), case(kind, 1)
    _, token_joint, _ = exact(adapter, given)
    score = token_joint.logsumexp(1).sum(2)[0]  # [Y]
    torch.manual_seed(0)
    out = decoded(adapter, given, "token", do_sample=True, top_k=0, num_return_sequences=n)
    drawn = torch.tensor([ANSWERS.index(answer) for answer in answers_of(out)])
    torch.testing.assert_close(out.scores, score[drawn], rtol=1e-6, atol=1e-6)
    share = drawn.bincount(minlength=len(ANSWERS)) / n
    p = score.exp()
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize("kind", KINDS)
def test_beams_without_a_cache_are_the_same(kind: str) -> None:
    adapter, given = adapted(kind), case(kind)
    for marginal in DECODERS:
        plain, whole = (
            decoded(adapter, given, marginal, num_beams=4, **settings)
            for settings in ({}, {"use_cache": False})
        )
        assert plain.sequences.equal(whole.sequences)
        torch.testing.assert_close(plain.scores, whole.scores)
        torch.testing.assert_close(plain.log_posterior, whole.log_posterior)
