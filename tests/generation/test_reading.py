"""Contexts are read once: for the labels' loss, for the answers, and for the answers' scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from fastrag.data import Question
from tests import tiny
from tests.architectures import GENERATORS, context, generator

KINDS = ("seq2seq", "causal")
MARGINALS = ("token", "sequence")


def a_short_window() -> Gemma2ForCausalLM:
    """Gemma 2, whose every other layer sees less than a context."""
    torch.manual_seed(0)
    settings = {"head_dim": 8, "attn_implementation": "exact", "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(**tiny.LLAMA, **settings)).double().eval()


def asked(n: int = 8) -> list[Question]:
    """Questions and answers of different lengths."""
    return [
        Question(
            f"q{i}",
            " ".join([*["asked"] * (3 * i % 7), tiny.NAMES[i]]),
            (" ".join(tiny.COLOURS[: 1 + i % 3]),),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("name", [*GENERATORS, "gemma2_window"])
def test_states_after_a_reading_are_those_of_a_whole_run(name: str) -> None:
    from fastrag.nn import adapt_generator

    model = a_short_window() if name == "gemma2_window" else generator(name)
    adapter = adapt_generator(model)
    ids, mask = context(adapter.kind, [9, 4, 7, 2])
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    with torch.no_grad():
        whole = adapter.hidden(ids, mask, labels)
        state = adapter.read(ids, mask)
        assert state
        for _ in range(2):  # the state is left as it is
            torch.testing.assert_close(
                adapter.hidden(ids, mask, labels, state=state), whole, rtol=1e-9, atol=1e-9
            )
        settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        expected = model.generate(ids, **settings)
        assert model.generate(ids, **settings, **adapter.branch(state)).equal(expected)
        beams = {**settings, "num_beams": 3}
        expected = model.generate(ids, **beams)
        assert model.generate(ids, **beams, **adapter.branch(state, 3)).equal(expected)


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_context_enters_the_generator_once(kind: str, marginal: str) -> None:
    model = tiny.rag_model(kind).eval()
    data = tiny.collator(kind)(asked())
    read: list[int] = []
    part = model.generator.get_encoder() if kind == "seq2seq" else model.generator
    part.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    probed = model.adapter.read(*(torch.ones(1, 2, dtype=torch.int64),) * 2)
    assert probed
    read.clear()
    rows = torch.arange(24).view(8, 3) % 12
    out = model.generate(**data, rows=rows, max_new_tokens=4, marginal=marginal)
    lengths = model.contexts(rows, data["prompt_ids"], data["prompt_mask"]).mask.sum(1)
    # An encoder reads eight contexts of like length at a time, a causal model up to 64.
    groups = lengths.sort(descending=True).values.split(8 if kind == "seq2seq" else 64)
    contexts = sum(len(group) * int(group[0]) for group in groups)  # padded
    if kind == "seq2seq":
        assert sum(read) == contexts
    else:
        assert out.sequences.shape[1] == 4  # each read the token before, as each label did
        assert sum(read) == contexts - 24 + 24 * (data["labels"].shape[1] + 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continues", [True, False])
def test_loss_and_scores_are_those_of_separate_runs(kind: str, continues: bool) -> None:
    model = tiny.rag_model(kind, tau=0.1).eval()
    if not continues:  # a generator without a cache, such as Mamba
        model.adapter.read = lambda *_: {}  # type: ignore[method-assign]
    data = tiny.collator(kind)(asked())
    out = model.generate(**data, max_new_tokens=4, marginal="sequence")
    with torch.no_grad():
        expected = model(**data, rows=out.rows)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        contexts = model.contexts(out.rows, data["prompt_ids"], data["prompt_mask"])
        answers = out.candidates.flatten(0, 1)
        ended = (answers == tiny.EOS).long()
        labels = answers.masked_fill(ended.cumsum(1) - ended > 0, -100)
        head = model.adapter.head()
        logp = head.logits(model.adapter.hidden(contexts.ids, contexts.mask, labels))
        chosen = logp.log_softmax(-1).squeeze(1).gather(2, labels.clamp(min=0).unsqueeze(2))
        own = chosen.squeeze(2).masked_fill(labels < 0, 0.0).sum(1).view(8, 3)
    joint = expected.doc_scores.log_softmax(1) + own
    keys = labels.view(8, 3, -1)
    same = (keys.unsqueeze(2) == keys.unsqueeze(1)).all(-1)
    summed = joint.unsqueeze(1).masked_fill(~same, -torch.inf).logsumexp(2)
    torch.testing.assert_close(out.candidate_scores, summed, rtol=1e-5, atol=1e-5)
    assert model.generate(**{k: v for k, v in data.items() if k != "labels"}).loss is None


@pytest.mark.parametrize("marginal", [*MARGINALS, "sequence-thorough"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_questions_one_by_one(kind: str, marginal: str) -> None:
    """Groups of like length, early ends and padding leave no trace."""
    model = tiny.rag_model(kind, tau=0.1, seed=3).eval()
    collator = tiny.collator(kind)
    settings: dict[str, Any] = {"max_new_tokens": 4, "marginal": marginal}
    whole = model.generate(**collator(asked()), **settings)
    total, count = 0.0, 0
    for b, question in enumerate(asked()):
        data = collator([question])
        alone = model.generate(**data, **settings)
        n = alone.sequences.shape[1]
        assert whole.sequences[b, :n].equal(alone.sequences[0])
        assert (whole.sequences[b, n:] == tiny.PAD).all()
        assert whole.supporting_rows[b] == alone.supporting_rows[0]
        torch.testing.assert_close(whole.scores[b], alone.scores[0], rtol=1e-5, atol=1e-5)
        if marginal != "token":
            n = alone.candidates.shape[2]
            assert whole.candidates[b, :, :n].equal(alone.candidates[0])
            torch.testing.assert_close(
                whole.candidate_scores[b], alone.candidate_scores[0], rtol=1e-5, atol=1e-5
            )
        counted = int(data["labels"].ne(-100).sum())
        total, count = total + alone.loss.item() * counted, count + counted
    assert whole.loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"guidance_scale": 1.5}, {}])
def test_scores_hold_under_settings_of_the_callers(settings: dict[str, Any]) -> None:
    """A generator without a cache, or one that runs twice a token, has the plain scores."""
    model = tiny.rag_model("causal", tau=0.1).eval()
    data = tiny.collator("causal")(asked(3))
    out = model.generate(**data, max_new_tokens=3, marginal="sequence", **settings)
    labels = out.candidates.flatten(0, 1)
    ended = (labels == tiny.EOS).long()
    labels = labels.masked_fill(ended.cumsum(1) - ended > 0, -100)
    contexts = model.contexts(out.rows, data["prompt_ids"], data["prompt_mask"])
    with torch.no_grad():
        hidden = model.adapter.hidden(contexts.ids, contexts.mask, labels)
        logp = model.adapter.head().logits(hidden).log_softmax(-1).squeeze(1)
    own = logp.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    own = own.masked_fill(labels < 0, 0.0).sum(1).view(3, 3)
    least = out.doc_scores.log_softmax(1) + own
    assert (out.candidate_scores >= least - 1e-5).all()
    alone = [len({tuple(c.tolist()) for c in row}) == 3 for row in out.candidates]
    torch.testing.assert_close(out.candidate_scores[alone], least[alone], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("marginal", MARGINALS)
def test_progress_adds_up_and_moves_within_a_batch(marginal: str) -> None:
    model = tiny.rag_model("causal", marginal=marginal).eval()
    shares: list[float] = []
    model.generate(**tiny.collator("causal")(asked()), max_new_tokens=4, on_progress=shares.append)
    assert sum(shares) == pytest.approx(1.0) and len(shares) >= 5
    assert max(shares) <= 0.5  # reading the contexts, then a part for each token
