"""Arguments of `generate`: handed on to transformers, refused by name, never dropped."""

from __future__ import annotations

import functools
from string import ascii_lowercase, digits
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation import utils as generation_utils
from transformers.generation.streamers import BaseStreamer

from fastrag.nn import RagModel
from tests import tiny
from tests.architectures import generator
from tests.generation.test_reading import MARGINALS, asked

KINDS = ("seq2seq", "causal")
B, K, T = 6, 3, 4


def asked_of(model: RagModel, n: int = B, **settings: Any) -> Any:
    data = tiny.collator(model.reader.kind)(asked(n))
    data.pop("labels")
    return model.generate(**data, **{"max_new_tokens": T, **settings})


def rag(kind: Any = "causal", marginal: str = "token") -> RagModel:
    """A model whose answers differ from token to token and from question to question."""
    name = {"seq2seq": "t5_untied", "causal": "qwen3"}[kind]
    make = functools.partial(generator, name, dtype=torch.float32)
    return tiny.rag_model(kind, make_generator=make, tau=0.1, marginal=marginal).eval()


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_processor(kind: str, marginal: str) -> None:
    model = rag(kind, marginal)
    banned = asked_of(model).sequences[:, 0]
    seen: list[Tensor] = []

    def ban(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert len(input_ids) == len(scores)
        seen.append(scores)
        own = banned if marginal == "token" else banned.repeat_interleave(K)
        return scores.scatter(1, own[:, None], -torch.inf)

    out = asked_of(model, logits_processor=[ban])
    assert (out.sequences != banned[:, None]).all()
    assert len(seen) == out.sequences.shape[1]
    if marginal == "token":  # one row per question, with its marginal distribution
        assert seen[0].shape == (B, tiny.VOCAB)
        torch.testing.assert_close(seen[0].exp().sum(1), torch.ones(B))
    else:
        assert seen[0].shape == (B * K, tiny.VOCAB)


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_allowed_tokens_fn_is_asked_per_question(kind: str, marginal: str) -> None:
    model = rag(kind, marginal)
    out = asked_of(model, prefix_allowed_tokens_fn=lambda b, ids: [10 + b])
    expected = torch.arange(10, 10 + B)[:, None].expand(B, T)
    assert out.sequences.equal(expected)
    if marginal == "sequence":
        assert out.candidates.equal(expected[:, None].expand(B, K, T))


class _After(StoppingCriteria):
    """Stop a row after its n-th token."""

    def __init__(self, n: Tensor) -> None:
        self.n, self.calls = n, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.calls >= self.n


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_criteria_of_a_question(kind: str) -> None:
    """RAG-Token: each question stops by itself, and its score ends there."""
    model, lengths = rag(kind), torch.tensor([1, 4, 2, 3, 1, 2])
    out = asked_of(model, stopping_criteria=[_After(lengths)])
    assert out.lengths.equal(lengths)
    for n in (1, 2, 3, 4):
        cut = asked_of(model, max_new_tokens=n)
        same = lengths == n
        assert out.sequences[same, :n].equal(cut.sequences[same])
        assert (out.sequences[same, n:] == tiny.PAD).all()
        torch.testing.assert_close(out.scores[same], cut.scores[same])


def test_stopping_criteria_of_a_candidate() -> None:
    """RAG-Sequence: each candidate stops by itself, and its score ends there."""
    model, lengths = rag(marginal="sequence"), torch.arange(B * K) % T + 1
    out = asked_of(model, stopping_criteria=[_After(lengths)])
    n_compared = 0
    for n in (1, 2, 3, 4):
        cut, same = asked_of(model, max_new_tokens=n), (lengths == n).view(B, K)
        assert out.candidates[same][:, :n].equal(cut.candidates[same])
        assert (out.candidates[same][:, n:] == tiny.PAD).all()
        alone = same & _differs(out.candidates) & _differs(cut.candidates)
        n_compared += int(alone.sum())
        torch.testing.assert_close(out.candidate_scores[alone], cut.candidate_scores[alone])
    assert n_compared


def _differs(candidates: Tensor) -> Tensor:
    """Whether a candidate `[B, K, T]` is unlike the others of its question."""
    return (candidates[:, :, None] == candidates[:, None]).all(-1).sum(-1) == 1


def _letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each letter or digit."""
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(ascii_lowercase + digits)}, []))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marginal", MARGINALS)
def test_stop_strings(marginal: str, kind: str) -> None:
    model = rag(kind, marginal)
    free = asked_of(model)
    tokenizer = _letters()
    stop = tokenizer.decode(free.sequences[0, :2])
    out = asked_of(model, stop_strings=[stop], tokenizer=tokenizer)
    assert free.lengths[0] == T and out.lengths[0] == 2
    assert out.sequences[0, :2].equal(free.sequences[0, :2])
    own = model.generator.generation_config
    own.stop_strings = [stop]  # transformers adds those of the model by itself
    assert asked_of(model, tokenizer=tokenizer).scores.equal(out.scores)
    with pytest.raises(ValueError, match="tokenizer: expected the generator's tokenizer"):
        asked_of(model, stop_strings=[stop], tokenizer=None)


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("kind", KINDS)
def test_streamer(kind: str) -> None:
    """It gets the first context of each question, then its tokens as they are chosen."""
    model, streamer = rag(kind), _Recorder()
    out = asked_of(model, streamer=streamer)
    assert streamer.ended and len(streamer.values[0]) == B
    assert torch.stack(streamer.values[1:], dim=1).equal(out.sequences)
    with pytest.raises(
        ValueError, match=r"streamer: expected None, because RAG-Sequence .* _Recorder"
    ):
        asked_of(model, streamer=streamer, marginal="sequence")


def test_negative_prompt_is_that_of_a_question() -> None:
    model = rag(marginal="sequence")
    negative = torch.randint(5, tiny.VOCAB, (B, 3), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"guidance_scale": 3.0}
    out = asked_of(model, negative_prompt_ids=negative, **settings)
    assert not out.sequences.equal(asked_of(model, **settings).sequences)
    data = tiny.collator("causal")(asked(B))
    for b in range(B):
        alone = model.generate(
            *(data[name][b : b + 1] for name in ("input_ids", "attention_mask")),
            *(data[name][b : b + 1] for name in ("prompt_ids", "prompt_mask")),
            negative_prompt_ids=negative[b : b + 1],
            max_new_tokens=T,
            **settings,
        )
        assert out.candidates[b].equal(alone.candidates[0])


@pytest.mark.parametrize("marginal", MARGINALS)
def test_generation_config(marginal: str) -> None:
    model = rag(marginal=marginal)
    plain = asked_of(model)
    end = int(plain.sequences[0, 1])
    own = GenerationConfig(max_new_tokens=3, eos_token_id=end, pad_token_id=7)
    out = asked_of(model, generation_config=own, max_new_tokens=None)
    assert out.sequences.shape[1] == 3 and out.lengths[0] == 2
    assert out.sequences[0].tolist() == [*plain.sequences[0, :2].tolist(), 7]
    assert asked_of(model, generation_config=own, max_new_tokens=2).sequences.shape[1] == 2
    beams = GenerationConfig(num_beams=4, length_penalty=0.0, max_new_tokens=T)
    out = asked_of(model, generation_config=beams, max_new_tokens=None)
    again = asked_of(model, num_beams=4, length_penalty=0.0)
    assert out.sequences.equal(again.sequences) and not out.scores.equal(plain.scores)
    with pytest.raises(ValueError, match="generation_config: expected .*, got dict"):
        asked_of(model, generation_config={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected an integer >= 1, got 0"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected an integer >= 1, got 0"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ({"temperature": 0.5}, "temperature: expected 1.0, because do_sample is False, got 0.5"),
        ({"length_penalty": 0.0}, "length_penalty: expected 1.0, because num_beams is 1, got 0.0"),
        ({"penalty_alpha": 1}, "penalty_alpha: expected None, because .* by sampling, got 1"),
        ({"assistant_model": 1}, "assistant_model: expected None, because answers are searched"),
        ({"custom_generate": "x"}, "custom_generate: expected None, because answers are searched"),
        ({"num_beam_groups": 2}, "num_beam_groups: expected 1, because answers are searched"),
        ({"token_healing": True}, "token_healing: expected False, because an answer follows"),
        ({"guidance_scale": 2.0}, "guidance_scale: expected 1.0, because the K contexts of a"),
        ({"negative_prompt_ids": 1}, "negative_prompt_ids: expected None, because the K contexts"),
        ({"cache_implementation": "static"}, "cache_implementation: expected None, because the K"),
        ({"decoder_start_token_id": 9}, "decoder_start_token_id: expected"),
        (
            {"guidance_scale": 2.0, "num_beams": 2, "marginal": "sequence"},
            "guidance_scale: expected 1.0, because it keeps one cache",
        ),
        (
            {"num_return_sequences": 4, "marginal": "sequence"},
            "num_return_sequences: expected at most 3, 1 for each of 3 passages, got 4",
        ),
        ({"output_scores": True}, "output_scores: expected False, because generate returns a Rag"),
        ({"max_length": 9}, "max_length: expected None, because max_new_tokens limits"),
        ({"do_sample": True, "top_p": 2.0}, r"top_p: expected a number in \(0, 1\], got 2.0"),
        (
            {"n_docs": 2, "rows": torch.zeros(1, 3).long()},
            "n_docs: expected None with rows",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_token": 3}, r"GenerationConfig, got \['max_new_token'\]; .* max_new_tokens\?"),
        ({"logit_processor": []}, r"got \['logit_processor'\]; did you mean logits_processor\?"),
        ({"on_progres": print}, r"got \['on_progres'\]; did you mean on_progress\?"),
        ({"qqq": 1}, r"got \['qqq'\]$"),
        ({"logits_processor": print}, "logits_processor: expected a list, got builtin"),
        (
            {"marginal": "tokens"},
            r"marginal: expected one of \('token', 'sequence', 'sequence-thorough'\), got",
        ),
    ],
)
def test_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked_of(rag(), 1, **settings)


def test_a_start_token_that_pads_as_well_is_not_taken_for_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T5's; transformers warns of a prompt that ends with padding."""
    model = rag("seq2seq")
    assert model.generator.config.decoder_start_token_id == model.processor.bound.pad_id
    said: list[str] = []
    monkeypatch.setattr(generation_utils.logger, "warning", lambda text, *_: said.append(text))
    asked_of(model, 2, num_beams=2)
    assert not said


def test_what_repeats_a_greedy_search_is_accepted() -> None:
    model = rag()
    model.generator.generation_config.num_beams = 3
    settings = {
        "num_beams": None,
        "do_sample": False,
        "assistant_model": None,
        "output_scores": None,
    }
    assert asked_of(model, **settings).sequences.equal(asked_of(model).sequences)


@pytest.mark.parametrize(("kind", "n_beams"), [("seq2seq", 1), ("seq2seq", 3), ("causal", 3)])
def test_shortest_answer_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_beams: int
) -> None:
    """Also where an end is forced before the shortest length."""
    model = rag(kind)
    ends = asked_of(model).sequences[:, 0].unique().tolist()
    forced = []
    for least, end in ((2, None), (3, ends[0]), (T, ends[0])):
        settings: dict[str, Any] = {"min_new_tokens": least}
        if kind == "seq2seq" and least == 2:
            settings = {"min_length": 1 + least}  # with the start token
        settings |= {"forced_eos_token_id": end, "eos_token_id": ends, "num_beams": n_beams}
        out = asked_of(model, **settings)
        with monkeypatch.context() as without:
            without.setattr("fastrag.generation.search._no_end", lambda *_: None)
            expected = asked_of(model, **settings)
        assert out.sequences.equal(expected.sequences)
        assert out.scores.equal(expected.scores)
        assert int(out.lengths.min()) >= least
        forced.append(end in out.sequences[:, -1].tolist())
    assert forced == [False, True, True]
