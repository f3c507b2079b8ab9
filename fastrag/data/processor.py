"""RagProcessor: everything that turns text into token ids and back, decided once.

    passages = PassageStore.build(corpus, processor)                            # tokenised once
    batch = processor.collate(questions)                                        # questions, answers
    contexts = processor.contexts(passages, rows, batch["prompt_ids"], batch["prompt_mask"])
    texts = processor.decode(answer_ids)

Two vocabularies meet in a RAG model, the encoders' and the generator's. A passage is tokenised in
both when the store is built and a question in both when it is collated, so no training step turns
token ids back into text.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastrag import manifests
from fastrag.data.contexts import Contexts, join_contexts
from fastrag.data.readers import Passage, Question, to_question
from fastrag.data.templates import KINDS, BoundTemplate, Kind, Template, stream_fingerprint
from fastrag.data.tokenization import encode_framed, encode_texts, load_tokenizer, special_frame
from fastrag.manifests import integer, one_of, optional, record, text
from fastrag.messages import shown
from fastrag.ops import checks
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.index import PassageStore

AnswerChoice = Literal["first", "random"]
CONFIG = "processor.json"
FOLDERS = {
    "question_tokenizer": "question_encoder",
    "passage_tokenizer": "passage_encoder",
    "generator_tokenizer": "generator",
}
_TEXTS = ("question_prefix", "passage_prefix")
_LENGTHS = ("max_question", "max_prompt", "max_answer", "max_passage", "max_context")
_SAVED = record(
    {
        "kind": one_of(*KINDS),
        "template": record({}),  # as Template.from_dict reads it
        **{name: text() for name in _TEXTS},
        **{name: optional(integer(1)) for name in _LENGTHS[:-1]},
        "max_context": integer(1),
    },
    closed=True,
)
# transformers says "no limit" with 1e30.
_NO_MAX_LENGTH = 10**9


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
        self._frame = _frame_within(tokenizer, "max_question", max_question)

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


class RagProcessor:
    """Hold tokenizers, template and lengths, and do with them all that a RAG model needs.

    Args:
        question_tokenizer: the question encoder's tokenizer.
        generator_tokenizer: the generator's tokenizer.
        template: text around passage, question and answer; None: `Template.default(kind)`.
        kind: kind of the generator, "seq2seq" or "causal".
        passage_tokenizer: the passage encoder's tokenizer; None: the question encoder's.
        question_prefix: text put before each question for its encoder (`"query: "`).
        passage_prefix: text put before each passage for its encoder (`"passage: "`).
        max_question: longest question of the encoder in tokens, special tokens included; a longer
            one is cut, its special tokens stay. None: the tokenizer's `model_max_length`, if it
            states one.
        max_prompt: longest question in the generator's vocabulary. A longer one is an error,
            because the generator's question is never cut. None: no limit but `max_context`.
        max_answer: longest answer in tokens. A longer one is cut on the right together with its end
            token, so the loss is that of the prefix. None: no limit.
        max_passage: longest passage of the encoder in tokens, special tokens included; a longer one
            is cut. None: no limit.
        max_context: longest input of the generator in tokens. Passages are cut to fit; question and
            template are not.

    Raises:
        ValueError: an argument out of range, or a tokenizer that the template cannot be bound to.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"?": 0, "Paris": 1, "capital": 2, "</s>": 3}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> processor = RagProcessor(tokenizer, tokenizer, kind="causal")
        >>> batch = processor.collate([{"question": "capital Paris", "answers": ["Paris"]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 1]], [[1, 3]])
        >>> processor.decode(batch["labels"])
        ['Paris']
    """

    def __init__(
        self,
        question_tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template | None = None,
        kind: Kind = "seq2seq",
        passage_tokenizer: PreTrainedTokenizerBase | None = None,
        question_prefix: str = "",
        passage_prefix: str = "",
        max_question: int | None = None,
        max_prompt: int | None = None,
        max_answer: int | None = 64,
        max_passage: int | None = 256,
        max_context: int = 512,
    ) -> None:
        self.question_tokenizer = question_tokenizer
        self.passage_tokenizer = passage_tokenizer or question_tokenizer
        self.generator_tokenizer = generator_tokenizer
        for name in FOLDERS:
            tokenizer = getattr(self, name)
            if not callable(tokenizer):
                raise ValueError(
                    f"{name}: expected a tokenizer of transformers, got {type(tokenizer).__name__}"
                )
        if template is not None and not isinstance(template, Template):
            raise ValueError(
                f"template: expected a Template or None, got {type(template).__name__}"
            )
        self.kind = kind
        self.template = template or Template.default(kind)
        self.question_prefix = question_prefix
        self.passage_prefix = passage_prefix
        self.max_question = max_question
        self.max_prompt = max_prompt
        self.max_answer = max_answer
        self.max_passage = max_passage
        self.max_context = max_context
        for name in _LENGTHS:
            value = getattr(self, name)
            optional_ = name != "max_context"
            if not (value is None and optional_) and checks.whole(name, value) < 1:
                or_none = " or None" if optional_ else ""
                raise ValueError(f"{name}: expected at least 1 token{or_none}, got {shown(value)}")
        _frame_within(self.passage_tokenizer, "max_passage", max_passage)
        self.question_batch = QuestionBatch(question_tokenizer, question_prefix, max_question)
        self.bound: BoundTemplate = self.template.bind(generator_tokenizer, kind)
        self.bound.window(max_context)
        self._n_vocab = len(generator_tokenizer)

    @classmethod
    def for_encoders(
        cls,
        question_encoder: Any,
        passage_encoder: Any,
        question_tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase,
        *,
        max_question: int | None = None,
        max_passage: int | None = 256,
        **settings: Any,
    ) -> RagProcessor:
        """Make a processor with the prefixes of two encoders and within their lengths.

        Args:
            question_encoder: module that may have `prefix` and `max_length`, as `TextEncoder` has.
            passage_encoder: the same for passages; None: nothing is known of it.
            question_tokenizer: the question encoder's tokenizer.
            generator_tokenizer: the generator's tokenizer.
            max_question: as in the constructor; the encoder's `max_length` is an upper bound.
            max_passage: as in the constructor; the encoder's `max_length` is an upper bound.
            settings: further arguments of the constructor.

        Returns:
            The processor.

        Raises:
            ValueError: as the constructor.
        """
        prefixes = {
            name: getattr(encoder, "prefix", "")
            for name, encoder in zip(_TEXTS, (question_encoder, passage_encoder), strict=True)
        }
        return cls(
            question_tokenizer,
            generator_tokenizer,
            max_question=shortest(max_question, getattr(question_encoder, "max_length", None)),
            max_passage=shortest(max_passage, getattr(passage_encoder, "max_length", None)),
            **{**prefixes, **settings},
        )

    @property
    def largest_id(self) -> int:
        """Largest token id that the generator may be given: of its tokenizer and the template."""
        own = (self.bound.pad_id, self.bound.eos_id, *itertools.chain(*self.bound.literals))
        # without added tokens: some tokenizers add one that the language model does not have
        return max(self.generator_tokenizer.vocab_size - 1, *own)

    def collate(
        self,
        examples: Sequence[Question | Mapping[str, Any]],
        *,
        answer_choice: AnswerChoice = "first",
        require_answers: bool = False,
    ) -> dict[str, Tensor]:
        """Tokenise questions and their answers in both vocabularies and pad them.

        Masks come from lengths, never from the pad id: if pad and EOS are the same token, EOS is
        still a label.

        Args:
            examples: questions, or mappings with `question` and optionally `id` and `answers`.
                Either all have answers or none has.
            answer_choice: the label is the "first" answer or a "random" one (torch's generator).
            require_answers: refuse questions without answers, instead of making a batch without
                labels.

        Returns:
            `input_ids`, `attention_mask` `[B, S]` int64 for the question encoder; `prompt_ids`,
            `prompt_mask` `[B, S']` int64, the questions in the generator's vocabulary,
            right-padded; with answers also `labels` `[B, T]` int64, padded with -100.

        Raises:
            ValueError: an empty batch, an empty question, question and template longer than
                `max_context`, or only some examples with answers. The message names the question.
        """
        questions = [
            to_question(example, f"examples[{i}]", default_id=str(i))
            for i, example in enumerate(examples)
        ]
        if not questions:
            raise ValueError("examples: expected at least one question, got none")
        prompts = [self._prompt_ids(question) for question in questions]
        batch = self.question_batch(questions)
        batch["prompt_ids"], batch["prompt_mask"] = pad_ids(prompts, self.bound.pad_id)
        answered = [bool(question.answers) for question in questions]
        if require_answers or any(answered):
            if not all(answered):
                missing = questions[answered.index(False)]
                why = "training needs them" if require_answers else "others of the batch have"
                raise ValueError(
                    f"question {shown(missing.id)}: expected answers ({why}), got none"
                )
            answers = [self._answer_ids(question, answer_choice) for question in questions]
            batch["labels"], _ = pad_ids(answers, IGNORE_INDEX)
        return batch

    def tokenize(self, passages: Sequence[Passage]) -> dict[str, list[list[int]]]:
        """Tokenise passages in both vocabularies.

        Args:
            passages: the passages.

        Returns:
            Token ids by stream: "encoder", what the passage encoder reads, special tokens included,
            cut at `max_passage`; "generator", the template's passage piece, uncut.
        """
        rendered = [self.template.render_passage(passage) for passage in passages]
        prefixed = [self.passage_prefix + text for text in rendered]
        return {
            "encoder": encode_framed(self.passage_tokenizer, prefixed, self.max_passage),
            "generator": self.bound.passage_pieces(rendered),
        }

    def streams(self) -> dict[str, dict[str, Any]]:
        """Return how `tokenize` makes each stream: fingerprint, cut and prefix."""
        return {
            "encoder": {
                "fingerprint": stream_fingerprint(self.passage_tokenizer),
                "max_tokens": self.max_passage,
                "prefix": self.passage_prefix,
            },
            "generator": {
                "fingerprint": stream_fingerprint(self.generator_tokenizer, self.template),
                "max_tokens": None,
            },
        }

    def check(self, passages: PassageStore) -> None:
        """Refuse passages that were tokenised in another way.

        Args:
            passages: the passages; where their encoder stream was cut is not compared.

        Raises:
            ValueError: another tokenizer, passage template or prefix; it is named.
        """
        passages.check_tokenizer("encoder", self.passage_tokenizer)
        passages.check_tokenizer("generator", self.generator_tokenizer, self.template)
        if passages.prefix != self.passage_prefix:
            raise ValueError(
                f"passages: expected the processor's passage_prefix {shown(self.passage_prefix)} "
                f"in the encoder stream, got {shown(passages.prefix)}"
            )

    def contexts(
        self,
        passages: PassageStore,
        rows: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None = None,
    ) -> Contexts:
        """Join questions and their passages to the generator's inputs.

        Args:
            passages: the passages.
            rows: `[B, K]` int64, -1 = missing.
            prompt_ids: questions in the generator's vocabulary, `[B, S']` int64.
            prompt_mask: `[B, S']`, 1 at tokens; None: no padding.

        Returns:
            `Contexts`.

        Raises:
            ValueError: ids outside the vocabulary (looked at on the CPU only), shapes that
                disagree, or question and template longer than `max_context`.
        """
        checks.check_ids("prompt_ids", prompt_ids, self._n_vocab)
        if prompt_mask is None:
            prompt_mask = torch.ones_like(prompt_ids)
        ids, lengths = passages.gather(rows, "generator", max_length=self.max_context)
        return join_contexts(self.bound, self.max_context, ids, lengths, prompt_ids, prompt_mask)

    def decode(self, sequences: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Turn answers into text.

        Args:
            sequences: generated token ids or labels, `[B, T]`; special tokens and -100 are left
                out.

        Returns:
            One text per row, without spaces around it.
        """
        rows = sequences.tolist() if isinstance(sequences, Tensor) else sequences
        known = [[i for i in row if i != IGNORE_INDEX] for row in rows]
        texts = self.generator_tokenizer.batch_decode(known, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizers, template and lengths into a folder, next to the models in it if any.

        Args:
            path: the folder; made if it does not exist. The tokenizers go to `question_encoder`,
                `generator` and, if it has its own, `passage_encoder`.
        """
        folder = Path(path)
        for name, part in FOLDERS.items():
            if name != "passage_tokenizer" or self.passage_tokenizer is not self.question_tokenizer:
                getattr(self, name).save_pretrained(folder / part)
        settings = {name: getattr(self, name) for name in ("kind", *_TEXTS, *_LENGTHS)}
        manifests.write(folder / CONFIG, {**settings, "template": self.template.to_dict()})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> RagProcessor:
        """Read what `save_pretrained` wrote; nothing is downloaded.

        Args:
            path: the folder, which may be that of a saved RagModel.
            overrides: arguments of the constructor that replace the stored ones.

        Returns:
            The processor.

        Raises:
            ValueError: a file is missing or not as expected; it is named.
        """
        folder = Path(path)
        settings = manifests.read(folder / CONFIG, _SAVED)
        with manifests.named(folder / CONFIG):
            settings["template"] = Template.from_dict(settings["template"])
        for name, part in FOLDERS.items():
            if name not in overrides:
                settings[name] = load_tokenizer(folder / part)
        settings |= overrides
        for name in ("question_tokenizer", "generator_tokenizer"):
            if settings[name] is None:
                raise ValueError(f"{folder / FOLDERS[name]}: expected a tokenizer, found none")
        return cls(**settings)

    def _prompt_ids(self, question: Question) -> list[int]:
        ids = self.bound.question_ids(question.question)
        n, n_template = len(ids), self.bound.n_literal_tokens
        if self.max_prompt is not None and n > self.max_prompt:
            raise ValueError(
                f"question {shown(question.id)}: expected at most max_prompt = {self.max_prompt} "
                f"tokens in the generator's vocabulary, got {n}"
            )
        if n + n_template >= self.max_context:
            raise ValueError(
                f"question {shown(question.id)}: expected question and template to leave room for "
                f"a passage in max_context = {self.max_context} tokens, "
                f"got {n} + {n_template} tokens"
            )
        return ids

    def _answer_ids(self, question: Question, answer_choice: AnswerChoice) -> list[int]:
        choice = 0
        if answer_choice == "random":
            choice = int(torch.randint(len(question.answers), ()))
        answer = question.answers[choice]
        if not answer.strip():
            raise ValueError(
                f"question {shown(question.id)}: expected an answer, got an empty text"
            )
        return self.bound.answer_ids(answer)[: self.max_answer]


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


def _frame_within(
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


def shortest(*lengths: int | None) -> int | None:
    """Return the smallest of several limits, of which None is none."""
    return min((length for length in lengths if length is not None), default=None)
