"""Evaluation of a RAG model on questions: recall@k, exact match, F1 and, if asked, the loss.

Recall looks at the passages that the index returns for a question; exact match and F1 look at the
answer of highest probability under RAG-Sequence's fast decoding (Lewis et al. 2020, sec. 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.data.readers import to_question
from fastrag.eval.metrics import contains_answer, exact_match, f1
from fastrag.messages import shown
from fastrag.ops.checks import whole
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.data import Question, RagCollator
    from fastrag.nn import RagModel


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one question, with the passage that it came from.

    Attributes:
        id: the question's id.
        question: the question.
        answers: the accepted answers; empty when none are known.
        prediction: the answer found.
        log_prob: log of the answer's marginal probability over the K passages.
        n_tokens: tokens that the answer took, its end included.
        passage_id: the passage with the largest share in the answer; empty when none was found.
        retrieved: ids of the retrieved passages, best first.
        exact_match: 1.0 or 0.0; NaN without accepted answers.
        f1: word overlap with the best answer; NaN without accepted answers.
        hit_rank: place of the first right passage in `retrieved`, from 0; -1 when none is right,
            None when neither positives nor answers say what is right.
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
        """Geometric mean of the probabilities of the answer's tokens, comparable across lengths."""
        return math.exp(self.log_prob / self.n_tokens)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics over all questions, and what was answered to each.

    Attributes:
        metrics: `recall@k` for each k, `em`, `f1`, `n_questions`, and `loss` where asked for.
        predictions: one per question, in the order of the questions.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    model: RagModel,
    questions: Sequence[Question | Mapping[str, Any]],
    collator: RagCollator,
    *,
    batch_size: int = 16,
    ks: int | Sequence[int] = (1, 5),
    limit: int | None = None,
    max_new_tokens: int = 32,
    n_docs: int | None = None,
    loss: bool = False,
    progress: bool = True,
    description: str = "evaluate",
) -> EvalResult:
    """Answer questions and measure retrieval and answers.

    recall@k = share of questions with a right passage among the first k. A question that names its
    positive passages is judged by them; one that does not counts a passage as right when it
    contains an accepted answer (Karpukhin et al. 2020). Questions without either are left out of
    recall; questions without answers are left out of EM and F1.

    Args:
        model: the model; its training mode is restored afterwards.
        questions: the questions.
        collator: makes batches from questions, as in training.
        batch_size: questions per batch.
        ks: the k of recall@k, or one.
        limit: look at `choose_fixed(questions, limit)` only.
        max_new_tokens: longest answer.
        n_docs: passages per question for the answer; None takes the model's.
        loss: compute the marginal NLL per label token as well.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        Metrics and predictions.

    Raises:
        ValueError: there is no question, one is malformed, batch_size, ks, limit or n_docs is not
            positive, or the model has no generator_tokenizer.

    Example:
        >>> result = evaluate(model, questions, collator, ks=(1, 5))    # doctest: +SKIP
        >>> result.metrics["recall@5"], result.metrics["em"]             # doctest: +SKIP
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size}")
    if n_docs is not None and n_docs < 1:
        raise ValueError(f"n_docs: expected an integer >= 1 or None, got {n_docs}")
    ks = tuple(whole("ks", k) for k in ([ks] if isinstance(ks, int) else ks))
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected one or more integers >= 1, got {shown(ks)}")
    from fastrag.nn.generators import evaluating

    # one reading of a record for the batch and for the metrics
    chosen = [
        to_question(question, f"questions[{i}]", default_id=str(i))
        for i, question in enumerate(choose_fixed(questions, limit))
    ]
    if not chosen:
        raise ValueError("questions: expected at least one question, got none")
    if model.generator_tokenizer is None:
        raise ValueError("model: expected one with a generator_tokenizer to read answers, got None")
    n_docs = model.n_docs if n_docs is None else n_docs
    predictions: list[Prediction] = []
    nll, n_tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for rows in _batches(chosen, batch_size, progress, description):
            # a batch has labels of all its questions or of none
            answered = [i for i, question in enumerate(rows) if question.answers]
            mixed = 0 < len(answered) < len(rows)
            asked = [replace(question, answers=()) for question in rows] if mixed else rows
            batch = _to_device(collator(asked), model)
            # one search serves recall, answer and loss: the best k are the first of the best k + 1
            found = _search(model, batch, max(*ks, n_docs, model.n_docs))
            predictions += _answer(model, rows, batch, found, max(ks), n_docs, max_new_tokens)
            if loss and mixed:
                batch = _to_device(collator([rows[i] for i in answered]), model)
                found = found[answered]
            if loss and "labels" in batch:
                counted = int(batch["labels"].ne(IGNORE_INDEX).sum())
                nll += float(model(**batch, rows=found[:, : model.n_docs]).loss) * counted
                n_tokens += counted
    metrics = _summary(predictions, ks)
    if loss and n_tokens:
        metrics["loss"] = nll / n_tokens
    return EvalResult(metrics=metrics, predictions=predictions)


def choose_fixed(questions: Sequence[Any], limit: int | None) -> list[Any]:
    """Choose the same questions at every call: all of them, or a spread sample in file order.

    Args:
        questions: the questions.
        limit: how many to take; None takes all.

    Returns:
        A list of at most `limit` questions, evenly spread, so that a file sorted by topic gives
        every topic its share.

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


def _batches(
    questions: list[Question], batch_size: int, progress: bool, description: str
) -> Iterator[list[Question]]:
    from tqdm.auto import tqdm

    with tqdm(
        total=len(questions), desc=description, unit="q", disable=not progress, leave=False
    ) as bar:
        for start in range(0, len(questions), batch_size):
            rows = questions[start : start + batch_size]
            yield rows
            bar.update(len(rows))


def _to_device(batch: Mapping[str, Any], model: RagModel) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _search(model: RagModel, batch: dict[str, Any], k: int) -> Tensor:
    """Rows of the k best passages of each question, `[B, k]`."""
    return model.retrieve(batch["input_ids"], batch["attention_mask"], k).rows


def _answer(
    model: RagModel,
    questions: list[Question],
    batch: dict[str, Any],
    rows: Tensor,
    n_judged: int,
    n_docs: int,
    max_new_tokens: int,
) -> list[Prediction]:
    tokenizer: Any = model.generator_tokenizer
    generation: Any = model.generate(
        batch["input_ids"],
        batch["attention_mask"],
        batch["prompt_ids"],
        batch["prompt_mask"],
        max_new_tokens=max_new_tokens,
        rows=rows[:, :n_docs],
    )
    texts = tokenizer.batch_decode(generation.sequences, skip_special_tokens=True)
    passages = model.passages
    predictions = []
    judged = rows[:, :n_judged].tolist()
    for i, (question, found) in enumerate(zip(questions, judged, strict=True)):
        answers = question.answers
        text = texts[i].strip()
        support = int(generation.supporting_rows[i])
        found = [row for row in found if row >= 0]
        predictions.append(
            Prediction(
                id=question.id,
                question=question.question,
                answers=answers,
                prediction=text,
                log_prob=float(generation.scores[i]),
                n_tokens=int(generation.lengths[i]),
                passage_id=passages.ids[support] if support >= 0 else "",
                retrieved=tuple(passages.ids[row] for row in found),
                exact_match=exact_match(text, answers) if answers else math.nan,
                f1=f1(text, answers) if answers else math.nan,
                hit_rank=_hit_rank(passages, found, question.positive_ids, answers),
            )
        )
    return predictions


def _hit_rank(
    passages: Any, rows: list[int], positives: tuple[str, ...], answers: tuple[str, ...]
) -> int | None:
    """Position of the first right passage; -1 for none, None when nothing says what is right."""
    is_right: Callable[[int], bool]
    if positives:
        wanted = set(positives)
        is_right = lambda row: passages.ids[row] in wanted  # noqa: E731
    elif answers:
        is_right = lambda row: contains_answer(  # noqa: E731
            f"{passages.title(row)} {passages.text(row)}", answers
        )
    else:
        return None
    return next((rank for rank, row in enumerate(rows) if is_right(row)), -1)


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
