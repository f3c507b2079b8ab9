"""Evaluation of retrieval without a generator: recall@k, MRR and nDCG@10 of a ranking.

Relevance is binary, and judged in two ways, which are reported separately:

    gold     a passage is right if the question names its id        (questions that name passages)
    answer   a passage is right if it contains an accepted answer   (questions with answers)

The ideal ranking of nDCG has all passages that the question names for `gold`, and only the right
ones among those retrieved for `answer`, because the whole corpus is not searched for answers. MRR
only considers the retrieved passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.eval.metrics import has_words, ndcg_at, reciprocal_rank, words_of

if TYPE_CHECKING:
    from fastrag.data import Question
    from fastrag.data.tokenization import QuestionBatch
    from fastrag.index import PassageStore
    from fastrag.nn.retriever import Retriever

NDCG_K = 10
# Anserini's defaults, which most reports of BM25 use.
BM25_K1, BM25_B = 0.9, 0.4


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
    """

    id: str
    question: str
    retrieved: tuple[str, ...]
    gold_hits: tuple[int, ...] | None
    n_gold: int
    answer_hits: tuple[int, ...] | None

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
        named = set(question.positive_ids)
        if named:
            gold = tuple(place for place, id in enumerate(ids) if id in named)
        if question.answers:
            wanted = [words_of(answer) for answer in question.answers]
            contains = [has_words(self._words_of(row), wanted) for row in found]
            answers = tuple(place for place, right in enumerate(contains) if right)
        return Ranking(question.id, question.question, ids, gold, len(named), answers)

    def _words_of(self, row: int) -> str:
        if row not in self._words:
            text = f"{self.passages.title(row)} {self.passages.text(row)}"
            self._words[row] = words_of(text)
        return self._words[row]


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

    def __call__(self, questions: Sequence[Question], k: int) -> Tensor:
        """Return the rows of the k nearest passages of each question, `[B, k]`, -1 if missing."""
        device = next(self.retriever.parameters()).device
        batch = {name: ids.to(device) for name, ids in self.question_batch(questions).items()}
        return self.retriever.search(**batch, k=k).rows


class BM25Retriever:
    """Retrieve by BM25 over title and text, without stop words and stemming (package `bm25s`).

    Args:
        passages: the passages.

    Raises:
        ImportError: bm25s is not installed.
    """

    def __init__(self, passages: PassageStore) -> None:
        import bm25s

        self.passages = passages
        self._tokenize = bm25s.tokenize
        texts = [f"{passages.title(row)} {passages.text(row)}" for row in range(len(passages))]
        self._bm25 = bm25s.BM25(k1=BM25_K1, b=BM25_B)
        self._bm25.index(self._words(texts), show_progress=False)
        self._n_passages = len(texts)

    def __call__(self, questions: Sequence[Question], k: int) -> Tensor:
        """Return the rows of the k best passages of each question, `[B, k]`, -1 if missing."""
        k_found = min(k, self._n_passages)
        words = self._words([question.question for question in questions])
        rows = self._bm25.retrieve(words, k=k_found, return_as="documents", show_progress=False)
        found = torch.from_numpy(rows.astype("int64"))
        return nn.functional.pad(found, (0, k - k_found), value=-1)

    def _words(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords=None, show_progress=False)


def evaluate_retrieval(
    retriever: DenseRetriever | BM25Retriever,
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
        retriever: returns the rows of the k best passages for a batch of questions.
        questions: the questions; those with neither answers nor named passages are not judged.
        ks: one k of recall@k, or several.
        batch_size: questions per batch.
        limit: evaluate only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        progress: show a progress bar.
        description: label of the progress bar.

    Returns:
        `gold-recall@k`, `gold-mrr@n` and `gold-ndcg@10`, and the same with `answer-`; n is the
        number of retrieved passages, the largest of 10 and `ks`.

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
            found += retriever(batch, depth).tolist()
    rows = dict(zip(order, found, strict=True))
    rankings = [judge.ranking(question, rows[i]) for i, question in enumerate(chosen)]
    return RetrievalResult(_values(rankings, sorted(set(ks)), depth), rankings)


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


def _values(rankings: Sequence[Ranking], ks: Sequence[int], depth: int) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    gold = [(each.gold_hits, each.n_gold) for each in rankings if each.gold_hits is not None]
    by_answer = [each.answer_hits for each in rankings if each.answer_hits is not None]
    judged = {"gold": gold, "answer": [(hits, len(hits)) for hits in by_answer]}
    for kind, pairs in judged.items():
        if not pairs:
            continue
        for k in ks:
            values[f"{kind}-recall@{k}"] = [float(any(p < k for p in hits)) for hits, _ in pairs]
        values[f"{kind}-mrr@{depth}"] = [reciprocal_rank(hits) for hits, _ in pairs]
        values[f"{kind}-ndcg@{NDCG_K}"] = [ndcg_at(hits, n, NDCG_K) for hits, n in pairs]
    return values
