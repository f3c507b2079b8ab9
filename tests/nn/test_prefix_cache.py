"""Prefixes that are kept give the states, answers and scores of contexts that are read whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from fastrag.nn import PrefixCache, RagModel, adapt_generator
from fastrag.nn.prefix_cache import keep_prefixes
from tests import tiny
from tests.architectures import context, generator, lora_generator
from tests.generation.test_reading import a_short_window, asked

ROWS = torch.tensor([[0, 1, 2], [2, 3, -1], [1, 0, 5], [7, 2, -1]])
LARGE = 1 << 20


def model_and_batch(**settings: Any) -> tuple[RagModel, dict[str, Any]]:
    """A model, and four questions of different lengths with passages in common."""
    model = tiny.rag_model("causal", tau=0.1, **settings).double().eval()
    scores = torch.randn(ROWS.shape, generator=torch.Generator().manual_seed(0))
    batch = tiny.collator("causal")(asked(4))
    batch |= {"rows": ROWS, "doc_scores": scores.masked_fill(ROWS < 0, -torch.inf)}
    return model, batch


def assert_same(found: Any, expected: Any) -> None:
    assert found.sequences.equal(expected.sequences)
    assert (found.loss is None) == (expected.loss is None)
    for name in {"scores", "log_posterior", "loss"} & {*expected}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "gemma2_window", "lora"])
def test_states_are_those_of_whole_contexts(name: str) -> None:
    """Cached states equal those of whole contexts, in one batch and in a later one."""
    made = {"gemma2_window": a_short_window, "lora": lambda: lora_generator().double().eval()}
    adapter: Any = adapt_generator(made[name]() if name in made else generator(name))
    cache = PrefixCache(LARGE)
    cache.check(adapter, has_prefix=True)
    ids, mask = context("causal", [9, 14, 7, 12, 5])
    ids[2, -7:-4] = ids[0, -9:-6]  # the same prefix in other places
    labels = torch.tensor([[5, 6, 7], [8, 9, -100], [4, 5, 6], [7, 8, 9], [5, -100, -100]])
    prefix_len = torch.tensor([3, 11, 3, 12, 0])  # one leaves no token, one has none
    with torch.no_grad():
        whole = adapter.hidden(ids, mask, labels)
        for n_hits in (1, 6):
            state = cache.read(adapter, ids, mask, prefix_len)
            found = adapter.hidden(ids, mask, labels, state=state)
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
            assert (cache.hits, cache.misses, len(cache)) == (n_hits, 4, 4)


@pytest.mark.parametrize(
    ("labelled", "settings"),
    [
        (True, {"marginal": "token"}),
        (False, {"marginal": "token", "num_beams": 3, "num_return_sequences": 2}),
        (False, {"marginal": "sequence"}),
        (True, {"marginal": "sequence", "num_beams": 3}),
        (False, {"marginal": "sequence-thorough", "num_beams": 2}),
    ],
    ids=["token", "token beams", "sequence", "sequence beams", "thorough beams"],
)
def test_answers_and_scores_are_those_without(labelled: bool, settings: dict[str, Any]) -> None:
    model, batch = model_and_batch()
    if not labelled:
        del batch["labels"]
    expected = model.generate(**batch, **settings, max_new_tokens=4)
    model.prefix_cache = PrefixCache(LARGE)
    for _ in range(2):
        assert_same(model.generate(**batch, **settings, max_new_tokens=4), expected)
    assert model.prefix_cache.misses == 7  # six passages and the context without one
    assert model.prefix_cache.hits == 24 - 7


def test_a_passage_is_read_once() -> None:
    model, batch = model_and_batch()
    del batch["labels"]
    model.generate(**batch, max_new_tokens=1)  # what the adapter tries at first
    model.prefix_cache = PrefixCache(LARGE)
    model.prefix_cache.check(model.adapter, has_prefix=True)
    read: list[int] = []
    model.generator.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    longest = int(batch["prompt_mask"].sum(1).max())
    model.generate(**batch, max_new_tokens=1)
    # "ada likes red asked" and the like; then the question with "says", the last word by itself
    assert read == [7 * 4, 12 * longest, 12]
    read.clear()
    model.generate(**batch, max_new_tokens=1, marginal="sequence")
    assert read == [12 * longest, 12]


def test_the_least_recently_used_prefix_is_dropped() -> None:
    adapter: Any = adapt_generator(generator("llama"))
    ids, mask = context("causal", [9, 9, 9])
    one = PrefixCache(LARGE)
    one.read(adapter, ids[:1], mask[:1], torch.tensor([6]))
    cache = PrefixCache(2 * one.n_bytes)

    def read(row: int) -> tuple[int, int]:
        cache.read(adapter, ids[[row]], mask[[row]], torch.tensor([6]))
        assert cache.n_bytes <= cache.max_bytes
        return cache.hits, cache.misses

    assert [read(row) for row in (0, 1, 0, 2)] == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert read(0) == (2, 3) and read(1) == (2, 4) and len(cache) == 2
    small = PrefixCache(one.n_bytes - 1)
    small.read(adapter, ids, mask, torch.tensor([6, 6, 6]))
    assert len(small) == small.n_bytes == 0
    cache.clear()
    assert len(cache) == cache.n_bytes == 0 and cache.misses == 4


def step(model: RagModel, batch: dict[str, Any]) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD(model.generator.parameters(), lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()


def through_data(model: RagModel, batch: dict[str, Any]) -> None:
    """A write that torch does not count."""
    for parameter in model.generator.parameters():
        parameter.data.mul_(1.5)


def load(model: RagModel, batch: dict[str, Any]) -> None:
    state = model.generator.state_dict()
    model.generator.load_state_dict({name: 1.5 * weight for name, weight in state.items()})


def replace(model: RagModel, batch: dict[str, Any]) -> None:
    torch.manual_seed(7)
    model.generator = tiny.llama().double().eval()


@pytest.mark.parametrize("change", [step, through_data, load, replace])
def test_states_of_other_weights_are_never_used(change: Any) -> None:
    model, batch = model_and_batch()
    model.prefix_cache = cache = PrefixCache(LARGE)
    before = model.generate(**batch, max_new_tokens=3)
    change(model, batch)
    found = model.generate(**batch, max_new_tokens=3)
    assert cache.misses == 14
    model.prefix_cache = None
    assert_same(found, model.generate(**batch, max_new_tokens=3))
    assert not torch.allclose(found.scores, before.scores, rtol=1e-3)


def test_states_without_a_peft_adapter_are_others() -> None:
    adapter: Any = adapt_generator(lora_generator().eval())
    ids, mask = context("causal", [9, 7])
    cache = PrefixCache(LARGE)
    cache.read(adapter, ids, mask, torch.tensor([6, 4]))
    with adapter.model.disable_adapter():
        cache.read(adapter, ids, mask, torch.tensor([6, 4]))
    assert (cache.hits, cache.misses) == (0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        cache.read(adapter, ids, mask, torch.tensor([6, 4]))
    assert (cache.hits, cache.misses) == (0, 6)


def dynamic_rope() -> LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return LlamaForCausalLM(LlamaConfig(**tiny.LLAMA, rope_parameters=rope))


def mamba() -> MambaForCausalLM:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes))


@pytest.mark.parametrize(
    ("made", "has_prefix", "message"),
    [
        (tiny.t5, True, "expected a causal generator, .* got seq2seq"),
        (tiny.llama, False, "expected a template with the passage before the question"),
        (
            dynamic_rope,
            True,
            "expected .* depend on the tokens before them alone, got LlamaForCausalLM",
        ),
        (mamba, True, "expected .* depend on the tokens before them alone, got MambaForCausalLM"),
    ],
)
def test_what_cannot_be_reused_is_refused(made: Any, has_prefix: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"prefix_cache: {message}"):
        PrefixCache(LARGE).check(adapt_generator(made().eval()), has_prefix=has_prefix)


def test_a_size_in_mebibytes() -> None:
    model = tiny.rag_model("causal").eval()
    keep_prefixes(model, None)
    assert model.prefix_cache is None
    keep_prefixes(model, 3)
    assert model.reader.prefix_cache is model.prefix_cache
    assert model.prefix_cache.max_bytes == 3 * 2**20


def test_settings_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes: expected at least 1, got 0"):
        PrefixCache(0)
    model, batch = model_and_batch()
    model.prefix_cache = PrefixCache(LARGE)
    with pytest.raises(ValueError, match="use_cache: expected True, because there is a prefix_cac"):
        model.generate(**batch, use_cache=False)
    model.generate(**batch, use_cache=True, max_new_tokens=1)
    model.prefix_cache = None
    seq2seq = tiny.rag_model()
    seq2seq.prefix_cache = PrefixCache(LARGE)
    with pytest.raises(ValueError, match="prefix_cache: expected a causal generator"):
        seq2seq.generate(**tiny.batch(), max_new_tokens=2)
    model.generator.train()
    ids, mask = context("causal", [5])
    with pytest.raises(ValueError, match="expected eval mode with a prefix_cache"):
        PrefixCache(LARGE).read(model.adapter, ids, mask, torch.tensor([3]))
