"""Passages that questions name, in batches: forced, excluded, and together with the answer."""

from __future__ import annotations

import pytest

from fastrag.data import Question, RagCollator
from fastrag.data.readers import to_question
from tests.tiny import processor, store

QUESTIONS = [
    Question("a", "ada", ("red",), ("p0", "p3"), ("p1",), source_ids=("p0",)),
    Question("b", "bob", ("blue",), (), ("p2",)),
]


def test_rows_of_the_passages_that_questions_name():
    collator = RagCollator(processor(), passages=store(), force=True, exclude_source=True)
    batch = collator(QUESTIONS)
    assert batch["positive_rows"].tolist() == [[0, 3], [-1, -1]]
    assert batch["include_rows"].tolist() == [[0, 3, 1], [2, -1, -1]]
    assert batch["exclude_rows"].tolist() == [[0], [-1]]
    assert not {"positive_rows", "exclude_rows"} & collator(QUESTIONS[1:]).keys()
    assert not {"include_rows", "exclude_rows"} & RagCollator(processor())(QUESTIONS).keys()


def test_answer_and_question_for_a_posterior_encoder():
    made = processor()
    batch = made.collate(QUESTIONS, posterior=True)
    texts = [made.question_tokenizer.decode(ids) for ids in batch["posterior_ids"]]
    assert texts == ["[CLS] red ada [SEP]", "[CLS] blue bob [SEP]"]
    assert batch["posterior_mask"].tolist() == [[1] * 4] * 2


def test_records_name_their_sources():
    record = {"question": "ada", "source_id": "p0", "source": "a book"}
    question = to_question(record)
    assert question.source_ids == ("p0",) and question.meta == {"source": "a book"}


def test_rejects():
    with pytest.raises(ValueError, match="passages: expected a PassageStore with force, got None"):
        RagCollator(processor(), force=True)
    collator = RagCollator(processor(), passages=store(), force=True)
    with pytest.raises(ValueError, match="question 'x': positive_ids: id: expected the id of one"):
        collator([Question("x", "ada", ("red",), ("p99",))])
