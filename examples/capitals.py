"""Shared by the short examples: capitals of the embedded data set, and a RagModel that finds them.

Each example is run with two models, which are folders or Hub ids:

    python examples/bare_loop.py intfloat/e5-small-v2 google-t5/t5-small
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from fastrag import FlatIndex, PassageStore, RagModel, TextEncoder
from fastrag.data import Passage, Question, RagProcessor, default_dataset
from fastrag.train import parameter_groups


def capitals(n: int = 160) -> tuple[list[Passage], list[Question]]:
    """Return n passages that name a capital; question i is about passage i."""
    data = default_dataset()
    asked = {question.positive: question for question in data.questions["train"]}
    passages = [each for each in data.passages if each.id.endswith("/capital")]
    passages = [each for each in passages if each.id in asked][:n]
    return passages, [asked[each.id] for each in passages]


def read_generator(source: str) -> tuple[nn.Module, Any, str]:
    """Read a generator and its tokenizer, and say of which kind it is."""
    seq2seq = AutoConfig.from_pretrained(source).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    kind = "seq2seq" if seq2seq else "causal"
    return loader.from_pretrained(source), AutoTokenizer.from_pretrained(source), kind


def rag_model(encoder: str, generator: str, **settings: Any) -> tuple[RagModel, list[Question]]:
    """Build a RagModel of two pretrained models over the capitals; return it with its questions."""
    passages, questions = capitals()
    encoders = [TextEncoder.from_pretrained(encoder, role=role) for role in ("query", "passage")]
    reader, tokenizer, kind = read_generator(generator)
    processor = RagProcessor.for_encoders(
        *encoders, AutoTokenizer.from_pretrained(encoder), tokenizer, kind=kind
    )
    store = PassageStore.build(passages, processor)
    index = FlatIndex(encoders[0].dim)
    model = RagModel(*encoders, reader, index, store, processor, **{"n_docs": 4} | settings)
    model.refresh_index()
    return model.train(), questions


def train(model: RagModel, questions: list[Question], *, reader_lr: float = 1e-3) -> list[float]:
    """Train for one pass in batches of 16; return the losses. bare_loop.py writes it out."""
    groups = parameter_groups(model, retriever_lr=1e-4, reader_lr=reader_lr)
    optimizer, losses = torch.optim.AdamW(groups), []
    for batch in DataLoader(questions, batch_size=16, collate_fn=model.processor.collate):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    return losses
