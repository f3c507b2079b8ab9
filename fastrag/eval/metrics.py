"""Exact match, F1, recall@k, MRR and nDCG as in the literature on open-domain question answering.

    EM = max_a [normalize(prediction) = normalize(a)]         (Rajpurkar et al. 2016, sec. 6.1)
    F1 = max_a 2 P R / (P + R) over bags of normalised words              (ibid.)
    cover-EM = max_a [normalize(a) is part of normalize(prediction)]
                                         (Rosset et al. 2020; Mallen et al. 2023, accuracy)
    recall@k = share of questions with a right passage in the k best
                                                              (Karpukhin et al. 2020, sec. 5.1)
    RR = 1 / place of the first right passage, 0 without one; its mean is MRR
    nDCG@k = DCG / the DCG of all right passages in the first places, best grade first,
        DCG = sum over the k best of grade / log2(place + 1); the grade of a right passage is 1
        unless the data set grades it            (Järvelin & Kekäläinen 2002; trec_eval's form)

All functions take plain strings and sequences; none needs a model or a tensor.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastrag.messages import shown

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORDS = re.compile(r"\w+|[^\w\s]")


def normalize_answer(text: str) -> str:
    """Normalise an answer as SQuAD does before it compares answers.

    The text is converted to lower case; ASCII punctuation, the articles a, an, the and extra spaces
    are removed (Rajpurkar et al. 2016, the official evaluation script).

    Args:
        text: the answer as written.

    Returns:
        The normalised text; may be empty.

    Example:
        >>> normalize_answer("The  Eiffel-Tower!")
        'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if a prediction equals any of the answers after `normalize_answer`, else 0.0.

    Args:
        prediction: the predicted text.
        answers: one accepted answer, or a sequence of them.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: answers is empty.

    Example:
        >>> exact_match("the Nile", ["Nile", "Nile River"])
        1.0
    """
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(answer) for answer in _checked(answers)))


def cover_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction contains any of the answers after `normalize_answer`, else 0.0.

    A generator that answers in a sentence fails exact match with a right answer, but not this one.
    It compares characters, not words: the answer `no` is found in `north`.

    Args:
        prediction: the predicted text.
        answers: one or more accepted answers; a single text is one answer. An answer that is empty
            after normalisation only matches an empty prediction.

    Returns:
        1.0 or 0.0; at least `exact_match`.

    Raises:
        ValueError: answers is empty.

    Example:
        >>> cover_match("It is the Nile.", ["Nile"]), exact_match("It is the Nile.", ["Nile"])
        (1.0, 0.0)
    """
    predicted = normalize_answer(prediction)
    wanted = [normalize_answer(answer) for answer in _checked(answers)]
    return float(any(answer in predicted if answer else not predicted for answer in wanted))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the word overlap of a prediction with the best of the answers.

    F1 = 2 P R / (P + R) over bags of normalised words; it is 1 for two empty texts.

    Args:
        prediction: the predicted text.
        answers: one accepted answer, or a sequence of them.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: answers is empty.

    Example:
        >>> round(f1("Nile River Delta", ["River Nile"]), 3)
        0.8
    """
    predicted = normalize_answer(prediction).split()
    return max(_bag_f1(predicted, normalize_answer(answer).split()) for answer in _checked(answers))


def recall_at(
    retrieved: Sequence[Sequence[str]], positives: Sequence[Sequence[str]], k: int
) -> float:
    """Return the share of questions with at least one positive passage among the first k.

    Args:
        retrieved: for each question, passage ids from best to worst.
        positives: for each question, the ids of the right passages.
        k: number of retrieved ids that count, at least 1.

    Returns:
        A number in [0, 1]; 0.0 if there is no question.

    Raises:
        ValueError: k < 1, or the two sequences differ in length.

    Example:
        >>> recall_at([["p3", "p1"], ["p2", "p9"]], [["p1"], ["p7"]], k=2)
        0.5
    """
    if k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {shown(k)}")
    if len(retrieved) != len(positives):
        raise ValueError(
            "retrieved and positives: expected one entry per question in both, got "
            f"{len(retrieved)} and {len(positives)}"
        )
    if not retrieved:
        return 0.0
    hits = [
        not set(right).isdisjoint(found[:k])
        for found, right in zip(retrieved, positives, strict=True)
    ]
    return sum(hits) / len(hits)


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether a passage contains one of the answers as a sequence of whole words.

    The comparison ignores case and uses the Unicode decomposition, as the DPR evaluation does for
    questions that name no positive passage (Karpukhin et al. 2020).

    Args:
        text: title and text of the passage.
        answers: one accepted answer, or a sequence of them; an answer without words never matches.

    Returns:
        True if one of the answers occurs.

    Example:
        >>> contains_answer("Paris is the capital.", ["paris"])
        True
        >>> contains_answer("Parisian cafes", ["Paris"])
        False
    """
    return has_words(words_of(text), [words_of(answer) for answer in _listed(answers)])


def words_of(text: str) -> str:
    """Return the words of a text for `has_words`, in lower case and decomposed."""
    return "\0".join(_WORDS.findall(unicodedata.normalize("NFD", text).lower()))


def has_words(words: str, wanted: Sequence[str]) -> bool:
    """Return whether `words` contains one of `wanted` as a sequence; all come from `words_of`."""
    return any(each and f"\0{each}\0" in f"\0{words}\0" for each in wanted)


def reciprocal_rank(hits: Sequence[int]) -> float:
    """Return 1 / place of the first right passage (counted from 1), or 0.0 if there is none.

    Args:
        hits: places of the right passages in the ranking, counted from 0, ascending.

    Example:
        >>> reciprocal_rank([1, 4]), reciprocal_rank([])
        (0.5, 0.0)
    """
    return 1.0 / (hits[0] + 1) if hits else 0.0


def ndcg_at(ranked: Sequence[float], right: Sequence[float], k: int) -> float:
    """Return the normalised discounted cumulative gain of a ranking.

    Args:
        ranked: grade of each ranked passage, best first; 0 if it is not right.
        right: grades of all right passages, in any order.
        k: number of ranked passages considered, at least 1.

    Returns:
        A number in [0, 1]; 0.0 if nothing is right.

    Raises:
        ValueError: k < 1.

    Example:
        >>> ndcg_at([1, 0], [1], k=10), ndcg_at([0, 0, 1], [1], k=10)
        (1.0, 0.5)
    """
    if k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {shown(k)}")
    ideal = _gain(sorted(right, reverse=True)[:k])
    return _gain(ranked[:k]) / ideal if ideal else 0.0


def bootstrap_interval(
    values: Sequence[float] | np.ndarray[Any, Any],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    *,
    weights: Sequence[float] | None = None,
    statistic: Callable[[np.ndarray[Any, Any]], float] | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean (Efron & Tibshirani 1993, ch. 13).

    Args:
        values: one value per question, for example the exact matches.
        n: number of resamples, at least 1.
        seed: seed of the resampling, so that a report can be repeated.
        level: share of the resampled means inside the interval, in (0, 1).
        weights: weight of each value in the mean, for example the tokens of an answer.
        statistic: figure of a sample in place of the mean. It gets the values of the drawn
            questions, which may then have any shape `[n_questions, ...]`.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: values is empty, weights are of another length or none is positive, n < 1, or
            level outside (0, 1).

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or (data.ndim != 1 and statistic is None):
        raise ValueError(f"values: expected a non-empty list of numbers, got shape {data.shape}")
    if n < 1:
        raise ValueError(f"n: expected an integer >= 1, got {shown(n)}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number in (0, 1), got {shown(level)}")
    figure: Callable[[np.ndarray[Any, Any]], Any] = statistic or np.mean
    if weights is not None:
        share = np.asarray(weights, dtype=np.float64)
        if share.shape != data.shape or not (share > 0).any():
            raise ValueError(
                f"weights: expected {data.size} numbers, of which one is above 0, got "
                f"{shown(weights)}"
            )
        data = np.stack([data * share, share], axis=1)
        figure = _ratio
    rng = np.random.default_rng(seed)
    found = [figure(data[rng.integers(0, len(data), len(data))]) for _ in range(n)]
    # a resample whose weights are all zero has no mean
    quantile = np.quantile if weights is None else np.nanquantile
    low, high = quantile(found, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _bag_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2.0 * precision * recall / (precision + recall)


def _gain(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(place + 2) for place, grade in enumerate(grades))


def _ratio(sums: np.ndarray[Any, Any]) -> float:
    """Return the quotient of the sums of two columns; NaN where the second is zero."""
    above, below = sums.sum(axis=0)
    return float(above / below) if below else math.nan


def _listed(answers: Sequence[str]) -> Sequence[str]:
    return [answers] if isinstance(answers, str) else answers


def _checked(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise ValueError("answers: expected at least one accepted answer, got none")
    return _listed(answers)
