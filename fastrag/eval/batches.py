"""Helpers of all evaluations: choice of questions, batches, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastrag.data.readers import to_question
from fastrag.messages import shown
from fastrag.ops.checks import whole

if TYPE_CHECKING:
    from fastrag.data import Question


def check_evaluated(
    questions: Sequence[Question | Mapping[str, Any]],
    batch_size: int,
    ks: int | Sequence[int],
    limit: int | None,
) -> tuple[list[Question], tuple[int, ...]]:
    """Check the arguments that all evaluations have; return the chosen questions and ks.

    Raises:
        ValueError: there is no question, one is malformed, or a number is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size}")
    ks = tuple(whole("ks", k) for k in (ks if isinstance(ks, Iterable) else [ks]))
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected one or more integers >= 1, got {shown(ks)}")
    chosen = [
        to_question(question, f"questions[{i}]", default_id=str(i))
        for i, question in enumerate(choose_fixed(questions, limit))
    ]
    if not chosen:
        raise ValueError("questions: expected at least one question, got none")
    return chosen, ks


def choose_fixed(questions: Sequence[Any], limit: int | None) -> list[Any]:
    """Choose all questions, or an evenly spaced sample, which is the same at every call.

    Args:
        questions: the questions.
        limit: largest number of questions; None: all.

    Returns:
        A list of at most `limit` questions in their order. In a file sorted by topic, the sample
        has questions of every topic in proportion.

    Raises:
        ValueError: limit < 1.

    Example:
        >>> choose_fixed("abcdef", 3)
        ['a', 'c', 'e']
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected an integer >= 1 or None, got {limit}")
    n = len(questions)
    if limit is None or limit >= n:
        return list(questions)
    return [questions[i * n // limit] for i in range(limit)]


class _Batches:
    """Iterate over batches of questions and move a progress bar, also within a batch."""

    def __init__(self, questions: list[Question], batch_size: int, bar: Any) -> None:
        self.questions = questions
        self.batch_size = batch_size
        self.bar = bar
        self._done = 0.0  # questions
        self._size = 0

    def __iter__(self) -> Iterator[list[Question]]:
        for start in range(0, len(self.questions), self.batch_size):
            batch = self.questions[start : start + self.batch_size]
            self._size = len(batch)
            yield batch
            self._move(start + len(batch))

    def advance(self, share: float) -> None:
        """Move the bar to this share of the current batch."""
        self._move(self._done + share * self._size)

    def _move(self, done: float) -> None:
        self.bar.update(done - self._done)
        self._done = done


@contextmanager
def in_batches(
    questions: list[Question], batch_size: int, progress: bool, description: str
) -> Iterator[_Batches]:
    """Open a progress bar and yield batches that move it."""
    from tqdm.auto import tqdm

    with tqdm(
        total=len(questions),
        desc=description,
        unit="q",
        disable=not progress,
        leave=False,
        smoothing=0.0,  # show the mean rate, because the parts of a batch take unequal times
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} questions "
        "[{elapsed}<{remaining}, {rate_inv_fmt}]",
    ) as bar:
        yield _Batches(questions, batch_size, bar)
