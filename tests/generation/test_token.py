"""RAG-Token decoding against the full marginal distributions, token by token, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DPRConfig, DPRQuestionEncoder

from fastrag import functional
from fastrag.generation import Search, rag_sequence_thorough, rag_token
from fastrag.nn import adapt_generator
from tests import tiny
from tests.architectures import context, generator
from tests.generation.test_reading import asked

LENGTHS = [9, 4, 7, 2, 5, 6, 3, 8, 5, 4, 9, 2]  # of 4 questions with 3 contexts
N_TOKENS = 5


def adapted(name: str) -> Any:
    model = generator(name)
    with torch.no_grad():  # distributions in which several tokens have a say
        model.get_output_embeddings().weight.mul_(0.3)
    return adapt_generator(model)


def case(adapter: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contexts, scores and rows, with missing passages; no passage at all for the last question."""
    ids, mask = context(adapter.kind, LENGTHS)
    rows = torch.arange(12).view(4, 3) + 20
    rows[1, 2] = rows[2, 0] = -1
    rows[3] = -1
    drawn = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return ids, mask, drawn.masked_fill(rows < 0, -torch.inf), rows


def next_logp(adapter: Any, ids: Tensor, answer: list[int]) -> Tensor:
    """Log-probabilities of the token after `answer`, by the model's own forward pass."""
    said = torch.tensor([answer], dtype=torch.int64)
    if adapter.kind == "seq2seq":
        start = torch.tensor([[adapter.model.config.decoder_start_token_id]])
        inputs = {"input_ids": ids[None], "decoder_input_ids": torch.cat([start, said], dim=1)}
    else:
        inputs = {"input_ids": torch.cat([ids[None], said], dim=1)}
    return adapter.model(**inputs).logits[0, -1].log_softmax(0)


@torch.no_grad()
def brute_force(
    adapter: Any, ids: Tensor, mask: Tensor, scores: Tensor, eos: int
) -> tuple[list[int], float, Tensor]:
    """Answer, score and the sum of the posteriors of one question's passages."""
    known = scores if scores.isfinite().any() else torch.tensor([0.0, -torch.inf, -torch.inf])
    answer: list[int] = []
    score, shares = 0.0, torch.zeros(len(ids), dtype=torch.float64)
    while len(answer) < N_TOKENS and eos not in answer:
        logp = [next_logp(adapter, i[m.bool()], answer) for i, m in zip(ids, mask, strict=True)]
        joint = known.log_softmax(0)[:, None] + torch.stack(logp)  # [K, V]
        marginal = joint.exp().sum(0).log()
        answer.append(int(marginal.argmax()))
        score += float(marginal[answer[-1]])
        shares += joint[:, answer[-1]].softmax(0)
    return answer, score, shares


def some_end(adapter: Any) -> int:
    """A token that ends some of the answers early; 99, outside of the vocabulary, ends none."""
    free = rag_token(Search(adapter, *case(adapter), max_new_tokens=N_TOKENS, eos_token_id=99))
    return int(free.sequences[0, 2])


@pytest.mark.parametrize("name", ["t5_untied", "qwen3", "granite", "gemma2"])
def test_equals_the_argmax_of_the_marginal_distribution(name: str) -> None:
    adapter = adapted(name)
    ids, mask, scores, rows = case(adapter)
    eos = some_end(adapter)
    out = rag_token(
        Search(
            adapter, ids, mask, scores, rows, max_new_tokens=N_TOKENS, eos_token_id=eos, pad_id=0
        )
    )
    for b in range(4):
        own = slice(3 * b, 3 * b + 3)
        answer, score, shares = brute_force(adapter, ids[own], mask[own], scores[b], eos)
        n = len(answer)
        assert out.sequences[b].tolist() == answer + [0] * (out.sequences.shape[1] - n)
        assert out.lengths[b] == n
        assert out.scores[b].item() == pytest.approx(score, abs=1e-10)
        assert out.supporting_rows[b] == rows[b, int(shares.argmax())]
    assert out.lengths[0] < N_TOKENS  # ended by `eos`
    assert out.candidates is None and out.candidate_scores is None


@pytest.mark.parametrize("name", ["t5_untied", "qwen3"])
def test_the_score_is_that_of_the_training_loss(name: str) -> None:
    adapter = adapted(name)
    ids, mask, scores, rows = case(adapter)
    out = rag_token(Search(adapter, ids, mask, scores, rows, max_new_tokens=N_TOKENS))
    beyond = torch.arange(out.sequences.shape[1]) >= out.lengths[:, None]
    labels = out.sequences.masked_fill(beyond, -100)
    head = adapter.head()
    with torch.no_grad():
        nll = functional.rag_token_nll(
            adapter.hidden(ids, mask, labels),
            head.weight,
            labels,
            scores,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            reduction="none",
        )
    torch.testing.assert_close(out.scores[:3], -nll[:3], rtol=1e-10, atol=1e-10)
    assert out.scores[3].isfinite() and nll[3] == 0.0  # no passage: an answer, but no loss


@pytest.mark.parametrize("name", ["t5_untied", "qwen3"])
def test_passages_are_weighed_in_each_token(name: str) -> None:
    """The answer follows the prior, and is none of the passages' own answers when they disagree."""
    adapter = adapted(name)
    ids, mask, scores, rows = case(adapter)
    both, alone = [], []
    for prior in (torch.zeros(4, 3), torch.tensor([50.0, 0.0, 0.0]).expand(4, 3)):
        search = Search(adapter, ids, mask, prior, rows, max_new_tokens=N_TOKENS)
        both.append(rag_token(search).sequences.tolist())
    for k in range(3):
        search = Search(
            adapter,
            ids[k::3],
            mask[k::3],
            torch.zeros(4, 1),
            rows[:, k : k + 1],
            max_new_tokens=N_TOKENS,
        )
        alone.append(rag_token(search).sequences.tolist())
    assert both[1] == alone[0]
    assert any(answer not in [own[b] for own in alone] for b, answer in enumerate(both[0]))


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_one_passage_gives_the_generators_greedy_answer(kind: Any) -> None:
    model = tiny.rag_model(kind, marginal="token").eval()
    data = tiny.collator(kind)(asked(5))
    out = model.generate(**data, n_docs=1, max_new_tokens=4)
    contexts = model.contexts(out.rows, data["prompt_ids"], data["prompt_mask"])
    plain = model.generator.generate(
        contexts.ids, attention_mask=contexts.mask, max_new_tokens=4, do_sample=False
    )
    start = 1 if kind == "seq2seq" else contexts.ids.shape[1]
    assert out.sequences.equal(plain[:, start:])


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("continues", [True, False])
def test_labels_loss_is_that_of_a_forward_pass(kind: Any, continues: bool) -> None:
    model = tiny.rag_model(kind, tau=0.1, marginal="token").eval()
    if not continues:  # a generator without a cache, such as Mamba
        model.adapter.read = lambda *_: {}  # type: ignore[method-assign]
    data = tiny.collator(kind)(asked())
    out = model.generate(**data, max_new_tokens=4)
    with torch.no_grad():
        assert out.loss.item() == pytest.approx(model(**data, rows=out.rows).loss.item(), rel=1e-5)


def test_equals_hugging_faces_rag_token() -> None:
    rag = pytest.importorskip("transformers.models.rag")
    adapter = adapted("t5_untied")
    ids, mask, scores, rows = (each[: len(each) * 3 // 4] for each in case(adapter))
    scores = torch.where(rows < 0, -1e4, scores)  # it has no missing passages
    encoder = DPRQuestionEncoder(
        DPRConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    own = adapter.model.config
    config = rag.RagConfig.from_question_encoder_generator_configs(
        encoder.config,
        own,
        n_docs=3,
        vocab_size=own.vocab_size,
        decoder_start_token_id=own.decoder_start_token_id,
        **tiny.SPECIAL_IDS,
    )
    theirs = rag.RagTokenForGeneration(config, encoder, adapter.model).eval()
    expected = theirs.generate(
        context_input_ids=ids, context_attention_mask=mask, doc_scores=scores, n_docs=3
    )[:, 1:]
    search = Search(
        adapter, ids, mask, scores, rows, max_new_tokens=expected.shape[1], pad_id=tiny.PAD
    )
    assert rag_token(search).sequences.equal(expected)


@torch.no_grad()
def test_thorough_decoding_equals_hugging_faces_rag_sequence() -> None:
    """The answers are the same, and scores are those of its loss.

    Contexts have no padding, because it finds candidates without their mask.
    """
    rag = pytest.importorskip("transformers.models.rag")
    adapter = adapted("bart")
    ids, mask = context("seq2seq", [7] * 9)
    scores = case(adapter)[2][:3].nan_to_num(neginf=-1.0)
    own = adapter.model.config
    encoder = DPRQuestionEncoder(
        DPRConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    config = rag.RagConfig.from_question_encoder_generator_configs(
        encoder.config, own, n_docs=3, vocab_size=own.vocab_size, **tiny.SPECIAL_IDS
    )
    theirs = rag.RagSequenceForGeneration(config, encoder, adapter.model).eval()
    beams = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4}
    given = {"context_input_ids": ids, "context_attention_mask": mask, "doc_scores": scores}
    expected = theirs.generate(**given, n_docs=3, num_return_sequences=1, **beams)
    out = rag_sequence_thorough(
        Search(adapter, ids, mask, scores, torch.arange(9).view(3, 3), **beams)
    )
    assert out.sequences.equal(expected[:, 1:])
    loss = theirs(**given, labels=expected, n_docs=3, exclude_bos_score=False).loss
    torch.testing.assert_close(out.scores.double(), -loss.double(), rtol=1e-4, atol=1e-4)
