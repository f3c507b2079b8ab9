"""Ask a model questions; collect its answers, their passages, and which of them are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.metrics import exact_match, f1
from fastrag.eval.retrieval import Judge
from fastrag.generation.answers import Answer, answer_questions

if TYPE_CHECKING:
    from fastrag.data import Question
    from fastrag.nn import RagModel


@dataclass(frozen=True, slots=True)
class Reading:
    """One question with the model's answer and the passages that it comes from.

    Attributes:
        id: the question's id.
        accepted: the accepted answers; empty if none are known.
        answer: the generated answer, with prior and posterior of the retrieved passages.
        tokens: its tokens as text, including its end.
        exact_match: whether the answer is an accepted one; None without accepted answers.
        f1: word overlap with the best accepted answer; None without accepted answers.
        right: of each passage of `answer.citations`, whether the question names it, or else whether
            it contains an accepted answer; None if the question has neither.
    """

    id: str
    accepted: tuple[str, ...]
    answer: Answer
    tokens: tuple[str, ...]
    exact_match: bool | None
    f1: float | None
    right: tuple[bool, ...] | None

    @property
    def right_rank(self) -> int | None:
        """Place of the first right passage, from 1; 0 if none is right; None if not judged."""
        if not self.right:
            return None
        return self.right.index(True) + 1 if any(self.right) else 0


def read_answers(
    model: RagModel,
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    max_new_tokens: int = 32,
    marginal: str | None = None,
    progress: bool = True,
) -> list[Reading]:
    """Answer questions and judge the answers and the passages that they come from.

    Args:
        model: the model; its training mode is restored afterwards.
        questions: the questions.
        batch_size: questions per batch.
        limit: read only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        max_new_tokens: length limit of an answer.
        marginal: the decoding, a name in `fastrag.generation.DECODERS`; None: that of the model.
        progress: show a progress bar.

    Returns:
        One reading per question, in the order of the questions.

    Raises:
        ValueError: there is no question, one is malformed, or a number is not positive.

    Example:
        >>> [reading] = read_answers(model, [{"question": "who discovered radium?"}])
        ...                                                              # doctest: +SKIP
        >>> [each.posterior for each in reading.answer.citations]        # doctest: +SKIP
        [0.94, 0.03, 0.02, 0.01, 0.0]
    """
    chosen, _ = check_evaluated(questions, batch_size, 1, limit)
    judge = Judge(model.passages)
    readings: list[Reading] = []
    with in_batches(chosen, batch_size, progress, "inspect") as batches:
        for asked in batches:
            answers = answer_questions(
                model,
                [question.question for question in asked],
                max_new_tokens=max_new_tokens,
                marginal=marginal,
                on_progress=batches.advance,
            )
            for question, answer in zip(asked, answers, strict=True):
                readings.append(_reading(model, judge, question, answer))
    return readings


def _reading(model: RagModel, judge: Judge, question: Question, answer: Answer) -> Reading:
    accepted = question.answers
    hits = judge.ranking(question, [each.row for each in answer.citations]).hits
    tokenizer = model.processor.generator_tokenizer
    return Reading(
        id=question.id,
        accepted=accepted,
        answer=answer,
        tokens=tuple(_token_text(tokenizer, id) for id in answer.token_ids),
        exact_match=exact_match(answer.text, accepted) == 1.0 if accepted else None,
        f1=f1(answer.text, accepted) if accepted else None,
        right=None if hits is None else tuple(k in hits for k in range(len(answer.citations))),
    )


def _token_text(tokenizer: Any, id: int) -> str:
    """Return a token as text, or by its name in the vocabulary if it is no text by itself."""
    text = tokenizer.decode([id])
    # a byte of a longer character, or a bare space
    return tokenizer.convert_ids_to_tokens(id) if not text.strip() or "\ufffd" in text else text
