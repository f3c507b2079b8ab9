"""RagCollator: make batches of questions for training."""

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
        answer_choice: train on the "first" answer or on a "random" one. Random numbers come from
            torch's global generator, which a DataLoader seeds in each worker.
        require_answers: reject questions without answers. If False, a batch has labels unless none
            of its questions has answers.

    Raises:
        ValueError: another value of `answer_choice`, or `processor` is not a RagProcessor.

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
