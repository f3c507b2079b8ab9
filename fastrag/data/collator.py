"""RagCollator: questions become batches for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastrag.data.processor import AnswerChoice, RagProcessor
from fastrag.data.readers import Question
from fastrag.messages import shown


class RagCollator:
    """Collate questions with a processor; a `collate_fn` for any DataLoader.

    Args:
        processor: tokenizers, template and lengths.
        answer_choice: train on the "first" answer or on a "random" one (torch's generator, so
            DataLoader workers and resumed runs draw as the loader is seeded).
        require_answers: refuse questions without answers. If False, a batch in which no question
            has any has no labels.

    Raises:
        ValueError: another word for `answer_choice`, or an object that is not a processor.

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
    ) -> None:
        if not isinstance(processor, RagProcessor):
            raise ValueError(f"processor: expected a RagProcessor, got {type(processor).__name__}")
        if answer_choice not in ("first", "random"):
            raise ValueError(
                f"answer_choice: expected 'first' or 'random', got {shown(answer_choice)}"
            )
        self.processor = processor
        self.answer_choice = answer_choice
        self.require_answers = require_answers

    def __call__(self, examples: Sequence[Question | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch; see `RagProcessor.collate`."""
        return self.processor.collate(
            examples, answer_choice=self.answer_choice, require_answers=self.require_answers
        )
