"""How text becomes token ids.

Two facts decide everything here. Text that comes from a corpus or a user may spell a special token
(`</s>`, `<|im_start|>`); it must stay text, so it is encoded with `split_special_tokens=True`.
And what a tokenizer puts *around* a sequence (`<s> … </s>`, `[CLS] … [SEP]`, `… </s>`) is measured
once per tokenizer instead of being assumed, so that any Hugging Face tokenizer works.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrag.data.readers import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
# transformers says "no limit" with 1e30.
_NO_MAX_LENGTH = 10**9
# What a fingerprint encodes besides the vocabulary: case, accents, digits, runs of spaces,
# newlines, punctuation, a script without spaces. Tokenizers that agree on both agree.
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
    """Encodes texts without adding special tokens and without reading any out of the text.

    `"</s>"` inside a text is four ordinary characters. Where the vocabulary itself holds the string
    (SentencePiece Unigram: T5 encodes it to its EOS whatever it is told), those ids are dropped.

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
    """Ids that only the tokenizer may place; an unknown token that is also EOS is one of them."""
    control = set(tokenizer.all_special_ids)
    unknown = tokenizer.unk_token_id
    if unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        control.discard(unknown)
    return control


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encodes a piece of a template, in which special tokens are meant as such.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: trusted text, for example `"<|im_end|>\\n<|im_start|>assistant\\n"`.

    Returns:
        The ids, with no special token added around them.
    """
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def special_frame(
    tokenizer: PreTrainedTokenizerBase, *, target: bool = False
) -> tuple[list[int], list[int]]:
    """Measures what the tokenizer puts before and after one sequence.

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
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> list[list[int]]:
    """Encodes texts with the tokenizer's special tokens around them, as an encoder wants them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        max_length: cut the *text* so that the whole has at most this many ids; the special tokens
            stay.

    Returns:
        One list of ids per text.

    Raises:
        ValueError: `max_length` leaves no room for one token of text.
    """
    prefix, suffix = special_frame(tokenizer)
    room = None
    if max_length is not None:
        room = max_length - len(prefix) - len(suffix)
        if room < 1:
            raise ValueError(
                f"max_length: expected more than the {len(prefix) + len(suffix)} special tokens of "
                f"{type(tokenizer).__name__}, got {max_length}"
            )
    return [prefix + ids[:room] + suffix for ids in encode_texts(tokenizer, texts)]


def frame_within(
    tokenizer: PreTrainedTokenizerBase, name: str, limit: int | None
) -> tuple[list[int], list[int]]:
    """Return the special tokens around a text; raise ValueError if they fill a limit."""
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
        max_question: longest question in tokens, special tokens included; a longer one is cut, its
            special tokens stay. None: the tokenizer's `model_max_length`, if it states one.

    Raises:
        ValueError: the special tokens alone fill `max_question`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prefix: str = "",
        max_question: int | None = None,
    ) -> None:
        if max_question is None and tokenizer.model_max_length < _NO_MAX_LENGTH:
            max_question = tokenizer.model_max_length
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.max_question = max_question
        pad = tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad
        self._frame = frame_within(tokenizer, "max_question", max_question)

    def __call__(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both `[B, S]` int64."""
        before, after = self._frame
        room = self.max_question
        if room is not None:
            room -= len(before) + len(after)
        texts = [self.prefix + question.question.strip() for question in questions]
        ids = encode_texts(self.tokenizer, texts)
        framed = [[*before, *text_ids[:room], *after] for text_ids in ids]
        input_ids, mask = pad_ids(framed, self._pad)
        return {"input_ids": input_ids, "attention_mask": mask}


def pad_ids(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids on the right.

    Args:
        sequences: B lists of ids.
        pad_id: id of the padding.

    Returns:
        ids `[B, L]` and mask `[B, L]`, both int64; the mask comes from the lengths.
    """
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    width = max(1, int(lengths.max()))
    mask = torch.arange(width)[None, :] < lengths[:, None]
    padded = torch.full(mask.shape, pad_id, dtype=torch.int64)
    padded[mask] = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
    return padded, mask.to(torch.int64)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names a tokenizer by what it does: a hash of its vocabulary and of how it encodes probes.

    The serialised form of a tokenizer changes when it is saved and loaded; this does not.

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
    """Read a tokenizer from a local folder.

    Args:
        folder: the folder.

    Returns:
        The tokenizer, or None if the folder holds none.

    Raises:
        ValueError: the folder holds one that cannot be read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
        raise ValueError(f"{folder}: expected a readable tokenizer: {error}") from error
