"""Tokenizers of every family, trained here on a few sentences: nothing is downloaded."""

from __future__ import annotations

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Paris is the capital of France. Berlin is the capital of Germany.",
    "Context: the answer is in the passage. Question: what is the capital? Answer: Paris",
    "question: where is Paris? context: the 12 items (x) are in France!",
    "user assistant system Answer in a few words. <s> </s>",
    "café naïve [INST] [/INST]\n\n",
] * 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Llama 3, Qwen and GPT-4 split words; a newline sticks to the punctuation before it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrap(tokenizer, prefix, suffix):
    pattern = " ".join([*prefix, "$A", *suffix])
    tokens = [(token, tokenizer.token_to_id(token)) for token in {*prefix, *suffix}]
    return processors.TemplateProcessing(single=pattern, special_tokens=tokens)


def _byte_bpe(specials, pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def gpt2():
    """Byte-level BPE; no token around a text; pad = eos."""
    tokenizer = _byte_bpe(
        ["<|endoftext|>"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def qwen():
    """Byte-level BPE with GPT-4's word pattern and a ChatML template."""
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    return made


def bart():
    """Byte-level BPE with <s> … </s> around a text."""
    tokenizer = _byte_bpe(
        ["<s>", "<pad>", "</s>"], pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.post_processor = _wrap(tokenizer, ["<s>"], ["</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _sentencepiece_bpe(legacy):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", "<0x0A>"]
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = _wrap(tokenizer, ["<s>"], [])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama_legacy():
    """SentencePiece BPE whose normalizer puts ▁ before every text; opens with <s>."""
    return _sentencepiece_bpe(legacy=True)


def llama():
    """SentencePiece BPE with a Metaspace that puts ▁ before the first word; opens with <s>."""
    return _sentencepiece_bpe(legacy=False)


def t5():
    """Unigram over whitespace-split words; closes with </s>."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=140,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = _wrap(tokenizer, [], ["</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def bert():
    """WordPiece, lower-cased, with [CLS] … [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=specials)
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = _wrap(tokenizer, ["[CLS]"], ["[SEP]"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


FAMILIES = {made.__name__: made for made in (gpt2, qwen, bart, llama_legacy, llama, t5, bert)}
_CACHE: dict[str, PreTrainedTokenizerFast] = {}


@pytest.fixture
def family():
    """family(name) -> the tokenizer of that family, trained once."""

    def get(name):
        if name not in _CACHE:
            _CACHE[name] = FAMILIES[name]()
        return _CACHE[name]

    return get
