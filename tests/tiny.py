"""Tiny real objects for tests, made on the fly: tokenizers, facts, store, models, collator, batch.

The facts are one per person: `ada likes red`. Asked for `ada`, a model has to retrieve her passage
and to say `red`. Encoders and generator have vocabularies of one size in which a word has two ids,
so that ids of one that reach the other change the result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastrag.data import Passage, Question, RagCollator, RagProcessor, Template
from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import RagModel, TextEncoder

NAMES = ("ada", "bob", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
COLOURS = (
    *("red", "blue", "green", "pink", "black", "white"),
    *("brown", "grey", "gold", "teal", "navy", "plum"),
)
# The last ones are those of the templates: the one below, and Template.default of both kinds.
WORDS = (*NAMES, *COLOURS, "likes", "asked", "says", "question", "context", "answer", ":")
TEMPLATE = Template(
    context="{passage} asked {question} says", passage="{title} {text}", answer=" {answer}"
)

# What transformers from 5.20 on calls the switch that it called gradient_checkpointing before.
NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"

PAD, BOS, EOS = 0, 1, 2  # of the generators
GENERATOR_SPECIALS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
ENCODER_SPECIALS = {
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}
VOCAB = len(GENERATOR_SPECIALS) + len(WORDS)
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    **SPECIAL_IDS,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **SPECIAL_IDS,
}

Kind = Literal["seq2seq", "causal"]


def passages(n: int = 12) -> list[Passage]:
    """One passage per person: the colour that the person likes."""
    return [Passage(f"p{i}", NAMES[i], f"likes {COLOURS[i]}") for i in range(n)]


def questions(n: int = 12) -> list[Question]:
    """One question per person; the person's passage is the positive one."""
    return [Question(f"q{i}", NAMES[i], (COLOURS[i],), (f"p{i}",)) for i in range(n)]


def tokenizer(role: Literal["encoder", "seq2seq", "causal"]) -> PreTrainedTokenizerFast:
    """A word tokenizer: of encoders, which frames with [CLS] and [SEP], or of a kind of generator.

    That of seq2seq models ends a text with </s>, that of causal ones puts nothing around it.
    """
    specials, words = (
        (ENCODER_SPECIALS, WORDS[::-1]) if role == "encoder" else (GENERATOR_SPECIALS, WORDS)
    )
    vocab = {token: i for i, token in enumerate([*specials.values(), *words])}
    made = Tokenizer(models.WordLevel(vocab, unk_token=specials["unk_token"]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = {"encoder": "[CLS] $A [SEP]", "seq2seq": "$A </s>", "causal": "$A"}[role]
    around = set(frame.split()) - {"$A"}
    made.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, vocab[token]) for token in around]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def encoder(*, seed: int = 0, normalize: bool = True, dropout: float = 0.0) -> TextEncoder:
    """A one-layer BERT of width 16 with mean pooling, to which texts differ by their words.

    Words are made ten times as large as positions: of vectors that differ by both alike, the shared
    positions would be the greater part, and every prior nearly uniform.
    """
    torch.manual_seed(seed)
    config = BertConfig(**BERT, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(10.0)
    return TextEncoder(model, normalize=normalize)


def t5() -> T5ForConditionalGeneration:
    """The default seq2seq generator; its head is its embedding."""
    return T5ForConditionalGeneration(T5Config(**T5))


def llama() -> LlamaForCausalLM:
    """The default causal generator; its head is its embedding."""
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))


def processor(kind: Kind = "seq2seq", **settings: Any) -> RagProcessor:
    """The processor of `rag_model(kind)`."""
    tokenizers = {
        "question_tokenizer": tokenizer("encoder"),
        "generator_tokenizer": tokenizer(kind),
    }
    defaults = {"template": TEMPLATE, "kind": kind, "max_context": 32}
    return RagProcessor(**tokenizers | defaults | settings)


def store(kind: Kind = "seq2seq", n: int = 12) -> PassageStore:
    """`passages(n)`, tokenised for the encoder and for a kind of generator."""
    return PassageStore.build(passages(n), processor(kind))


def rag_model(
    kind: Kind = "seq2seq",
    *,
    make_generator: Callable[[], Any] | None = None,
    n_passages: int = 12,
    max_context: int = 32,
    shared: bool = False,
    fill_index: bool = True,
    seed: int = 0,
    normalize: bool = True,
    dropout: float = 0.0,
    **settings: Any,
) -> RagModel:
    """A whole RagModel over `passages(n_passages)` in train mode, float32.

    Both encoders have the same weights; with `shared` they are one module.
    """
    question_encoder = encoder(seed=seed, normalize=normalize, dropout=dropout)
    passage_encoder = (
        question_encoder if shared else encoder(seed=seed, normalize=normalize, dropout=dropout)
    )
    torch.manual_seed(seed)
    model = RagModel(
        question_encoder,
        passage_encoder,
        (make_generator or {"seq2seq": t5, "causal": llama}[kind])(),
        FlatIndex(passage_encoder.dim),
        store(kind, n_passages),
        processor(kind, max_context=max_context),
        **{"n_docs": 3} | settings,
    )
    if fill_index:
        model.refresh_index()
    return model.train()


def collator(kind: Kind = "seq2seq", **settings: Any) -> RagCollator:
    """The collator that fits `rag_model(kind)`."""
    return RagCollator(processor(kind), **settings)


def batch(kind: Kind = "seq2seq", n: int = 4) -> dict[str, torch.Tensor]:
    """The first n questions, collated."""
    return collator(kind)(questions(n))


def save_parts(folder: Path) -> None:
    """Write the folders `encoder` and `generator` (T5), tokenizers included, as a user has them."""
    encoder().save_pretrained(folder / "encoder")
    tokenizer("encoder").save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    t5().save_pretrained(folder / "generator")
    tokenizer("seq2seq").save_pretrained(folder / "generator")


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Assert that two models have the same parameters and buffers."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if not name.endswith("_extra_state"):  # the version of an index that was rebuilt is another
            torch.testing.assert_close(tensor, theirs[name], msg=name)
