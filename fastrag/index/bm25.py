"""BM25Index: passages searched by the words that they share with a question (package `bm25s`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastrag.index.base import Hits
from fastrag.messages import shown
from fastrag.ops import checks

if TYPE_CHECKING:
    from fastrag.index.passages import PassageStore

# Anserini's defaults, with which BM25 is most often reported.
BM25_K1, BM25_B = 0.9, 0.4


class BM25Index:
    """Search passages by BM25 over title and text, without stop words and stemming.

        score(q, d) = sum over the words t of q of
            log(1 + (N - n_t + .5) / (n_t + .5)) f_td / (f_td + k1 (1 - b + b |d| / mean |d|))

    with N passages, n_t of which contain t, and f_td occurrences of t among the |d| words of d
    (Robertson & Zaragoza 2009, in the form of Lucene). Words of one letter do not count. It takes
    texts where an `Index` takes vectors, and returns the same `Hits`, whose rows are those of the
    passages. They can stand in for the hits of an encoder that has learned nothing yet: see
    `RagModel.forward`, `rows`.

    Args:
        passages: the passages.
        k1: saturation of repeated words, >= 0.
        b: influence of a passage's length, in [0, 1].

    Raises:
        ImportError: bm25s is not installed.
        ValueError: a number out of range, or passages without any word.

    Example:
        >>> bm25 = BM25Index(model.passages)                             # doctest: +SKIP
        >>> hits = bm25.search(["who discovered radium?"], k=5)          # doctest: +SKIP
        >>> model(**batch, rows=hits.rows).loss                          # doctest: +SKIP
    """

    def __init__(self, passages: PassageStore, *, k1: float = BM25_K1, b: float = BM25_B) -> None:
        import bm25s

        if not k1 >= 0.0:
            raise ValueError(f"k1: expected a number >= 0, got {shown(k1)}")
        if not 0.0 <= b <= 1.0:
            raise ValueError(f"b: expected a number in [0, 1], got {shown(b)}")
        self.passages = passages
        self.k1 = k1
        self.b = b
        self._tokenize = bm25s.tokenize
        words = self._words([f"{passages.title(i)} {passages.text(i)}" for i in range(len(self))])
        if not words.vocab or not any(words.ids):
            raise ValueError("passages: expected words to search by, got none")
        self._bm25 = bm25s.BM25(k1=k1, b=b)
        self._bm25.index(words, show_progress=False)

    def __len__(self) -> int:
        """Number of rows, one for each passage."""
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """Find the k passages of the highest score.

        Args:
            queries: B texts.
            k: how many rows, at least 1.

        Returns:
            `Hits` `[B, k]` on the CPU, without vectors. A passage without a word of the query is no
            hit. Equal scores are in the order of the rows.

        Raises:
            ValueError: no list of texts, or k below 1.
        """
        if isinstance(queries, str) or not all(isinstance(query, str) for query in queries):
            raise ValueError(f"queries: expected a list of texts, got {shown(queries)}")
        if checks.whole("k", k) < 1:
            raise ValueError(f"k: expected an integer >= 1, got {shown(k)}")
        scores = torch.full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1)
        for i, words in enumerate(self._words(list(queries), return_ids=False)):
            if not words:
                continue
            found = self._bm25.get_scores(words)  # [N]
            best = torch.from_numpy(_best(found, k))
            rows[i, : len(best)] = best
            scores[i, : len(best)] = torch.from_numpy(found)[best]
        return Hits(scores, rows, None, 0)

    def _words(self, texts: list[str], **how: Any) -> Any:
        return self._tokenize(texts, stopwords=None, show_progress=False, **how)


def _best(scores: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """Return the places of the k largest scores above 0; of equal ones the first."""
    found = np.flatnonzero(scores > 0)
    if len(found) > k:
        least = np.partition(scores[found], -k)[-k]
        found = found[scores[found] >= least]
    order = np.argsort(-scores[found], kind="stable")[:k]
    return found[order].astype(np.int64)
