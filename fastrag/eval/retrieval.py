"""Evaluation of retrieval without a generator: recall@k, MRR and nDCG@10 of a ranking.

Passages are judged in two ways, which are reported separately:

    gold     a passage is right if the question names its id        (questions that name passages)
    answer   a passage is right if it contains an accepted answer   (questions with answers)

The ideal ranking of nDCG has all passages that the question names for `gold`, and only the right
ones among those retrieved for `answer`, because the whole corpus is not searched for answers. MRR
only considers the retrieved passages. If a data set grades its passages (BEIR), the gains of nDCG
are the grades, and every named passage is right in all other measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.metrics import has_words, ndcg_at, reciprocal_rank, words_of

if TYPE_CHECKING:
    from fastrag.data import Question
    from fastrag.data.tokenization import QuestionBatch
    from fastrag.index import Hits, PassageStore
    from fastrag.nn.retriever import Retriever

NDCG_K = 10


@dataclass(frozen=True, slots=True)
class Ranking:
    """The passages that were retrieved for one question, and the places of the right ones.

    Attributes:
        id: the question's id.
        question: the question.
        retrieved: ids of the retrieved passages, best first.
        gold_hits: places in `retrieved`, from 0, of the passages that the question names; None if
            it names none.
        n_gold: number of passages that the question names.
        answer_hits: places of the passages that contain an accepted answer; None without answers.
        grades: grades of the passages at `gold_hits`, and then those of all others that the
            question names; empty: all are 1.
    """

    id: str
    question: str
    retrieved: tuple[str, ...]
    gold_hits: tuple[int, ...] | None
    n_gold: int
    answer_hits: tuple[int, ...] | None
    grades: tuple[int, ...] = ()

    @property
    def hits(self) -> tuple[int, ...] | None:
        """Places of right passages, as in `evaluate`: by id if any are named, else by answer."""
        return self.answer_hits if self.gold_hits is None else self.gold_hits


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Measures of retrieval over all questions.

    Attributes:
        values: for each measure, its values for the questions that can be judged by it.
        rankings: one per question, in the order of the questions.
    """

    values: dict[str, list[float]]
    rankings: list[Ranking]

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each measure, such as `gold-recall@5`, and `n_questions`."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        return means | {"n_questions": float(len(self.rankings))}


class Judge:
    """Decide which passages are right. The words of a passage are extracted only once.

    Args:
        passages: the passages.
    """

    def __init__(self, passages: PassageStore) -> None:
        self.passages = passages
        self._words: dict[int, str] = {}

    def ranking(self, question: Question, rows: Sequence[int]) -> Ranking:
        """Judge the passages `rows`, best first; -1 is missing."""
        found = [row for row in rows if row >= 0]
        ids = tuple(self.passages.ids[row] for row in found)
        gold = answers = None
        named = dict.fromkeys(question.positive_ids, 1)
        named.update(zip(question.positive_ids, question.relevance, strict=False))
        grades: tuple[int, ...] = ()
        if named:
            gold = tuple(place for place, id in enumerate(ids) if id in named)
        if gold is not None and question.relevance:
            hits = [ids[place] for place in gold]
            others = [id for id in named if id not in hits]
            grades = tuple(named[id] for id in (*hits, *others))
        if question.answers:
            wanted = [words_of(answer) for answer in question.answers]
            contains = [has_words(self._words_of(row), wanted) for row in found]
            answers = tuple(place for place, right in enumerate(contains) if right)
        return Ranking(question.id, question.question, ids, gold, len(named), answers, grades)

    def _words_of(self, row: int) -> str:
        if row not in self._words:
            text = f"{self.passages.title(row)} {self.passages.text(row)}"
            self._words[row] = words_of(text)
        return self._words[row]


class PassageRetriever(Protocol):
    """Finds passages for questions: `DenseRetriever`, `BM25Retriever`, or one of your own."""

    @property
    def passages(self) -> PassageStore:
        """Passages that are searched."""

    def __call__(self, questions: Sequence[Question], k: int) -> Hits:
        """Return the k best passages of each question, `[B, k]`, row -1 if missing."""


class DenseRetriever:
    """Retrieve with a question encoder and an index, without a generator.

    Args:
        retriever: encoder, index and passages.
        question_batch: tokenises questions for the encoder; `RagProcessor.question_batch`.
    """

    def __init__(self, retriever: Retriever, question_batch: QuestionBatch) -> None:
        self.retriever = retriever
        self.question_batch = question_batch

    @property
    def passages(self) -> PassageStore:
        """Passages that are searched."""
        return self.retriever.passages

    def __call__(self, questions: Sequence[Question], k: int) -> Hits:
        """Return the k nearest passages of each question; see `Retriever.search`."""
        device = next(self.retriever.parameters()).device
        batch = {name: ids.to(device) for name, ids in self.question_batch(questions).items()}
        return self.retriever.search(**batch, k=k)


class BM25Retriever:
    """Retrieve with a `BM25Index` (package `bm25s`).

    Args:
        passages: the passages.
        settings: arguments of `BM25Index`.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: as `BM25Index`.
    """

    def __init__(self, passages: PassageStore, **settings: Any) -> None:
        from fastrag.index import BM25Index

        self.index = BM25Index(passages, **settings)

    @property
    def passages(self) -> PassageStore:
        """Passages that are searched."""
        return self.index.passages

    def __call__(self, questions: Sequence[Question], k: int) -> Hits:
        """Return the k best passages of each question; see `BM25Index.search`."""
        return self.index.search([question.question for question in questions], k)


def evaluate_retrieval(
    retriever: PassageRetriever,
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    ks: int | Sequence[int] = (1, 5, 20),
    batch_size: int = 64,
    limit: int | None = None,
    progress: bool = True,
    description: str = "retrieve",
) -> RetrievalResult:
    """Measure a ranking of passages, without generating answers.

    Args:
        retriever: finds the k best passages of a batch of questions.
        questions: the questions; those with neither answers nor named passages are not judged.
        ks: one k of recall@k, or several.
        batch_size: questions per batch.
        limit: evaluate only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        The measures of `ranking_values`; the number of retrieved passages is the largest of 10 and
        `ks`.

    Raises:
        ValueError: there is no question, one is malformed, or batch_size, ks or limit is not
            positive.

    Example:
        >>> result = evaluate_retrieval(BM25Retriever(passages), questions)  # doctest: +SKIP
        >>> result.metrics["answer-recall@5"]                                # doctest: +SKIP
        0.925
    """
    chosen, ks = check_evaluated(questions, batch_size, ks, limit)
    depth = max(NDCG_K, *ks)
    judge = Judge(retriever.passages)
    # Questions of similar length share a batch, because padding costs as much as text.
    order = sorted(range(len(chosen)), key=lambda i: len(chosen[i].question))
    found: list[list[int]] = []
    with in_batches([chosen[i] for i in order], batch_size, progress, description) as batches:
        for batch in batches:
            found += retriever(batch, depth).rows.tolist()
    rows = dict(zip(order, found, strict=True))
    rankings = [judge.ranking(question, rows[i]) for i, question in enumerate(chosen)]
    return RetrievalResult(ranking_values(rankings, ks, depth), rankings)


def recall(rankings: Sequence[Ranking], ks: Sequence[int]) -> dict[str, float]:
    """Return `recall@k` for each k, judged as in `evaluate`, and `n_questions`.

    Args:
        rankings: one per question; those that cannot be judged do not count in recall.
        ks: the values of k.
    """
    judged = [each.hits for each in rankings if each.hits is not None]
    metrics = {
        f"recall@{k}": sum(any(place < k for place in hits) for hits in judged) / len(judged)
        for k in ks
        if judged
    }
    return metrics | {"n_questions": float(len(rankings))}


def ranking_values(
    rankings: Sequence[Ranking], ks: Sequence[int], depth: int
) -> dict[str, list[float]]:
    """Return the measures of each ranking that can be judged by them.

        recall@k     1 if a passage among the first k is right, else 0
        coverage@k   share of the passages that the question names among the first k
        mrr@n        1 / place of the first right passage
        ndcg@10      see `fastrag.eval.metrics`

    Args:
        rankings: one per question.
        ks: the values of k.
        depth: number n of passages that were retrieved.

    Returns:
        Values by name, such as `gold-recall@5` and `answer-recall@5`. Coverage is only of `gold`,
        and only if a question names several passages; otherwise it is recall. nDCG is `ndcg@n` if
        n is below 10.
    """
    values: dict[str, list[float]] = {}
    cut = min(NDCG_K, depth)
    for kind in ("gold", "answer"):
        judged = [each for each in rankings if getattr(each, f"{kind}_hits") is not None]
        if not judged:
            continue
        hits = [getattr(each, f"{kind}_hits") for each in judged]
        for k in sorted(set(ks)):
            values[f"{kind}-recall@{k}"] = [float(any(p < k for p in places)) for places in hits]
        if kind == "gold" and any(each.n_gold > 1 for each in judged):
            for k in sorted(set(ks)):
                values[f"{kind}-coverage@{k}"] = [
                    sum(place < k for place in places) / each.n_gold
                    for each, places in zip(judged, hits, strict=True)
                ]
        values[f"{kind}-mrr@{depth}"] = [reciprocal_rank(places) for places in hits]
        grades = [
            (each.grades or (1,) * each.n_gold) if kind == "gold" else (1,) * len(places)
            for each, places in zip(judged, hits, strict=True)
        ]
        values[f"{kind}-ndcg@{cut}"] = [
            _ndcg(places, right, cut) for places, right in zip(hits, grades, strict=True)
        ]
    return values


def _ndcg(places: Sequence[int], right: Sequence[int], k: int) -> float:
    """Return nDCG@k of right passages at `places`, whose grades are the first of `right`."""
    ranked = [0] * k
    for place, grade in zip(places, right, strict=False):
        if place < k:
            ranked[place] = grade
    return ndcg_at(ranked, right, k)
