from __future__ import annotations

import operator
from importlib import resources

import pytest

from fastrag.data import Question, default_dataset
from fastrag.data import default as default_module
from fastrag.data.default import load_passages


@pytest.fixture(scope="module")
def dataset():
    return default_dataset()


def test_splits_and_labels(dataset):
    assert set(dataset.questions) == {
        "train",
        "dev",
        "test",
        "dev_unseen_wording",
        "test_unseen_wording",
    }
    ids = {passage.id for passage in dataset.passages}
    assert len(ids) == len(dataset.passages) > 1000
    for split, questions in dataset.questions.items():
        assert questions, split
        for question in questions:
            assert question.answers and question.positive in ids
            assert question.meta["split"] == split
            assert question.meta["field"] and question.meta["wording"] is not None


def test_gold_passages_hold_an_answer(dataset):
    by_id = {passage.id: passage for passage in dataset.passages}
    for question in dataset.questions["dev"]:
        gold = by_id[question.positive]
        text = f"{gold.title} {gold.text}"
        assert any(answer in text for answer in question.answers), question


def test_an_unknown_split_is_refused(monkeypatch):
    monkeypatch.setattr(
        default_module,
        "read_questions",
        lambda path: [Question("q", "?", ("a",), meta={"split": "other"})],
    )
    with pytest.raises(ValueError, match="question 'q': expected a split of .* got 'other'"):
        default_dataset()


def test_missing_package_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"passages.jsonl.xz: no such file or directory"):
        default_dataset()


def test_a_file_of_passages_is_read_when_it_is_iterated(tmp_path):
    """The hint is the number of lines; whether ids occur twice, the store finds out."""
    path = tmp_path / "p.tsv"
    path.write_text("id\ttext\n1\ta\n1\tb\n")
    passages = load_passages(str(path))
    assert [each.text for each in passages] == [each.text for each in passages] == ["a", "b"]
    assert operator.length_hint(passages) == 3
    packed = load_passages(f"{path}.gz")
    assert operator.length_hint(packed) == 0
    with pytest.raises(ValueError, match="p.tsv.gz: no such file"):
        next(iter(packed))
