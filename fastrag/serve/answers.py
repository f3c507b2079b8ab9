"""Answers with citations, whole or token by token; for `fastrag serve` and `fastrag ask`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from fastrag.data.readers import Passage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fastrag.nn import RagModel


class Abandoned(Exception):
    """Raised during generation when no client waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer was read from.

    Attributes:
        passage: the passage.
        prior: p(z|x), its probability before the answer is known.
        supports: whether it has the largest share in the answer.
    """

    passage: Passage
    prior: float
    supports: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: the question.
        text: the answer.
        log_prob: log of its marginal probability over the passages.
        n_tokens: its tokens, the end included.
        citations: the passages that it was read from, best first.
        warnings: for example that the question was cut for the encoder.
    """

    question: str
    text: str
    log_prob: float
    n_tokens: int
    citations: tuple[Citation, ...]
    warnings: tuple[str, ...]

    @property
    def probability(self) -> float:
        """Marginal probability of the whole answer."""
        return math.exp(self.log_prob)

    @property
    def probability_per_token(self) -> float:
        """Geometric mean of the probabilities of its tokens, comparable across lengths."""
        return math.exp(self.log_prob / self.n_tokens)

    @property
    def support(self) -> Passage | None:
        """The passage with the largest share in the answer; None if no passage was found."""
        return next((each.passage for each in self.citations if each.supports), None)


def can_stream(model: RagModel, marginal: str | None = None) -> bool:
    """Whether an answer can be streamed.

    RAG-Sequence cannot stream: it chooses between finished answers, one of each passage.

    Args:
        model: the model.
        marginal: the decoding; None: that of the model.
    """
    return (marginal or model.marginal) == "token"


def answer_questions(
    model: RagModel,
    questions: Sequence[str],
    *,
    n_docs: int | None = None,
    max_new_tokens: int = 32,
    marginal: str | None = None,
    on_text: Callable[[str], None] | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answer questions together, with the passages that the answers come from.

    Args:
        model: the model.
        questions: the questions.
        n_docs: passages per question; None: the model's.
        max_new_tokens: longest answer.
        marginal: the decoding; None: that of the model.
        on_text: called with each further piece of the answer as soon as its words are complete.
            Only for a single question and a decoding that can stream.
        abandoned: called after each token; True ends the generation.

    Returns:
        One answer per question.

    Raises:
        ValueError: an empty question, one that is longer than the generator's window, or arguments
            that `RagModel.generate` refuses.
        Abandoned: `abandoned` returned True.

    Example:
        >>> [answer] = answer_questions(model, ["who discovered radium?"])  # doctest: +SKIP
        >>> answer.text, answer.support.title                               # doctest: +SKIP
        ('Marie Curie', 'Radium')
    """
    processor = model.processor
    collated = processor.collate([{"question": each} for each in questions])
    batch: dict[str, Any] = {name: ids.to(model.device) for name, ids in collated.items()}
    if on_text is not None:
        batch["streamer"] = _Pieces(processor.generator_tokenizer, on_text)

    def check(share: float) -> None:
        if abandoned():
            raise Abandoned

    found: Any = model.generate(
        **batch,
        n_docs=n_docs,
        max_new_tokens=max_new_tokens,
        marginal=marginal,
        on_progress=check,
    )
    priors = found.doc_scores.softmax(dim=1).tolist()
    return [
        Answer(
            question,
            text,
            float(found.scores[i]),
            int(found.lengths[i]),
            _citations(model, found.rows[i], priors[i], int(found.supporting_rows[i])),
            question_warnings(model, question),
        )
        for i, (question, text) in enumerate(
            zip(questions, processor.decode(found.sequences), strict=True)
        )
    ]


def question_warnings(model: RagModel, question: str) -> tuple[str, ...]:
    """Return a warning if the encoder's copy of a question is cut."""
    batch = model.processor.question_batch
    return (cut_warning("question", batch.max_question),) if batch.is_cut(question) else ()


def cut_warning(name: str, limit: int | None) -> str:
    """Return the warning for a question that was cut.

    Args:
        name: the field that holds the question.
        limit: the encoder's window in tokens.
    """
    return f"{name}: cut to the encoder's {limit} tokens; the rest took no part in the search"


def _citations(
    model: RagModel, rows: Tensor, priors: Sequence[float], support: int
) -> tuple[Citation, ...]:
    return tuple(
        Citation(model.passages.passage(row), prior, row == support)
        for row, prior in zip(rows.tolist(), priors, strict=True)
        if row >= 0
    )


class _Pieces(TextStreamer):
    """Pass on the text of an answer as soon as its words are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
