"""Reader: the present generator is what reads and trains, through whatever adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fastrag.index import PassageStore
from fastrag.nn import LMHead, RagModel, Reader, TextEncoder
from tests import tiny
from tests.tiny import T5, VOCAB, batch, encoder, llama, rag_model, t5

VOCABULARY, WIDTH = VOCAB, 16


class Bigram(nn.Module):
    """A generator that is not of transformers: it reads the mean of a context and one word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY)


class BigramAdapter:
    kind = "seq2seq"
    n_vocab = VOCABULARY

    def __init__(self, model: Bigram) -> None:
        self.model = model

    def hidden(self, context_ids, context_mask, labels):
        n_docs = len(context_ids) // len(labels)
        read = (self.model.words(context_ids) * context_mask[..., None]).mean(1)  # [B*K, H]
        before = nn.functional.pad(labels.clamp(min=0)[:, :-1], (1, 0))
        states = self.model.words(before).repeat_interleave(n_docs, 0) + read[:, None]
        return states.unflatten(0, (len(labels), n_docs))

    def head(self):
        return LMHead(self.model.out.weight, self.model.out.bias)


def test_a_generator_from_outside_trains_through_its_adapter(tmp_path):
    torch.manual_seed(0)
    whole, bigram = rag_model(tau=1.0), Bigram()
    model = RagModel(
        whole.question_encoder,
        whole.passage_encoder,
        bigram,
        whole.index,
        whole.passages,
        whole.processor,
        n_docs=3,
        adapter=BigramAdapter(bigram),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    asked = {name: x for name, x in batch().items() if name != "labels"}
    with pytest.raises(
        ValueError, match="to generate with, got BigramAdapter, which can only train"
    ):
        model.generate(**asked)
    with pytest.raises(ValueError, match="to save with, got BigramAdapter, whose Bigram"):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="adapter: expected an object with kind, .* got dict"):
        Reader(bigram, adapter={})


def test_a_replaced_generator_is_the_one_that_trains():
    model, data = rag_model(), batch()
    torch.manual_seed(3)
    other = t5()
    former = model.generator
    model.generator = other
    assert model.reader.generator is other and model.generator is other
    model(**data).loss.backward()
    assert all(p.grad is None for p in former.parameters())
    assert all(p.grad is not None for p in other.parameters())
    alone = rag_model(make_generator=lambda: other)
    torch.testing.assert_close(model(**data).loss, alone(**data).loss)
    model.generator = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="generator: expected a transformers model .* got Linear"):
        model(**data)


def test_a_replaced_part_that_contradicts_another_is_refused_by_name():
    model, data = rag_model(), batch()
    loss, processor = model(**data).loss, model.processor

    def refused(message):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**data)

    def replace(**changed):
        for name, part in {**parts, **changed}.items():
            setattr(model, name, part)

    parts = {name: getattr(model, name) for name in ("generator", "passages", "question_encoder")}
    model.generator = llama()
    refused("processor: expected one of kind 'causal' as the generator is, got 'seq2seq'")
    model.reader.generator = T5ForConditionalGeneration(T5Config(**T5 | {"vocab_size": 20}))
    refused(r"processor: .* of the generator's vocabulary, ids in \[0, 20\), got one with id")
    replace(passages=PassageStore.build(tiny.passages(), tiny.processor(passage_prefix="ada ")))
    refused("passages: expected the processor's passage_prefix ''")
    replace(question_encoder=TextEncoder(encoder().model, prefix="asked "))
    refused("processor: expected the encoder's question_prefix 'asked '")
    replace(processor=tiny.processor(max_context=16))
    assert model(**data).loss.isfinite()
    replace(processor=processor)
    assert torch.equal(model(**data).loss, loss)
