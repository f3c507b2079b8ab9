"""RagProcessor: the conversion of text to token ids and back, with all its settings.

    passages = PassageStore.build(corpus, processor)                            # the corpus
    batch = processor.collate(questions)                                        # questions, answers
    contexts = processor.contexts(passages, rows, batch["prompt_ids"], batch["prompt_mask"])
    texts = processor.decode(answer_ids)

A RAG model has two vocabularies, the encoders' and the generator's. A passage is tokenised in both
when the store is built, and a question in both when it is collated, so no training step converts
token ids back to text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastrag import manifests
from fastrag.data.readers import Passage, Question, to_question
from fastrag.data.templates import KINDS, BoundTemplate, Kind, Template, stream_fingerprint
from fastrag.data.tokenization import (
    QuestionBatch,
    encode_framed,
    frame_within,
    load_tokenizer,
    pad_ids,
)
from fastrag.manifests import integer, one_of, optional, record, text
from fastrag.messages import shown
from fastrag.ops import checks
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.index import PassageStore

AnswerChoice = Literal["first", "random"]
CONFIG = "processor.json"
MAX_PASSAGE = 256  # default limit of a passage for its encoder, in tokens
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


class Contexts(NamedTuple):
    """The generator's inputs for B questions with K passages each.

    Attributes:
        ids: token ids of the contexts, `[B*K, L]` int64, the K contexts of a question next to each
            other; padded on the left for a causal generator, on the right for a seq2seq one.
        mask: `[B*K, L]` int64, 1 at tokens. No context is empty.
        n_cut: number of passages that were cut, a 0-d int64 tensor on the device of `ids`.
        passage_len: number of tokens of each passage after the cut, `[B, K]` int64.
        n_before: tokens of the template before the question; None if it puts the question first.
    """

    ids: Tensor
    mask: Tensor
    n_cut: Tensor
    passage_len: Tensor
    n_before: int | None

    @property
    def prefix_len(self) -> Tensor | None:
        """Number of tokens before the question, `[B*K]`; None if the question comes first."""
        return None if self.n_before is None else (self.passage_len + self.n_before).flatten()


class RagProcessor:
    """Tokenise passages and questions, build the generator's inputs, and decode answers.

    Args:
        question_tokenizer: the question encoder's tokenizer.
        generator_tokenizer: the generator's tokenizer.
        template: text around passage, question and answer; None: `Template.default(kind)`.
        kind: kind of the generator, "seq2seq" or "causal".
        passage_tokenizer: the passage encoder's tokenizer; None: the question encoder's.
        question_prefix: text put before each question for its encoder (`"query: "`).
        passage_prefix: text put before each passage for its encoder (`"passage: "`).
        max_question: length limit of a question for its encoder in tokens, with special tokens. The
            text of a longer question is cut, the first time with a warning. None: the tokenizer's
            `model_max_length`, if set.
        max_prompt: length limit of a question in the generator's vocabulary. A longer one is an
            error, because the generator always gets the whole question. None: only `max_context`
            limits it.
        max_answer: length limit of an answer in tokens. A longer one is cut on the right and has no
            end token, so the loss is that of the prefix. None: no limit.
        max_passage: length limit of a passage for its encoder in tokens, with special tokens. The
            text of a longer passage is cut. None: no limit.
        max_context: length limit of the generator's input in tokens. Passages are cut to fit;
            question and template are not.

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
        max_passage: int | None = MAX_PASSAGE,
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
        frame_within(self.passage_tokenizer, "max_passage", max_passage)
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
        max_passage: int | None = MAX_PASSAGE,
        **settings: Any,
    ) -> RagProcessor:
        """Make a processor with the prefixes and length limits of two encoders.

        Args:
            question_encoder: a module; its attributes `prefix` and `max_length` are used if it has
                them, as `TextEncoder` does.
            passage_encoder: the same for passages; None: no prefix and no limit.
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
        """Largest token id that the generator can receive, from its tokenizer or the template."""
        own = (self.bound.pad_id, self.bound.eos_id, *itertools.chain(*self.bound.literals))
        # Added tokens do not count: some tokenizers add one that the language model does not have.
        return max(self.generator_tokenizer.vocab_size - 1, *own)

    def collate(
        self,
        examples: Sequence[Question | Mapping[str, Any]],
        *,
        answer_choice: AnswerChoice = "first",
        require_answers: bool = False,
        posterior: bool = False,
    ) -> dict[str, Tensor]:
        """Tokenise questions and their answers in both vocabularies and pad them.

        Masks are computed from lengths and not from the pad id, so EOS is a label even if pad and
        EOS are the same token.

        Args:
            examples: questions, or mappings with `question` and optionally `id` and `answers`.
                Either all have answers or none has.
            answer_choice: the label is the "first" answer or a "random" one (from torch's
                generator).
            require_answers: reject questions without answers. If False, a batch without answers has
                no labels.
            posterior: also return answer and question together, for a posterior encoder.

        Returns:
            `input_ids`, `attention_mask` `[B, S]` int64 for the question encoder; `prompt_ids`,
            `prompt_mask` `[B, S']` int64, the questions in the generator's vocabulary,
            right-padded; with answers also `labels` `[B, T]` int64, padded with -100, and if asked
            for `posterior_ids`, `posterior_mask` `[B, S'']` int64 in the encoder's vocabulary.

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
            answers = [_answer_of(question, answer_choice) for question in questions]
            ids = [self.bound.answer_ids(answer)[: self.max_answer] for answer in answers]
            batch["labels"], _ = pad_ids(ids, IGNORE_INDEX)
            if posterior:  # the answer first: a text that is too long is cut at its end
                both = [
                    dataclasses.replace(question, question=f"{answer.strip()} {question.question}")
                    for question, answer in zip(questions, answers, strict=True)
                ]
                batch["posterior_ids"], batch["posterior_mask"] = self.question_batch(both).values()
        return batch

    def tokenize(self, passages: Sequence[Passage]) -> dict[str, list[list[int]]]:
        """Tokenise passages in both vocabularies.

        Args:
            passages: the passages.

        Returns:
            Token ids by stream. "encoder": the input of the passage encoder, with special tokens,
            cut at `max_passage`. "generator": the passage's piece of the template, uncut.
        """
        rendered = [self.template.render_passage(passage) for passage in passages]
        prefixed = [self.passage_prefix + text for text in rendered]
        return {
            "encoder": encode_framed(self.passage_tokenizer, prefixed, self.max_passage),
            "generator": self.bound.passage_pieces(rendered),
        }

    def streams(self) -> dict[str, dict[str, Any]]:
        """Return the settings of each stream of `tokenize`: fingerprint, limit and prefix."""
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
        """Reject passages that were tokenised with other settings.

        Args:
            passages: the passages. Their `max_passage` may differ.

        Raises:
            ValueError: another tokenizer, passage template or prefix; the message says which.
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
        """Join questions and their passages into the generator's inputs.

        Args:
            passages: the passages.
            rows: `[B, K]` int64; -1 is missing.
            prompt_ids: questions in the generator's vocabulary, `[B, S']` int64.
            prompt_mask: `[B, S']`, 1 at tokens; None: no padding.

        Returns:
            `Contexts`.

        Raises:
            ValueError: token ids outside the vocabulary (checked on the CPU only), shapes that
                disagree, or question and template longer than `max_context`.
        """
        checks.check_ids("prompt_ids", prompt_ids, self._n_vocab)
        if prompt_mask is None:
            prompt_mask = torch.ones_like(prompt_ids)
        ids, lengths = passages.gather(rows, "generator", max_length=self.max_context)
        return join_contexts(self.bound, self.max_context, ids, lengths, prompt_ids, prompt_mask)

    def decode(self, sequences: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Decode answers to text.

        Args:
            sequences: generated token ids or labels, `[B, T]`; special tokens and -100 are skipped.

        Returns:
            B texts, without white space at either end.
        """
        answers = sequences.tolist() if isinstance(sequences, Tensor) else sequences
        counted = [[i for i in answer if i != IGNORE_INDEX] for answer in answers]
        texts = self.generator_tokenizer.batch_decode(counted, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizers, template and lengths to a folder, which may already hold a model.

        Args:
            path: the folder; created if it does not exist. The tokenizers are saved in the
                subfolders `question_encoder`, `generator` and, if the passages have a tokenizer of
                their own, `passage_encoder`.
        """
        folder = Path(path)
        for name, part in FOLDERS.items():
            if name != "passage_tokenizer" or self.passage_tokenizer is not self.question_tokenizer:
                getattr(self, name).save_pretrained(folder / part)
        settings = {name: getattr(self, name) for name in ("kind", *_TEXTS, *_LENGTHS)}
        manifests.write(folder / CONFIG, {**settings, "template": self.template.to_dict()})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> RagProcessor:
        """Load a processor that `save_pretrained` wrote; nothing is downloaded.

        Args:
            path: the folder, which may be that of a saved RagModel.
            overrides: arguments of the constructor that replace the stored ones.

        Returns:
            The processor.

        Raises:
            ValueError: a file is missing or not as expected; the message names it.
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


def _answer_of(question: Question, choice: AnswerChoice) -> str:
    """Return the answer to train on."""
    place = int(torch.randint(len(question.answers), ())) if choice == "random" else 0
    answer = question.answers[place]
    if not answer.strip():
        raise ValueError(f"question {shown(question.id)}: expected an answer, got an empty text")
    return answer


def join_contexts(
    template: BoundTemplate,
    max_context: int,
    passage_ids: Tensor,
    passage_len: Tensor,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
) -> Contexts:
    """Join the pieces of B questions with K passages each.

    Args:
        template: a template bound to the generator's tokenizer.
        max_context: longest context, in tokens.
        passage_ids: `[B, K, Lp]` int64, right-padded.
        passage_len: `[B, K]` int64; 0 for a missing passage, whose context is the template with
            only the question.
        prompt_ids: `[B, S]` int64, the questions in the generator's vocabulary.
        prompt_mask: `[B, S]`, 1 at tokens.

    Returns:
        `Contexts`.

    Raises:
        ValueError: shapes disagree, or question and template are longer than `max_context`. On a
            GPU, where reading a length would wait for the device, the width of `prompt_ids` counts
            as the length of each question.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> template = SimpleNamespace(kind="causal", slots=("passage", "question"), pad_id=0,
        ...                            literals=((1,), (2,), (3,)))
        >>> passages, question = torch.tensor([[[7, 8, 9]]]), torch.tensor([[5]])
        >>> contexts = join_contexts(
        ...     template, 6, passages, torch.tensor([[3]]), question, torch.tensor([[1]]))
        >>> contexts.ids, int(contexts.n_cut)
        (tensor([[1, 7, 8, 2, 5, 3]]), 1)
    """
    n_questions, n_docs, passage_width = passage_ids.shape
    if prompt_ids.shape[0] != n_questions or prompt_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"prompt_ids, prompt_mask: expected [B, S] with B = {n_questions}, got "
            f"{list(prompt_ids.shape)} and {list(prompt_mask.shape)}"
        )
    device = passage_ids.device
    prompt_mask = prompt_mask.bool()
    n_literals = sum(map(len, template.literals))
    room = max_context - n_literals - prompt_mask.sum(dim=1)  # [B], tokens left for the passage
    _check_room(room, n_literals, prompt_ids.shape[1], max_context)
    kept = torch.minimum(passage_len, room.clamp(min=0)[:, None])  # [B, K]
    slots = {
        "passage": (passage_ids, torch.arange(passage_width, device=device) < kept[..., None]),
        "question": (prompt_ids[:, None], prompt_mask[:, None]),
    }
    first, second, third = _on_device(template.literals, device)
    pieces = (first, slots[template.slots[0]], second, slots[template.slots[1]], third)
    shape = (n_questions, n_docs, -1)
    # [B*K, W]: all pieces next to each other, with their padding
    tokens = torch.cat([ids.expand(shape) for ids, _ in pieces], dim=2).flatten(0, 1)
    present = torch.cat([mask.expand(shape) for _, mask in pieces], dim=2).flatten(0, 1)
    place = present.cumsum(dim=1)  # 1 for the first token of a context
    total = place[:, -1:]
    # On a GPU, reading the longest context would wait for the device; the shapes are a bound of it.
    width = int(total.max()) if device.type == "cpu" else min(max_context, tokens.shape[1])
    column = torch.arange(width, device=device)
    if template.kind == "causal":
        place = place + (width - total)
        mask = column >= width - total
    else:
        mask = column < total
    # Column 0 receives the padding of all pieces and is dropped.
    ids = tokens.new_full((len(tokens), width + 1), template.pad_id)
    ids.scatter_(1, place.masked_fill(~present, 0), tokens)
    n_before = None
    if template.slots[0] == "passage":
        n_before = len(template.literals[0]) + len(template.literals[1])
    return Contexts(ids[:, 1:], mask.long(), (kept < passage_len).sum(), kept, n_before)


def _check_room(room: Tensor, n_literals: int, width: int, max_context: int) -> None:
    """Raise ValueError if a question and the template are longer than the window."""
    longest, example = width, ""
    if room.device.type == "cpu" and len(room):
        worst = int(room.argmin())
        longest, example = max_context - n_literals - int(room[worst]), f" (example {worst})"
    if longest + n_literals > max_context:
        raise ValueError(
            f"prompt_ids: expected question and template within max_context = {max_context}, got "
            f"{longest} + {n_literals} tokens{example}"
        )


@functools.lru_cache(maxsize=64)
def _on_device(
    literals: tuple[tuple[int, ...], ...], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return ids and mask of each literal, cached: a copy to a GPU would wait in each step."""
    tensors = [torch.tensor(ids, dtype=torch.int64, device=device) for ids in literals]
    return [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in tensors]


def shortest(*lengths: int | None) -> int | None:
    """Return the smallest of several limits; None means no limit."""
    return min((length for length in lengths if length is not None), default=None)
