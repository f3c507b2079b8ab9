"""RagCollator: questions become the tensors that RagModel.forward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastrag.data.readers import Question, to_question
from fastrag.data.templates import BoundTemplate, Kind, Template
from fastrag.data.tokenization import encode_texts, special_frame
from fastrag.messages import shown
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One warp-friendly row block: the kernels read `valid_rows` in whole blocks.
VALID_ROWS_MULTIPLE = 256
# transformers says "no limit" with 1e30.
_NO_MAX_LENGTH = 10**9


class QuestionBatch:
    """Tokenises questions for the question encoder and pads them.

    Args:
        tokenizer: the question encoder's tokenizer.
        prefix: put before each question (`"query: "`).
        max_question: most tokens of a question, special tokens included; a longer one is cut there,
            the special tokens stay. `None`: the tokenizer's `model_max_length` where it states one.

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
        self._frame = special_frame(tokenizer)
        n_frame = len(self._frame[0]) + len(self._frame[1])
        if max_question is not None and max_question <= n_frame:
            raise ValueError(
                f"max_question: expected more than the tokenizer's {n_frame} special "
                f"tokens, got {max_question}"
            )

    def __call__(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Builds `input_ids` and `attention_mask`, both `[B, S]` int64."""
        before, behind = self._frame
        room = self.max_question
        if room is not None:
            room -= len(before) + len(behind)
        texts = [self.prefix + question.question.strip() for question in questions]
        ids = encode_texts(self.tokenizer, texts)
        framed = [[*before, *text_ids[:room], *behind] for text_ids in ids]
        input_ids, mask = pad_ids(framed, self._pad)
        return {"input_ids": input_ids, "attention_mask": mask}


class RagCollator:
    """Tokenises questions once per vocabulary and pads them; a `collate_fn` for any DataLoader.

    Masks come from lengths, never from the pad id: where pad and EOS are the same token, EOS stays
    a label.

    Args:
        question_tokenizer: the question encoder's tokenizer.
        generator_tokenizer: the generator's tokenizer.
        template: the text around passage, question and answer; `None`: `Template.default(kind)`.
        kind: `"seq2seq"` or `"causal"`.
        max_question: most tokens of the encoder's question, special tokens included; a longer
            question is cut there, the special tokens stay. `None`: the tokenizer's
            `model_max_length` where it states one.
        max_prompt: most tokens of the prompt, the question in the generator's vocabulary. A longer
            one is an error, because the generator's question is never cut. `None`: no limit but
            `max_context`.
        max_answer: most tokens of an answer. A longer one is cut on the right, its end token with
            it: the loss is then that of the prefix. `None`: no limit.
        max_context: the generator's window; question and template must leave room for a passage.
        question_prefix: put before the question for the encoder (`"query: "`).
        answer_choice: train on the `"first"` answer or on a `"random"` one (torch's generator, so
            DataLoader workers and resumed runs draw as the loader is seeded).
        require_answers: refuse questions without answers (training). Otherwise a batch without any
            has no labels.

    Raises:
        ValueError: an argument out of range, or a tokenizer that the template cannot be bound to.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"?": 0, "Paris": 1, "capital": 2, "</s>": 3}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> collator = RagCollator(tokenizer, tokenizer, kind="causal")
        >>> batch = collator([{"question": "capital Paris", "answers": ["Paris"]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 1]], [[1, 3]])
    """

    def __init__(
        self,
        question_tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template | None = None,
        kind: Kind = "seq2seq",
        max_question: int | None = None,
        max_prompt: int | None = None,
        max_answer: int | None = 64,
        max_context: int | None = None,
        question_prefix: str = "",
        answer_choice: Literal["first", "random"] = "first",
        require_answers: bool = False,
    ) -> None:
        if answer_choice not in ("first", "random"):
            raise ValueError(
                f"answer_choice: expected 'first' or 'random', got {shown(answer_choice)}"
            )
        limits = {
            "max_question": max_question,
            "max_prompt": max_prompt,
            "max_answer": max_answer,
            "max_context": max_context,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1 token or None, got {value}")
        tokenizers = {
            "question_tokenizer": question_tokenizer,
            "generator_tokenizer": generator_tokenizer,
        }
        for name, tokenizer in tokenizers.items():
            if not callable(tokenizer):
                raise ValueError(
                    f"{name}: expected a tokenizer of transformers, got {type(tokenizer).__name__}"
                )
        self.template = template or Template.default(kind)
        self.kind = kind
        self.max_prompt = max_prompt
        self.max_answer = max_answer
        self.max_context = max_context
        self.question_batch = QuestionBatch(question_tokenizer, question_prefix, max_question)
        self.answer_choice = answer_choice
        self.require_answers = require_answers
        self.bound: BoundTemplate = self.template.bind(generator_tokenizer, kind)
        if max_context is not None:
            self.bound.window(max_context)
        self.question_tokenizer = question_tokenizer
        self.generator_tokenizer = generator_tokenizer

    @property
    def question_prefix(self) -> str:
        """The text before the question for the encoder."""
        return self.question_batch.prefix

    @property
    def max_question(self) -> int | None:
        """Most tokens of the encoder's question; None: no limit."""
        return self.question_batch.max_question

    def __call__(self, examples: Sequence[Question | Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Builds one batch.

        Args:
            examples: questions, or mappings with `question` and optionally `id` and `answers`.
                Either all have answers or none has.

        Returns:
            `input_ids`, `attention_mask` `[B, S]` int64 for the question encoder; `prompt_ids`,
            `prompt_mask` `[B, S']` int64, the question's piece in the generator's vocabulary,
            right-padded; with answers also `labels` `[B, T]` int64, padded with -100, and
            `valid_rows` `[R]` int32, the positions b·T + t that count, padded with -1 to a
            multiple of 256.

        Raises:
            ValueError: empty batch, empty question, question + template over the window, or only
                some examples with answers. The message names the question's id.
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
        if self.require_answers or any(answered):
            if not all(answered):
                missing = questions[answered.index(False)]
                why = "training needs them" if self.require_answers else "others of the batch have"
                raise ValueError(
                    f"question {shown(missing.id)}: expected answers ({why}), got none"
                )
            answers = [self._answer_ids(question) for question in questions]
            batch["labels"], _ = pad_ids(answers, IGNORE_INDEX)
            batch["valid_rows"] = valid_rows(
                [len(ids) for ids in answers], batch["labels"].shape[1]
            )
        return batch

    def _prompt_ids(self, question: Question) -> list[int]:
        ids = self.bound.question_ids(question.question)
        n, n_template = len(ids), self.bound.n_literal_tokens
        if self.max_prompt is not None and n > self.max_prompt:
            raise ValueError(
                f"question {shown(question.id)}: expected at most max_prompt = {self.max_prompt} "
                f"tokens in the generator's vocabulary, got {n}"
            )
        if self.max_context is not None and n + n_template >= self.max_context:
            raise ValueError(
                f"question {shown(question.id)}: expected question and template to leave room for "
                f"a passage in max_context = {self.max_context} tokens, "
                f"got {n} + {n_template} tokens"
            )
        return ids

    def _answer_ids(self, question: Question) -> list[int]:
        choice = 0
        if self.answer_choice == "random":
            choice = int(torch.randint(len(question.answers), ()))
        answer = question.answers[choice]
        if not answer.strip():
            raise ValueError(
                f"question {shown(question.id)}: expected an answer, got an empty text"
            )
        return self.bound.answer_ids(answer)[: self.max_answer]


def pad_ids(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pads id lists.

    Args:
        sequences: B lists of ids.
        pad_id: what fills the rest.

    Returns:
        ids `[B, L]` and mask `[B, L]`, both int64; the mask comes from the lengths.
    """
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    width = max(1, int(lengths.max()))
    mask = torch.arange(width)[None, :] < lengths[:, None]
    padded = torch.full(mask.shape, pad_id, dtype=torch.int64)
    padded[mask] = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
    return padded, mask.to(torch.int64)


def valid_rows(lengths: Sequence[int], width: int) -> torch.Tensor:
    """The label positions that count, in a flattened `[B, width]` batch of right-padded labels.

    Args:
        lengths: number of labels of each example.
        width: T, the padded length.

    Returns:
        `[R]` int32: ascending b·width + t, padded with -1 to a multiple of 256.

    Example:
        >>> valid_rows([2, 1], 3)[:4]
        tensor([ 0,  1,  3, -1], dtype=torch.int32)
    """
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    rows = mask.flatten().nonzero().flatten().to(torch.int32)
    n_padded = -(-max(1, rows.numel()) // VALID_ROWS_MULTIPLE) * VALID_ROWS_MULTIPLE
    padded = torch.full((n_padded,), -1, dtype=torch.int32)
    padded[: rows.numel()] = rows
    return padded
