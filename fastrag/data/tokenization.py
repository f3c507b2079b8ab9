"""Conversion of text to token ids.

Text from a corpus or a user may spell a special token (`</s>`, `<|im_start|>`). It must stay text,
so it is encoded with `split_special_tokens=True`. The special tokens that a tokenizer puts around a
sequence (`<s> … </s>`, `[CLS] … [SEP]`, `… </s>`) are measured once per tokenizer, so any Hugging
Face tokenizer works.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrag.data.readers import Question
from fastrag.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
# A tokenizer without a limit has a model_max_length of 1e30.
_NO_MAX_LENGTH = 10**9
# Texts that a fingerprint encodes besides the vocabulary: case, accents, digits, runs of spaces,
# newlines, punctuation, a script without spaces.
_FINGERPRINT_TEXTS = (
    "The Quick brown fox, 1234.5!",
    "  two  spaces\n\nand lines\t",
    "naïve café Straße ﬁn",
    "東京は日本の首都",
    "don't (x-y) a/b_c <s> </s>",
)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, target: bool = False
) -> list[list[int]]:
    """Encode texts as ordinary text: no special tokens are added or recognised.

    `"</s>"` inside a text is four ordinary characters. If the vocabulary contains the string itself
    (SentencePiece Unigram: T5 always encodes it as its EOS), its ids are dropped.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        target: encode as the decoder's side (`text_target`; it matters to Marian and mBART).

    Returns:
        One list of ids per text.
    """
    control = _control_ids(tokenizer)
    return [
        ids if control.isdisjoint(ids) else [i for i in ids if i not in control]
        for ids in _bare_ids(tokenizer, texts, target)
    ]


def _bare_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], target: bool
) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        **{"text_target" if target else "text": list(texts)},
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special ids; the unknown token only counts if it is also BOS, EOS or pad."""
    control = set(tokenizer.all_special_ids)
    unknown = tokenizer.unk_token_id
    if unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        control.discard(unknown)
    return control


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a piece of a template, in which special tokens are recognised.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: trusted text, for example `"<|im_end|>\\n<|im_start|>assistant\\n"`.

    Returns:
        The ids, without special tokens around them.
    """
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def special_frame(
    tokenizer: PreTrainedTokenizerBase, *, target: bool = False
) -> tuple[list[int], list[int]]:
    """Measure which special tokens a tokenizer puts before and after one sequence.

    Args:
        tokenizer: a Hugging Face tokenizer.
        target: the decoder's side (`text_target`).

    Returns:
        prefix, suffix: ids, for example `([0], [2])` for BART and `([], [1])` for T5.

    Raises:
        ValueError: the bare ids of a probe are not found inside its framed ids.
    """
    key = "text_target" if target else "text"
    framed = list(tokenizer(**{key: _PROBE}, add_special_tokens=True, verbose=False)["input_ids"])
    bare = _bare_ids(tokenizer, [_PROBE], target)[0]
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise ValueError(
        f"tokenizer {type(tokenizer).__name__}: expected the ids of {_PROBE!r} without special "
        f"tokens, {bare}, inside those with special tokens, got {framed}"
    )


def encode_framed(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int | None = None,
    frame: tuple[list[int], list[int]] | None = None,
) -> list[list[int]]:
    """Encode texts for an encoder, with the tokenizer's special tokens around them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        max_length: cut the text so that the whole has at most this many ids; the special tokens
            stay.
        frame: the special tokens, if they have been measured.

    Returns:
        One list of ids per text.

    Raises:
        ValueError: `max_length` leaves no room for one token of text.
    """
    before, after = frame or frame_within(tokenizer, "max_length", max_length)
    room = None if max_length is None else max_length - len(before) - len(after)
    return [[*before, *ids[:room], *after] for ids in encode_texts(tokenizer, texts)]


def frame_within(
    tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None
) -> tuple[list[int], list[int]]:
    """Return the special tokens around a text; raise ValueError if they leave no room for text."""
    frame = special_frame(tokenizer)
    n_frame = len(frame[0]) + len(frame[1])
    if limit is not None and limit <= n_frame:
        raise ValueError(
            f"{name}: expected more than the tokenizer's {n_frame} special tokens, got {limit}"
        )
    return frame


class QuestionBatch:
    """Tokenise questions for the question encoder and pad them.

    Args:
        tokenizer: the question encoder's tokenizer.
        prefix: text put before each question (`"query: "`).
        max_question: length limit of a question in tokens, with special tokens. The text of a
            longer question is cut, the first time with a warning. None: the tokenizer's
            `model_max_length`, if set.
        warns: False leaves the warning to the caller, who asks `is_cut`; it may be set later.

    Raises:
        ValueError: `max_question` leaves no room for one token of text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prefix: str = "",
        max_question: int | None = None,
        *,
        warns: bool = True,
    ) -> None:
        if max_question is None and tokenizer.model_max_length < _NO_MAX_LENGTH:
            max_question = tokenizer.model_max_length
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.max_question = max_question
        pad = tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad
        self._frame = frame_within(tokenizer, "max_question", max_question)
        self.warns = warns

    def __call__(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both `[B, S]` int64."""
        texts = [self.prefix + question.question.strip() for question in questions]
        framed = encode_framed(self.tokenizer, texts, self.max_question, self._frame)
        if self.warns:
            self._warn_if_cut(questions, framed)
        input_ids, mask = pad_ids(framed, self._pad)
        return {"input_ids": input_ids, "attention_mask": mask}

    def is_cut(self, question: str) -> bool:
        """Whether a question is longer than `max_question`, so that its end is left out."""
        text = self.prefix + question.strip()
        [whole] = encode_framed(self.tokenizer, [text], None, self._frame)
        return self.max_question is not None and len(whole) > self.max_question

    def _warn_if_cut(self, questions: Sequence[Question], framed: list[list[int]]) -> None:
        for question, ids in zip(questions, framed, strict=True):
            if len(ids) == self.max_question and self.is_cut(question.question):
                self.warns = False  # one warning for a whole data set
                warnings.warn(
                    f"question {shown(question.id)}: cut to the encoder's {self.max_question} "
                    "tokens; the rest takes no part in the search. Further ones are not named",
                    stacklevel=4,
                )
                return


def pad_ids(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on the right.

    Args:
        sequences: B lists of ids.
        pad_id: id of the padding.

    Returns:
        ids `[B, L]` and mask `[B, L]`, both int64; the mask is computed from the lengths.
    """
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    width = max(1, int(lengths.max()))
    mask = torch.arange(width)[None, :] < lengths[:, None]
    padded = torch.full(mask.shape, pad_id, dtype=torch.int64)
    padded[mask] = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
    return padded, mask.to(torch.int64)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary and of its encoding of some texts.

    Saving and loading a tokenizer may change its serialised form, but not this hash.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Returns:
        32 hexadecimal digits.
    """
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    frame = special_frame(tokenizer)
    probes = encode_texts(tokenizer, _FINGERPRINT_TEXTS)
    digest = hashlib.sha256(json.dumps([vocab, frame, probes], ensure_ascii=False).encode("utf-8"))
    return digest.hexdigest()[:32]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer from a local folder.

    Args:
        folder: the folder.

    Returns:
        The tokenizer, or None if the folder holds none.

    Raises:
        ValueError: the tokenizer in the folder cannot be read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
        raise ValueError(f"{folder}: expected a readable tokenizer: {error}") from error
