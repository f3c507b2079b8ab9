"""What a model retrieves for a question, what it answers, and which passage the answer is from.

RAG-Sequence   p(z|x,y)        = p(z|x) p(y|x,z)            / sum over z' of the same
RAG-Token      p(z|x,y_<=t)    = p(z|x) p(y_t|x,z,y_<t)     / sum over z' of the same, per token
                                                        (Lewis et al. 2020, sec. 2.1, figure 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.metrics import exact_match, f1
from fastrag.eval.retrieval import Judge
from fastrag.nn.generators import evaluating
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.data import Question
    from fastrag.nn import RagModel


@dataclass(frozen=True, slots=True)
class PassageReading:
    """One retrieved passage.

    Attributes:
        id: its id.
        title: its title; may be empty.
        text: its text.
        prior: p(z|x).
        posterior: p(z|x,y) of the answer; for RAG-Token the mean of `by_token`.
        by_token: p(z|x,y_<=t) of each token of the answer; empty for RAG-Sequence.
        is_right: whether the question names it, or else whether it contains an accepted answer;
            None if the question has neither.
    """

    id: str
    title: str
    text: str
    prior: float
    posterior: float
    by_token: tuple[float, ...]
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Reading:
    """One question with the model's answer and the passages that it comes from.

    Attributes:
        id: the question's id.
        question: the question.
        answers: the accepted answers; empty if none are known.
        prediction: the generated answer.
        tokens: its tokens as text, including its end.
        log_prob: log p(y|x) of the generated answer.
        exact_match: whether the prediction is an accepted answer; None without accepted answers.
        f1: word overlap with the best accepted answer; None without accepted answers.
        passages: the retrieved passages, best first.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    tokens: tuple[str, ...]
    log_prob: float
    exact_match: bool | None
    f1: float | None
    passages: tuple[PassageReading, ...]

    @property
    def right_rank(self) -> int | None:
        """Place of the first right passage, from 1; 0 if none is right; None if not judged."""
        if not self.passages or self.passages[0].is_right is None:
            return None
        right = (i for i, each in enumerate(self.passages, start=1) if each.is_right)
        return next(right, 0)


def read_answers(
    model: RagModel,
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> list[Reading]:
    """Answer questions and return prior and posterior of the passages under each answer.

    The posterior is that of `RagModel.forward` with the generated answer as labels, so it shows
    where the model takes its own answer from, right or wrong.

    Args:
        model: the model; its training mode is restored afterwards.
        questions: the questions.
        batch_size: questions per batch.
        limit: read only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        max_new_tokens: length limit of an answer.
        progress: show a progress bar.

    Returns:
        One reading per question, in the order of the questions.

    Raises:
        ValueError: there is no question, one is malformed, or a number is not positive.

    Example:
        >>> [reading] = read_answers(model, [{"question": "who discovered radium?"}])
        ...                                                              # doctest: +SKIP
        >>> [each.posterior for each in reading.passages]                # doctest: +SKIP
        [0.94, 0.03, 0.02, 0.01, 0.0]
    """
    chosen, _ = check_evaluated(questions, batch_size, 1, limit)
    judge = Judge(model.passages)
    readings: list[Reading] = []
    with (
        evaluating(model),
        in_batches(chosen, batch_size, progress, "inspect") as batches,
    ):
        for asked in batches:
            collated = model.processor.collate([replace(each, answers=()) for each in asked])
            batch: dict[str, Any] = {
                name: value.to(model.device) for name, value in collated.items()
            }
            answer: Any = model.generate(
                **batch, max_new_tokens=max_new_tokens, on_progress=batches.advance
            )
            places = torch.arange(answer.sequences.shape[1], device=model.device)
            ends = answer.lengths.unsqueeze(1)
            labels = answer.sequences.masked_fill(places >= ends, IGNORE_INDEX)
            found = model(**batch, labels=labels, rows=answer.rows, doc_scores=answer.doc_scores)
            prior = found.doc_scores.float().softmax(dim=1).cpu()  # [B, K]
            posterior = found.log_posterior.float().exp().cpu()  # [B, K] or [B, K, T]
            texts = model.processor.decode(answer.sequences)
            for i, question in enumerate(asked):
                n = int(answer.lengths[i])
                readings.append(
                    _reading(
                        model,
                        judge,
                        question,
                        texts[i],
                        answer.sequences[i, :n].tolist(),
                        float(answer.scores[i]),
                        answer.rows[i].tolist(),
                        prior[i],
                        posterior[i] if posterior.dim() == 2 else posterior[i, :, :n],
                    )
                )
    return readings


def _reading(
    model: RagModel,
    judge: Judge,
    question: Question,
    prediction: str,
    token_ids: list[int],
    log_prob: float,
    rows: list[int],
    prior: Tensor,
    posterior: Tensor,
) -> Reading:
    """Put together a reading; `prior` is `[K]`, `posterior` `[K]` or `[K, n]`."""
    answers = question.answers
    hits = judge.ranking(question, rows).hits
    passages = []
    for k, row in enumerate(rows):  # missing passages, row -1, are the last ones
        if row < 0:
            continue
        passage = model.passages.passage(row)
        by_token = tuple(posterior[k].tolist()) if posterior.dim() == 2 else ()
        passages.append(
            PassageReading(
                id=passage.id,
                title=passage.title,
                text=passage.text,
                prior=float(prior[k]),
                posterior=float(posterior[k].mean()),
                by_token=by_token,
                is_right=None if hits is None else k in hits,
            )
        )
    return Reading(
        id=question.id,
        question=question.question,
        answers=answers,
        prediction=prediction,
        tokens=tuple(_token_text(model.processor.generator_tokenizer, id) for id in token_ids),
        log_prob=log_prob,
        exact_match=exact_match(prediction, answers) == 1.0 if answers else None,
        f1=f1(prediction, answers) if answers else None,
        passages=tuple(passages),
    )


def _token_text(tokenizer: Any, id: int) -> str:
    """Return a token as text, or by its name in the vocabulary if it is no text by itself."""
    text = tokenizer.decode([id])
    # a byte of a longer character, or a bare space
    return tokenizer.convert_ids_to_tokens(id) if not text.strip() or "\ufffd" in text else text
