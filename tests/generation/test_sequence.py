"""RAG-Sequence decoding against a question-by-question, passage-by-passage computation."""

from __future__ import annotations

import pytest
import torch

from fastrag.generation import Search, rag_sequence
from tests.architectures import GENERATORS
from tests.tiny import EOS, PAD, VOCAB, batch, rag_model

KINDS = ["seq2seq", "causal"]


def trained(kind, steps=25, **settings):
    """A model whose answers end with EOS and differ between passages."""
    model = rag_model(kind, tau=0.1, **settings)
    data = batch(kind, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def answer(model, data, **settings):
    names = ("input_ids", "attention_mask", "prompt_ids", "prompt_mask")
    settings = {"marginal": "sequence", "max_new_tokens": 4, **settings}
    return model.generate(*(data[name] for name in names), **settings)


def literal(model, data, rows, max_new_tokens=4):
    """Greedy, token by token, for one passage of one question; then the sum over equal answers."""
    results = []
    scores = model(data["input_ids"], data["attention_mask"], rows=rows).doc_scores
    for b in range(len(rows)):
        found = {}
        log_prior = scores[b].log_softmax(dim=0)
        for k in range(rows.shape[1]):
            if rows[b, k] < 0:
                continue
            context = model.contexts(
                rows[b : b + 1, k : k + 1],
                data["prompt_ids"][b : b + 1],
                data["prompt_mask"][b : b + 1],
            )
            answer, total = [], 0.0
            while len(answer) < max_new_tokens and (not answer or answer[-1] != EOS):
                # One more label of any value; the state before it predicts it.
                labels = torch.tensor([[*answer, 5]])
                hidden = model.adapter.hidden(context.ids, context.mask, labels)[0, 0, -1]
                logp = model.adapter.head().logits(hidden).log_softmax(dim=0)
                answer.append(int(logp.argmax()))
                total += float(logp.max())
            key = tuple(answer)
            shares = found.setdefault(key, [])
            shares.append((float(log_prior[k]) + total, int(rows[b, k])))
        best = max(found, key=lambda y: torch.tensor([s for s, _ in found[y]]).logsumexp(0))
        score = torch.tensor([s for s, _ in found[best]]).logsumexp(0)
        results.append((list(best), float(score), max(found[best])[1]))
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_by_one(kind):
    model = trained(kind)
    data = batch(kind, 8)
    rows = torch.stack([torch.arange(8), (torch.arange(8) + 3) % 12, torch.full((8,), 9)], dim=1)
    rows[2, 2] = rows[5, 1] = rows[5, 2] = -1
    with torch.no_grad():
        expected = literal(model, data, rows)
    out = answer(model, data, rows=rows)
    for b, (tokens, score, support) in enumerate(expected):
        assert out.sequences[b, : len(tokens)].tolist() == tokens
        assert (out.sequences[b, len(tokens) :] == PAD).all()
        assert out.scores[b].item() == pytest.approx(score, abs=1e-4)
        assert out.supporting_rows[b].item() == support
    assert len({tuple(tokens) for tokens, _, _ in expected}) > 1
    assert any(tokens[-1] == EOS for tokens, _, _ in expected)
    assert out.candidates.shape[:2] == (8, 3)
    assert out.candidate_scores.isneginf().equal(rows < 0)


def test_equal_answers_add_up(monkeypatch):
    """Two passages of .3 that agree beat one of .4."""
    tokens = torch.tensor([[7, EOS, -100], [8, EOS, -100], [8, EOS, -100], [4, EOS, -100]])
    monkeypatch.setattr(Search, "generate", lambda *_: (tokens, torch.zeros(4, 3)))
    model = rag_model()
    prior = torch.tensor([[0.4, 0.3, 0.3, 0.0]])
    rows = torch.tensor([[10, 11, 3, -1]])
    ids = torch.ones(4, 2, dtype=torch.int64)
    out = rag_sequence(Search(model.adapter, ids, ids, prior.log(), rows, pad_id=PAD))
    assert out.sequences.tolist() == [[8, EOS, PAD]]
    assert out.scores.item() == pytest.approx(torch.tensor(0.6).log().item())
    assert out.supporting_rows.tolist() == [11]
    torch.testing.assert_close(out.candidate_scores.exp(), torch.tensor([[0.4, 0.6, 0.6, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_passage_found_still_answers(kind):
    model = trained(kind, steps=5)
    data = batch(kind, 2)
    out = answer(model, data, rows=torch.full((2, 3), -1))
    assert out.supporting_rows.tolist() == [-1, -1]
    assert out.scores.isfinite().all()


def test_batch_equals_single():
    model = trained("causal")
    whole = answer(model, batch("causal", 8))
    for b in range(8):
        data = {name: value[b : b + 1] for name, value in batch("causal", 8).items()}
        alone = answer(model, data)
        n = alone.sequences.shape[1]
        assert whole.sequences[b, :n].tolist() == alone.sequences[0].tolist()
        assert whole.scores[b].item() == pytest.approx(alone.scores.item(), abs=1e-4)


def test_mode_gradients_and_settings_of_the_user_stay():
    model = rag_model("causal", dropout=0.2, explore=2)
    model.generator.generation_config.num_beams = 3
    model.generator.generation_config.do_sample = True
    model.generator.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    data = batch("causal")
    first, again = answer(model, data), answer(model, data)
    assert first.sequences.equal(again.sequences) and first.rows.equal(again.rows)
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert not first.scores.requires_grad
    assert model.generator.generation_config.num_beams == 3
    assert answer(model, data, n_docs=5).rows.shape == (4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_where_the_template_ends_it(kind):
    """The generation config of a chat or a fresh model may name another end, or none."""
    model = trained(kind)
    expected = answer(model, batch(kind))
    assert (expected.sequences == EOS).any(dim=1).all()
    for own in (None, VOCAB - 1, [VOCAB - 1]):
        model.generator.generation_config.eos_token_id = own
        assert answer(model, batch(kind)).sequences.equal(expected.sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_of_the_callers_counts_in_the_score_too(kind):
    model, data = rag_model(kind, seed=5).eval(), batch(kind)
    short = answer(model, data, max_new_tokens=1)
    end = int(short.candidates[0, 0, 0])
    assert end != EOS and answer(model, data).candidates[0, 0, 1] != PAD  # not the end by itself
    out = answer(model, data, eos_token_id=end)
    ended = out.candidates[..., 0] == end
    assert ended[0, 0] and (out.candidates[..., 1:][ended] == PAD).all()
    torch.testing.assert_close(out.candidate_scores[ended], short.candidate_scores[ended])


def test_an_answer_stops_where_the_positions_end():
    model = rag_model("causal", make_generator=GENERATORS["gpt2"], max_context=64).eval()
    data = batch("causal", 2)
    data["prompt_ids"] = data["prompt_mask"] = torch.ones(2, 57, dtype=torch.int64)
    out = answer(model, data, max_new_tokens=40, eos_token_id=VOCAB - 1)
    assert out.candidates.shape[2] <= 6 and out.scores.isfinite().all()  # 57 + 2 + 2 of 64
