"""Answers as text, with the passages that they were read from.

prior       p(z|x), before the answer is known
posterior   p(z|x,y); with RAG-Token p(z|x,y_<=t) of each token, and the mean of these
                                                    (Lewis et al. 2020, sec. 2.1, figure 2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

from fastrag.data.readers import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.nn import RagModel

# Fields of a RagGeneration that an answer is made of.
_NEEDED = (
    *("sequences", "lengths", "scores", "rows", "supporting_rows"),
    *("log_prior", "log_posterior"),
)


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer was read from.

    Attributes:
        passage: the passage.
        row: its row in the index.
        prior: p(z|x).
        posterior: p(z|x,y); with RAG-Token the mean of `by_token`.
        by_token: with RAG-Token p(z|x,y_<=t) of each token of the answer; else empty.
        supports: whether it has the largest share in the answer.
    """

    passage: Passage
    row: int
    prior: float
    posterior: float
    by_token: tuple[float, ...]
    supports: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: the question.
        text: the answer.
        token_ids: its tokens in the generator's vocabulary, the end included.
        log_prob: log of its marginal probability over the passages.
        citations: the passages that it was read from, best first.
        warnings: for example that the question was cut for the encoder.
    """

    question: str
    text: str
    token_ids: tuple[int, ...]
    log_prob: float
    citations: tuple[Citation, ...]
    warnings: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Number of its tokens, the end included."""
        return len(self.token_ids)

    @property
    def probability(self) -> float:
        """Marginal probability of the whole answer."""
        return math.exp(self.log_prob)

    @property
    def probability_per_token(self) -> float:
        """Geometric mean of the probabilities of its tokens, comparable across lengths."""
        return math.exp(self.log_prob / self.n_tokens)

    @property
    def support(self) -> Citation | None:
        """The passage with the largest share in the answer; None if no passage was found."""
        return next((each for each in self.citations if each.supports), None)


def can_stream(model: RagModel, marginal: str | None = None) -> bool:
    """Return whether an answer can be streamed.

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
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Answer]:
    """Answer questions together, with the passages that the answers come from.

    Args:
        model: the model.
        questions: the questions.
        on_text: called with each further piece of the answer as soon as its words are complete.
            Only for a single question and a decoding that can stream.
        settings: other arguments of `RagModel.generate` (`n_docs`, `marginal`, `max_new_tokens`,
            `on_progress`, ...), for one answer per question.

    Returns:
        One answer per question.

    Raises:
        ValueError: an empty question, one that is longer than the generator's window, arguments
            that `RagModel.generate` refuses, or a decoder that leaves out what an answer consists
            of.

    Example:
        >>> [answer] = answer_questions(model, ["who discovered radium?"])  # doctest: +SKIP
        >>> answer.text, answer.support.passage.title                       # doctest: +SKIP
        ('Marie Curie', 'Radium')
    """
    processor = model.processor
    collated = processor.collate([{"question": each} for each in questions])
    batch: dict[str, Any] = {name: ids.to(model.device) for name, ids in collated.items()}
    if on_text is not None:
        batch["streamer"] = _Pieces(processor.generator_tokenizer, on_text)
    found: Any = model.generate(**batch, **settings)
    for name in _NEEDED:
        if getattr(found, name) is None:
            raise ValueError(f"{name}: expected the decoder to return this field, got None")
    texts = processor.decode(found.sequences)
    return [
        _answer(model, found, i, *each) for i, each in enumerate(zip(questions, texts, strict=True))
    ]


def _answer(model: RagModel, found: Any, i: int, question: str, text: str) -> Answer:
    """Return answer i of a `RagGeneration`."""
    n_tokens = int(found.lengths[i])
    prior = found.log_prior[i].float().exp().tolist()
    posterior = found.log_posterior[i].float().exp()  # [K], or [K, T] with RAG-Token
    by_token: list[list[float]] = [[]] * len(prior)
    if posterior.dim() == 2:
        by_token = posterior[:, :n_tokens].tolist()
        posterior = posterior[:, :n_tokens].mean(dim=1)
    passages = zip(found.rows[i].tolist(), prior, posterior.tolist(), by_token, strict=True)
    support = int(found.supporting_rows[i])
    return Answer(
        question,
        text,
        tuple(found.sequences[i, :n_tokens].tolist()),
        float(found.scores[i]),
        tuple(
            Citation(model.passages.passage(row), row, p, w, tuple(shares), row == support)
            for row, p, w, shares in passages
            if row >= 0
        ),
        question_warnings(model, question),
    )


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


class _Pieces(TextStreamer):
    """Pass on the text of an answer as soon as its words are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
