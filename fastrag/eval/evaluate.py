"""Evaluation of a RAG model on questions: retrieval, answers, likelihood, calibration of the prior.

Retrieval is measured on the passages that the index returns for a question. Exact match, F1 and
cover-EM are measured on the answer of `RagModel.generate`, which decodes by the model's marginal,
RAG-Token or RAG-Sequence, searched greedily (Lewis et al. 2020, sec. 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.calibration import Calibration, calibrate
from fastrag.eval.metrics import bootstrap_interval, cover_match, exact_match, f1
from fastrag.eval.retrieval import Judge, PassageRetriever, Ranking, ranking_values
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
        cover_match: 1.0 if the generated answer contains an accepted one, else 0.0; NaN without
            accepted answers.
        prior: p(z|x) of the passages that the answer was generated from, best first; these are the
            first of those that were found, though `retrieved` may have fewer.
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
    cover_match: float
    prior: tuple[float, ...]

    @property
    def probability_per_token(self) -> float:
        """Geometric mean of the probabilities of the tokens, comparable between answers."""
        return math.exp(self.log_prob / self.n_tokens)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Metrics over all questions, and the answer to each.

    Attributes:
        metrics: the mean of each of `values`, `ece`, `n_questions`, and `loss` if requested.
        predictions: one per question, in the order of the questions.
        values: for each measure, its values for the questions that can be judged by it:
            `recall@k`, `em`, `f1`, `cover_em`, those of `ranking_values`, and `nll` if requested.
        weights: weights of the values of a measure in its mean: the label tokens of `nll`.
        calibration: comparison of p(z|x) with whether passage z is right; None if no question can
            be judged.
        marginal: name of the decoding that gave the answers, see `RagModel.generate`.
        n_docs: passages that each answer was generated from.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]
    values: dict[str, list[float]]
    weights: dict[str, list[float]]
    calibration: Calibration | None
    marginal: str
    n_docs: int

    @property
    def decoding(self) -> str:
        """The decoding and the passages of an answer in text, such as "RAG-Token, K = 5"."""
        return f"{decoding_name(self.marginal)}, K = {self.n_docs}"

    @property
    def summary(self) -> dict[str, float]:
        """The metrics that a training run logs: `recall@k`, `em`, `f1`, `n_questions`, `loss`."""
        return {
            name: value
            for name, value in self.metrics.items()
            if name.startswith("recall@") or name in ("em", "f1", "n_questions", "loss")
        }

    def interval(self, metric: str, seed: int = 0) -> tuple[float, float] | None:
        """Return the 95 % bootstrap interval of a metric over questions; None of `loss` and counts.

        Args:
            metric: a name of `metrics`.
            seed: seed of the resampling.
        """
        if metric == "ece" and self.calibration is not None:
            return self.calibration.interval(seed=seed)
        if metric not in self.values:
            return None
        weights = self.weights.get(metric)
        return bootstrap_interval(self.values[metric], seed=seed, weights=weights)


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
    retriever: PassageRetriever | None = None,
    loss: bool = False,
    progress: bool = True,
    description: str = "evaluate",
) -> EvalResult:
    """Answer questions and measure retrieval and answers.

    recall@k = share of questions with a right passage among the first k. If a question names its
    positive passages, these are right; otherwise a passage is right if it contains an accepted
    answer (Karpukhin et al. 2020). Questions without either do not count in recall, and questions
    without answers do not count in EM, F1, cover-EM and NLL.

    Args:
        model: the model; its training mode is restored afterwards.
        questions: the questions.
        batch_size: questions per batch.
        ks: one k of recall@k, or several.
        limit: evaluate only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        max_new_tokens: length limit of an answer.
        n_docs: passages per question for the answer, which may differ from those of training;
            None: as in the model.
        marginal: decoding of the answers, see `RagModel.generate`; None: as the model was trained.
        retriever: finds the passages in place of the model's, for example a `BM25Retriever`; the
            softmax of its scores is the prior. It must search the model's passages.
        loss: also compute `nll`, the negative log-likelihood per label token under the marginal of
            the decoding and the passages of the answer, and `loss`, the model's training loss.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        Metrics and predictions.

    Raises:
        ValueError: there is no question, one is malformed, batch_size, ks, limit or n_docs is not
            positive, there is no decoding of this name, or a retriever of other passages.

    Example:
        >>> result = evaluate(model, questions, ks=(1, 5))              # doctest: +SKIP
        >>> result.metrics["em"], result.interval("em")                 # doctest: +SKIP
        (0.425, (0.35, 0.5))
    """
    chosen, ks = check_evaluated(questions, batch_size, ks, limit)
    if n_docs is not None and n_docs < 1:
        raise ValueError(f"n_docs: expected an integer >= 1 or None, got {n_docs}")
    if retriever is not None and retriever.passages is not model.passages:
        raise ValueError("retriever: expected one of the model's passages, got one of others")
    from fastrag.eval.label_loss import LabelLoss
    from fastrag.nn.generators import evaluating

    n_docs = model.n_docs if n_docs is None else n_docs
    marginal = model.marginal if marginal is None else marginal
    label_loss = LabelLoss(model.loss_fn, marginal)
    answered = _Answered(model)
    total_loss = 0.0
    with (
        evaluating(model),
        torch.no_grad(),
        in_batches(chosen, batch_size, progress, description) as batches,
    ):
        for asked in batches:
            batch = _to_device(_collated(asked, model.processor, loss), model)
            # One search for recall, answer and loss: the best k are the first of a larger k.
            k = max(*ks, n_docs, model.n_docs)
            rows, doc_scores = _search(model, retriever, asked, batch, k)
            generation: Any = model.generate(
                **batch,
                marginal=marginal,
                max_new_tokens=max_new_tokens,
                rows=rows[:, :n_docs],
                doc_scores=None if doc_scores is None else doc_scores[:, :n_docs],
                loss_fn=label_loss,
                on_progress=batches.advance,
            )
            answered.add(asked, generation, rows[:, : max(ks)])
            if "labels" in batch:
                counted = batch["labels"].ne(IGNORE_INDEX).sum(dim=1)
                answered.add_nll(label_loss.nll, counted)
                batch_loss = generation.loss
                if n_docs != model.n_docs:  # the model's loss is that of its own number of passages
                    own = slice(0, model.n_docs)
                    scores = None if doc_scores is None else doc_scores[:, own]
                    batch_loss = model(**batch, rows=rows[:, own], doc_scores=scores).loss
                total_loss += float(batch_loss) * int(counted.sum())
    return answered.result(ks, total_loss, marginal, n_docs)


def decoding_name(marginal: str) -> str:
    """Return the name of a decoding in text.

    Example:
        >>> decoding_name("token")
        'RAG-Token'
        >>> decoding_name("sequence-thorough")
        'RAG-Sequence, thorough'
    """
    name, _, how = marginal.partition("-")
    return f"RAG-{name.capitalize()}" + (f", {how}" if how else "")


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


def _search(
    model: RagModel,
    retriever: PassageRetriever | None,
    questions: list[Question],
    batch: dict[str, Any],
    k: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of the k best passages `[B, k]`, and the scores of another retriever."""
    if retriever is None:
        return model.retrieve(batch["input_ids"], batch["attention_mask"], k).rows, None
    scores, rows = retriever(questions, k)
    device = batch["input_ids"].device
    return rows.to(device), scores.to(device)


class _Answered:
    """Collect answers and judgements of the questions that have been answered.

    Args:
        model: the model.
    """

    def __init__(self, model: RagModel) -> None:
        self.model = model
        self.judge = Judge(model.passages)
        self.predictions: list[Prediction] = []
        self.rankings: list[Ranking] = []
        self.right: list[list[bool] | None] = []  # of the passages that an answer was made from
        self.nll: list[float] = []
        self.n_tokens: list[float] = []

    def add(self, questions: list[Question], generation: Any, rows: Tensor) -> None:
        """Judge the answers of a batch and the passages `rows` that were found for it."""
        model = self.model
        texts = model.processor.decode(generation.sequences)
        priors = generation.doc_scores.float().softmax(dim=1).tolist()
        read_rows = generation.rows.tolist()
        for i, (question, found) in enumerate(zip(questions, rows.tolist(), strict=True)):
            answers = question.answers
            text = texts[i]
            support = int(generation.supporting_rows[i])
            ranking = self.judge.ranking(question, found)
            hits = ranking.hits
            prior = [p for p, row in zip(priors[i], read_rows[i], strict=True) if row >= 0]
            right = self.judge.ranking(question, read_rows[i]).hits
            self.rankings.append(ranking)
            self.right.append(None if right is None else [k in right for k in range(len(prior))])
            self.predictions.append(
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
                    cover_match=cover_match(text, answers) if answers else math.nan,
                    prior=tuple(prior),
                )
            )

    def add_nll(self, nll: Tensor | None, n_tokens: Tensor) -> None:
        """Add -log p(y|x) and the number of label tokens of a batch, `[B]` each."""
        if nll is None:
            raise RuntimeError("the decoder computed no loss of the labels")
        for value, n in zip(nll.tolist(), n_tokens.tolist(), strict=True):
            if n:
                self.nll.append(value / n)
                self.n_tokens.append(float(n))

    def result(
        self, ks: Sequence[int], total_loss: float, marginal: str, n_docs: int
    ) -> EvalResult:
        """Summarise; `total_loss` is the model's loss summed over label tokens."""
        values: dict[str, list[float]] = {}
        judged = [each.hit_rank for each in self.predictions if each.hit_rank is not None]
        if judged:
            for k in ks:
                values[f"recall@{k}"] = [float(0 <= rank < k) for rank in judged]
        answered = [each for each in self.predictions if each.answers]
        if answered:
            values["em"] = [each.exact_match for each in answered]
            values["f1"] = [each.f1 for each in answered]
            values["cover_em"] = [each.cover_match for each in answered]
        weights: dict[str, list[float]] = {}
        if self.nll:
            values["nll"], weights["nll"] = self.nll, self.n_tokens
        values |= ranking_values(self.rankings, ks, max(ks))
        metrics = {name: sum(each) / len(each) for name, each in values.items()}
        n_tokens = sum(self.n_tokens)
        if self.nll:
            pairs = zip(self.nll, self.n_tokens, strict=True)
            metrics["nll"] = sum(value * n for value, n in pairs) / n_tokens
            metrics["loss"] = total_loss / n_tokens
        cases = [
            (prediction.prior, right)
            for prediction, right in zip(self.predictions, self.right, strict=True)
            if right
        ]
        calibration = None
        if cases:
            calibration = calibrate([p for p, _ in cases], [right for _, right in cases])
            metrics["ece"] = calibration.ece
        metrics["n_questions"] = float(len(self.predictions))
        return EvalResult(metrics, self.predictions, values, weights, calibration, marginal, n_docs)
