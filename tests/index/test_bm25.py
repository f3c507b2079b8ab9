"""BM25Index against the formula, written out word by word."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch

from fastrag.data import Passage
from fastrag.index import BM25Index, PassageStore
from tests import tiny

TEXTS = ["red red green", "red blue a b c", "plum", "green green green blue a", "white", "white"]


def store(texts: list[str]) -> PassageStore:
    passages = [Passage(f"p{i}", "a title", text) for i, text in enumerate(texts)]
    return PassageStore.build(passages, tiny.processor())


def expected(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    documents = [re.findall(r"\w\w+", f"a title {text}") for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        counts, score = Counter(words), 0.0
        for word in query.lower().split():
            n = sum(word in each for each in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            f = counts[word]
            score += idf * f / (f + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.1, 0.0)])
def test_scores_are_those_of_the_formula(k1: float, b: float) -> None:
    index = BM25Index(store(TEXTS), k1=k1, b=b)
    for query in ("RED green", "blue red", "green green", "plum nobody"):
        right = torch.tensor(expected(TEXTS, query, k1, b))
        hits = index.search([query], k=len(TEXTS))
        found = hits.rows[0] >= 0
        assert found.sum() == (right > 0).sum()
        torch.testing.assert_close(hits.scores[0][found], right[hits.rows[0][found]])
        assert hits.scores[0][found].diff().le(1e-6).all()


def test_a_passage_without_a_word_of_the_query_is_no_hit() -> None:
    index = BM25Index(store(TEXTS))
    assert len(index) == 6
    scores, rows = index.search(["white", "nothing of it", "", "plum"], k=8)
    assert rows.tolist() == [[4, 5, *[-1] * 6], [-1] * 8, [-1] * 8, [2, *[-1] * 7]]
    assert torch.equal(scores.isneginf(), rows == -1)
    assert index.search([], k=2).rows.shape == (0, 2)
    # all contain `title`, most of them equally often in as many words: the first of equal ones
    wide = index.search(["title"], k=6)
    assert index.search(["title"], k=3).rows.tolist() == wide.rows[:, :3].tolist()
    assert wide.rows.tolist() == [[2, 4, 5, 1, 0, 3]]


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_a_model_trains_and_answers_on_its_hits(marginal: str) -> None:
    """Also on a question that shares no word with any passage."""
    model = tiny.rag_model(marginal=marginal)
    index = BM25Index(model.passages)
    batch = tiny.batch()
    hits = index.search(["ada", "bob", "zzz", "likes"], k=3)
    assert hits.rows[:2, 0].tolist() == [0, 1]
    output = model(**batch, rows=hits.rows)
    output.loss.backward()
    grads = [p.grad for p in model.question_encoder.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    answer = model.generate(**batch, rows=hits.rows, max_new_tokens=2)
    assert answer.scores.isfinite().all() and answer.supporting_rows[2] == -1


def test_bad_arguments() -> None:
    passages = store(TEXTS)
    with pytest.raises(ValueError, match="k1: expected a number >= 0, got -1"):
        BM25Index(passages, k1=-1)
    with pytest.raises(ValueError, match=r"b: expected a number in \[0, 1\], got 2"):
        BM25Index(passages, b=2)
    no_words = PassageStore.build([Passage("p", "", "...")], tiny.processor())
    with pytest.raises(ValueError, match="passages: expected words to search by, got none"):
        BM25Index(no_words)
    index = BM25Index(passages)
    with pytest.raises(ValueError, match="queries: expected a list of texts, got 'red'"):
        index.search("red", k=1)
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        index.search(["red"], k=0)
