"""Two small tokenizers trained here, and a corpus."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastrag.data import Passage

TEXTS = [
    "Paris is the capital of France.",
    "Berlin is the capital of Germany, a country in Europe with many rivers and hills.",
    "東京 is café </s> [SEP].",
    "x",
    "The Seine is a river in Paris. " * 12,
]


def make_passages(n=5):
    return [Passage(f"id-{i}", f"Title {i}" if i % 2 else "", TEXTS[i % 5]) for i in range(n)]


def word_piece(vocab_size=120):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def byte_bpe(vocab_size=320):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def encoder_tokenizer():
    return word_piece()


@pytest.fixture(scope="session")
def generator_tokenizer():
    return byte_bpe()


@pytest.fixture
def passages():
    return make_passages()
