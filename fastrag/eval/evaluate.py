"""Evaluation of a RAG model on questions: recall@k, exact match, F1 and optionally the loss.

Recall is measured on the passages that the index returns for a question. Exact match and F1 are
measured on the answer of `RagModel.generate`, which decodes by the model's marginal, RAG-Token or
RAG-Sequence, searched greedily (Lewis et al. 2020, sec. 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.metrics import exact_match, f1
from fastrag.eval.retrieval import Judge
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.data import Question, RagProcessor
    from fastrag.nn import RagModel


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one question, with the retrieved passages.

    Attributes:
        id: the question's id.
        question: the question.
        answers: the accepted answers; empty if none are known.
        prediction: the generated answer.
        log_prob: log of the answer's marginal probability over the K passages.
        n_tokens: number of tokens of the answer, including its end.
        passage_id: id of the passage that contributes most to the answer; empty if none was found.
        retrieved: ids of the retrieved passages, best first.
        exact_match: 1.0 or 0.0; NaN without accepted answers.
        f1: word overlap with the best answer; NaN without accepted answers.
        hit_rank: place of the first right passage in `retrieved`, from 0; -1 if none is right; None
            if the question has neither positive passages nor answers.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    log_prob: float
    n_tokens: int
    passage_id: str
    retrieved: tuple[str, ...]
    exact_match: float
    f1: float
    hit_rank: int | None

    @property
    def probability_per_token(self) -> float:
        """Geometric mean of the probabilities of the tokens, comparable between answers."""
        return math.exp(self.log_prob / self.n_tokens)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics over all questions, and the answer to each.

    Attributes:
        metrics: `recall@k` for each k, `em`, `f1`, `n_questions`, and `loss` if requested.
        predictions: one per question, in the order of the questions.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    model: RagModel,
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    batch_size: int = 16,
    ks: int | Sequence[int] = (1, 5),
    limit: int | None = None,
    max_new_tokens: int = 32,
    n_docs: int | None = None,
    marginal: str | None = None,
    loss: bool = False,
    progress: bool = True,
    description: str = "evaluate",
) -> EvalResult:
    """Answer questions and measure retrieval and answers.

    recall@k = share of questions with a right passage among the first k. If a question names its
    positive passages, these are right; otherwise a passage is right if it contains an accepted
    answer (Karpukhin et al. 2020). Questions without either do not count in recall, and questions
    without answers do not count in EM and F1.

    Args:
        model: the model; its training mode is restored afterwards.
        questions: the questions.
        batch_size: questions per batch.
        ks: one k of recall@k, or several.
        limit: evaluate only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        max_new_tokens: length limit of an answer.
        n_docs: passages per question for the answer; None: as in the model.
        marginal: decoding of the answers, see `RagModel.generate`; None: as in the model.
        loss: also compute the marginal NLL per label token.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        Metrics and predictions.

    Raises:
        ValueError: there is no question, one is malformed, batch_size, ks, limit or n_docs is not
            positive, or there is no decoding of this name.

    Example:
        >>> result = evaluate(model, questions, ks=(1, 5))              # doctest: +SKIP
        >>> result.metrics["recall@5"], result.metrics["em"]             # doctest: +SKIP
    """
    chosen, ks = check_evaluated(questions, batch_size, ks, limit)
    if n_docs is not None and n_docs < 1:
        raise ValueError(f"n_docs: expected an integer >= 1 or None, got {n_docs}")
    from fastrag.nn.generators import evaluating

    n_docs = model.n_docs if n_docs is None else n_docs
    judge = Judge(model.passages)
    predictions: list[Prediction] = []
    nll, n_tokens = 0.0, 0
    with (
        evaluating(model),
        torch.no_grad(),
        in_batches(chosen, batch_size, progress, description) as batches,
    ):
        for rows in batches:
            batch = _to_device(_collated(rows, model.processor, loss), model)
            # One search for recall, answer and loss: the best k are the first of a larger k.
            found = _search(model, batch, max(*ks, n_docs, model.n_docs))
            generation: Any = model.generate(
                **(batch if n_docs == model.n_docs else {**batch, "labels": None}),
                marginal=marginal,
                max_new_tokens=max_new_tokens,
                rows=found[:, :n_docs],
                on_progress=batches.advance,
            )
            predictions += _predictions(model, rows, generation, found[:, : max(ks)], judge)
            if "labels" in batch:
                counted = int(batch["labels"].ne(IGNORE_INDEX).sum())
                batch_loss = generation.loss
                if batch_loss is None:  # the answer has another number of passages
                    batch_loss = model(**batch, rows=found[:, : model.n_docs]).loss
                nll += float(batch_loss) * counted
                n_tokens += counted
    metrics = _summary(predictions, ks)
    if loss and n_tokens:
        metrics["loss"] = nll / n_tokens
    return EvalResult(metrics=metrics, predictions=predictions)


def _collated(questions: list[Question], processor: RagProcessor, loss: bool) -> dict[str, Any]:
    """Collate a batch; the labels of questions without answers do not count."""
    answered = [i for i, question in enumerate(questions) if question.answers]
    if loss and len(answered) == len(questions):
        return processor.collate(questions)
    batch = processor.collate([replace(question, answers=()) for question in questions])
    if loss and answered:
        known = processor.collate([questions[i] for i in answered])["labels"]
        labels = known.new_full((len(questions), known.shape[1]), IGNORE_INDEX)
        labels[answered] = known
        batch["labels"] = labels
    return batch


def _to_device(batch: Mapping[str, Any], model: RagModel) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _search(model: RagModel, batch: dict[str, Any], k: int) -> Tensor:
    """Return the rows of the k best passages of each question, `[B, k]`."""
    return model.retrieve(batch["input_ids"], batch["attention_mask"], k).rows


def _predictions(
    model: RagModel, questions: list[Question], generation: Any, rows: Tensor, judge: Judge
) -> list[Prediction]:
    texts = model.processor.decode(generation.sequences)
    predictions = []
    for i, (question, found) in enumerate(zip(questions, rows.tolist(), strict=True)):
        answers = question.answers
        text = texts[i]
        support = int(generation.supporting_rows[i])
        ranking = judge.ranking(question, found)
        hits = ranking.hits
        predictions.append(
            Prediction(
                id=question.id,
                question=question.question,
                answers=answers,
                prediction=text,
                log_prob=float(generation.scores[i]),
                n_tokens=int(generation.lengths[i]),
                passage_id=model.passages.ids[support] if support >= 0 else "",
                retrieved=ranking.retrieved,
                exact_match=exact_match(text, answers) if answers else math.nan,
                f1=f1(text, answers) if answers else math.nan,
                hit_rank=None if hits is None else (hits[0] if hits else -1),
            )
        )
    return predictions


def _summary(predictions: list[Prediction], ks: Sequence[int]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    judged = [each.hit_rank for each in predictions if each.hit_rank is not None]
    for k in ks:
        if judged:
            metrics[f"recall@{k}"] = sum(0 <= rank < k for rank in judged) / len(judged)
    answered = [each for each in predictions if each.answers]
    if answered:
        metrics["em"] = sum(each.exact_match for each in answered) / len(answered)
        metrics["f1"] = sum(each.f1 for each in answered) / len(answered)
    metrics["n_questions"] = float(len(predictions))
    return metrics
