"""RagCollator: make batches of questions for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fastrag.data.processor import AnswerChoice, RagProcessor
from fastrag.data.readers import Question, to_question
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.index import PassageStore


class RagCollator:
    """Collate questions with a processor; a `collate_fn` for any DataLoader.

    Args:
        processor: tokenizers, template and lengths.
        answer_choice: train on the "first" answer or on a "random" one. Random numbers come from
            torch's global generator, which a DataLoader seeds in each worker.
        require_answers: reject questions without answers. If False, a batch has labels unless none
            of its questions has answers.
        passages: the passages whose ids the questions name, for the next three.
        force: put the passages of `positive_ids` and `negative_ids` among the K of their question,
            and name the positive ones for the contrastive term.
        exclude_source: never retrieve the passages of `source_ids` for their question.
        posterior: collate question and answer together, for the posterior encoder of jsa.

    Raises:
        ValueError: another value of `answer_choice`, `processor` is not a RagProcessor, or ids are
            to be looked up without `passages`.

    Example:
        >>> collator = RagCollator(processor)                                  # doctest: +SKIP
        >>> loader = DataLoader(questions, 8, collate_fn=collator)             # doctest: +SKIP
    """

    def __init__(
        self,
        processor: RagProcessor,
        *,
        answer_choice: AnswerChoice = "first",
        require_answers: bool = False,
        passages: PassageStore | None = None,
        force: bool = False,
        exclude_source: bool = False,
        posterior: bool = False,
    ) -> None:
        if not isinstance(processor, RagProcessor):
            raise ValueError(f"processor: expected a RagProcessor, got {type(processor).__name__}")
        if answer_choice not in ("first", "random"):
            raise ValueError(
                f"answer_choice: expected 'first' or 'random', got {shown(answer_choice)}"
            )
        if passages is None and (force or exclude_source):
            name = "force" if force else "exclude_source"
            raise ValueError(f"passages: expected a PassageStore with {name}, got None")
        self.processor = processor
        self.answer_choice = answer_choice
        self.require_answers = require_answers
        self.passages = passages
        self.force = force
        self.exclude_source = exclude_source
        self.posterior = posterior

    def __call__(self, examples: Sequence[Question | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch; see `RagProcessor.collate`.

        Returns:
            What `collate` returns; with `force` also `positive_rows` and `include_rows`, with
            `exclude_source` also `exclude_rows`: rows of the passages, `[B, E]` int64, padded with
            -1. If no question of the batch names a passage, they are left out.

        Raises:
            ValueError: as `collate`, or no passage has an id that a question names.
        """
        questions = [
            to_question(each, f"examples[{i}]", default_id=str(i))
            for i, each in enumerate(examples)
        ]
        batch = self.processor.collate(
            questions,
            answer_choice=self.answer_choice,
            require_answers=self.require_answers,
            posterior=self.posterior,
        )
        if self.force:
            positive = [self._rows(each, "positive_ids") for each in questions]
            negative = [self._rows(each, "negative_ids") for each in questions]
            pairs = zip(positive, negative, strict=True)
            both = [list(dict.fromkeys(one + other)) for one, other in pairs]
            batch |= _padded("positive_rows", positive) | _padded("include_rows", both)
        if self.exclude_source:
            batch |= _padded("exclude_rows", [self._rows(each, "source_ids") for each in questions])
        return batch

    def _rows(self, question: Question, field: str) -> list[int]:
        """Return the rows of the passages that a question names, each once."""
        passages = cast("PassageStore", self.passages)
        try:
            rows = [passages.row_of(id) for id in getattr(question, field)]
        except ValueError as error:
            raise ValueError(f"question {shown(question.id)}: {field}: {error}") from None
        return list(dict.fromkeys(rows))


def _padded(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    """Return rows as a tensor `[B, E]` by name; nothing without any row."""
    width = max(map(len, rows))
    if width == 0:
        return {}
    return {name: torch.tensor([each + [-1] * (width - len(each)) for each in rows])}
