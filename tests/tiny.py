"""Tiny models, tokenizers and facts for tests: random weights, made on the fly, nothing read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastrag.data import Passage, Question, RagCollator, Template
from fastrag.index import FlatIndex, PassageStore
from fastrag.index.refresh import encode_passages
from fastrag.nn import RagModel, TextEncoder

NAMES = ("ada", "bob", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
COLOURS = ("red", "blue", "green", "pink", "black", "white", "brown", "grey")
WORDS = (
    *NAMES,
    *COLOURS,
    *("what", "colour", "does", "like", "the", "house", "of", "is", "painted"),
    *("question", "context", "answer", ":", "?", "."),
)


def passages(n: int = 12) -> list[Passage]:
    """One passage per person: which colour the person's house has."""
    return [
        Passage(
            id=f"p{i}",
            title=NAMES[i],
            text=f"the house of {NAMES[i]} is painted {COLOURS[i % len(COLOURS)]} .",
        )
        for i in range(n)
    ]


def questions(n: int = 12) -> list[Question]:
    """One question per person; the passage of the person is the positive one."""
    return [
        Question(
            id=f"q{i}",
            question=f"what colour does {NAMES[i]} like ?",
            answers=(COLOURS[i % len(COLOURS)],),
            positive_ids=(f"p{i}",),
        )
        for i in range(n)
    ]


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: `bert` frames with [CLS] [SEP], `t5` ends with </s>, `gpt2` bare."""
    specials = {
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
        "gpt2": {"pad_token": "<pad>", "eos_token": "</s>"},
    }[kind] | {"unk_token": "<unk>"}
    vocab = {token: i for i, token in enumerate([*specials.values(), *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
        )
    elif kind == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def encoder(tokenizer: PreTrainedTokenizerFast, seed: int = 0, dropout: float = 0.0) -> TextEncoder:
    """A one-layer BERT with mean pooling."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(BertModel(config, add_pooling_layer=False))


def generator(tokenizer: PreTrainedTokenizerFast, kind: str = "seq2seq", seed: int = 1) -> Any:
    """A one-layer T5 or GPT-2."""
    torch.manual_seed(seed)
    if kind == "causal":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return GPT2LMHeadModel(config)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def model(kind: str = "seq2seq", n_passages: int = 12, **settings: Any) -> RagModel:
    """A RagModel over `passages(n_passages)`, its index already encoded."""
    question_tokenizer = word_tokenizer("bert")
    generator_tokenizer = word_tokenizer("t5" if kind == "seq2seq" else "gpt2")
    passage_encoder = encoder(question_tokenizer, seed=0)
    template = Template.default("causal" if kind == "causal" else "seq2seq")
    store = PassageStore.build(
        passages(n_passages),
        template=template,
        question_tokenizer=question_tokenizer,
        generator_tokenizer=generator_tokenizer,
    )
    index = FlatIndex(passage_encoder.dim)
    index.add(encode_passages(passage_encoder, store))
    return RagModel(
        encoder(question_tokenizer, seed=0),
        passage_encoder,
        generator(generator_tokenizer, kind),
        index,
        store,
        template=template,
        question_tokenizer=question_tokenizer,
        generator_tokenizer=generator_tokenizer,
        **{"n_docs": 3, "max_context": 64} | settings,
    )


def collator(model: RagModel, **settings: Any) -> RagCollator:
    """The collator of `model`."""
    bound = model.builder.template
    return RagCollator(
        model.question_tokenizer,
        model.generator_tokenizer,
        template=bound.template,
        kind=bound.kind,
        max_context=model.max_context,
        **settings,
    )


def save_parts(folder: Path, kind: str = "seq2seq") -> dict[str, str]:
    """Write encoder and generator folders with their tokenizers, as a user has them on disk."""
    parts = {"encoder": str(folder / "encoder"), "generator": str(folder / "generator")}
    question_tokenizer = word_tokenizer("bert")
    generator_tokenizer = word_tokenizer("t5" if kind == "seq2seq" else "gpt2")
    encoder(question_tokenizer).save_pretrained(parts["encoder"])
    question_tokenizer.save_pretrained(parts["encoder"])
    generator(generator_tokenizer, kind).save_pretrained(parts["generator"])
    generator_tokenizer.save_pretrained(parts["generator"])
    return parts
