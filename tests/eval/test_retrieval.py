"""evaluate_retrieval: recall, MRR and nDCG of rankings, by named passage and by answer; BM25."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastrag.data import Question
from fastrag.eval import BM25Retriever, DenseRetriever, evaluate, evaluate_retrieval
from fastrag.eval.metrics import ndcg_at, reciprocal_rank
from fastrag.eval.retrieval import recall
from fastrag.index import Hits
from tests import tiny


class Fixed:
    """Retrieves given rows by a question's id."""

    def __init__(self, rows: dict[str, list[int]]) -> None:
        self.passages = tiny.store()
        self.rows = rows
        self.asked: list[int] = []

    def __call__(self, questions: list[Question], k: int) -> Hits:
        self.asked.append(len(questions))
        rows = torch.tensor([self.rows[question.id][:k] for question in questions])
        return Hits(torch.zeros(rows.shape).masked_fill(rows < 0, -torch.inf), rows, None, 0)


def test_measures_of_a_known_ranking() -> None:
    """Row i is the passage p{i}, which says what person i likes."""
    questions = [
        Question("a", "ada", ("red",), ("p0",)),  # found at place 0
        Question("b", "bob", ("blue",), ("p1", "p5")),  # at places 2 and 1; the answer at 2
        Question("c", "cleo", ("purple",), ("p9",)),  # not found
        Question("d", "dan", ("pink", "red")),  # names none: answers at places 0 and 3
        Question("e", "eve"),  # not judged
    ]
    rows = {"a": [0, 1, 2, 3], "b": [7, 5, 1, 2], "c": [1, 2, 3, 4], "d": [3, 5, 6, 0]}
    rows["e"] = [4, -1, -1, -1]
    retriever = Fixed(rows)
    result = evaluate_retrieval(retriever, questions, ks=(1, 2), batch_size=2, progress=False)
    assert retriever.asked == [2, 2, 1]
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    fourth = 1 / math.log2(5)
    expected = {
        "gold-recall@1": [1.0, 0.0, 0.0],
        "gold-recall@2": [1.0, 1.0, 0.0],
        "gold-coverage@1": [1.0, 0.0, 0.0],
        "gold-coverage@2": [1.0, 0.5, 0.0],
        "gold-mrr@10": [1.0, 0.5, 0.0],
        "gold-ndcg@10": [1.0, (second + third) / (1 + second), 0.0],
        "answer-recall@1": [1.0, 0.0, 0.0, 1.0],
        "answer-recall@2": [1.0, 0.0, 0.0, 1.0],
        "answer-mrr@10": [1.0, 1 / 3, 0.0, 1.0],
        "answer-ndcg@10": [1.0, third, 0.0, (1 + fourth) / (1 + second)],
    }
    assert result.values.keys() == expected.keys()
    for name, values in expected.items():
        assert result.values[name] == pytest.approx(values), name
        assert result.metrics[name] == pytest.approx(sum(values) / len(values))
    assert result.metrics["n_questions"] == 5.0
    assert result.rankings[4].retrieved == ("p4",) and result.rankings[4].hits is None
    # as `evaluate` judges: by name where passages are named, else by answer
    assert recall(result.rankings, (1, 2)) == {
        "recall@1": 0.5,
        "recall@2": 0.75,
        "n_questions": 5.0,
    }


def test_dense_recall_is_that_of_evaluate() -> None:
    model = tiny.rag_model()
    answered = evaluate(model, tiny.questions(), ks=(1, 3), max_new_tokens=1)
    retriever = DenseRetriever(model.retriever, model.processor.question_batch)
    found = evaluate_retrieval(retriever, tiny.questions(), ks=(1, 3), progress=False)
    for k in (1, 3):
        assert found.metrics[f"gold-recall@{k}"] == answered.metrics[f"recall@{k}"]
    pairs = zip(found.rankings, answered.predictions, strict=True)
    assert all(a.retrieved[:3] == b.retrieved for a, b in pairs)


def test_bm25_finds_the_passage_that_names_the_word() -> None:
    result = evaluate_retrieval(BM25Retriever(tiny.store(n=6)), tiny.questions(6), progress=False)
    assert result.metrics["gold-recall@1"] == result.metrics["answer-recall@1"] == 1.0
    assert all(len(each.retrieved) == 1 for each in result.rankings)  # no other has the word


def test_measures_at_their_ends() -> None:
    assert reciprocal_rank([]) == 0.0
    assert ndcg_at([], [1], k=5) == ndcg_at([0, 0], [], k=5) == ndcg_at([0, 1], [1], k=1) == 0.0
    assert ndcg_at([1, 1, 1], [1, 1, 1], k=2) == ndcg_at([3, 2], [2, 3], k=5) == 1.0
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        ndcg_at([0], [1], k=0)


@pytest.mark.parametrize("graded", [False, True], ids=["binary", "graded"])
def test_measures_are_those_of_trec_eval(graded: bool) -> None:
    """On random rankings, through ir-measures: Success, R, RR and nDCG."""
    ir_measures = pytest.importorskip("ir_measures")
    rng = random.Random(graded)
    questions, rows, qrels, run = [], {}, {}, {}
    for i in range(40):
        named = rng.sample(range(12), rng.randint(1, 4))
        ids = tuple(f"p{row}" for row in named)
        grades = tuple(rng.randint(1, 3) for _ in named) if graded else ()
        questions.append(Question(f"q{i}", "ada", (), ids, relevance=grades))
        rows[f"q{i}"] = rng.sample(range(12), 10)
        qrels[f"q{i}"] = dict(zip(ids, grades or [1] * len(ids), strict=True))
        run[f"q{i}"] = {f"p{row}": float(-place) for place, row in enumerate(rows[f"q{i}"])}
    found = evaluate_retrieval(Fixed(rows), questions, ks=(1, 3, 5), progress=False)
    names = {
        "gold-recall@3": "Success@3",
        "gold-coverage@5": "R@5",
        "gold-mrr@10": "RR",
        "gold-ndcg@10": "nDCG@10",
    }
    for ours, theirs in names.items():
        measure = ir_measures.parse_measure(theirs)
        expected = {
            each.query_id: each.value for each in ir_measures.iter_calc([measure], qrels, run)
        }
        values = [expected[question.id] for question in questions]
        assert found.values[ours] == pytest.approx(values, abs=1e-12), ours


def test_refuses_what_evaluate_refuses() -> None:
    retriever = Fixed({})
    with pytest.raises(ValueError, match="questions: expected at least one question, got none"):
        evaluate_retrieval(retriever, [])
    with pytest.raises(ValueError, match="ks: expected one or more integers >= 1"):
        evaluate_retrieval(retriever, tiny.questions(1), ks=(0,))
