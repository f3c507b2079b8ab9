"""Exact match, F1, recall@k and the bootstrap against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from fastrag.eval import (
    bootstrap_interval,
    contains_answer,
    cover_match,
    exact_match,
    f1,
    normalize_answer,
    recall_at,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("an apple  a day", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("a", ""),
        ("Åland", "åland"),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_takes_the_best_answer() -> None:
    assert exact_match("the Nile.", ["Amazon", "Nile"]) == 1.0
    assert exact_match("Nile River", ["Amazon", "Nile"]) == 0.0
    assert exact_match("", ["Nile"]) == 0.0
    assert exact_match("the", ["a"]) == 1.0  # both normalise to nothing


def test_f1_by_hand() -> None:
    # 2 of 3 predicted words right, 2 of 4 gold words found: 2 (2/3)(1/2) / (2/3 + 1/2) = 4/7
    assert f1("blue green red", ["red blue white black"]) == pytest.approx(4 / 7)
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)  # a repeated word counts once
    assert f1("pink", ["red", "pink pink", "pink"]) == 1.0
    assert f1("pink", ["red"]) == 0.0
    assert f1("", ["red"]) == 0.0
    assert f1("the", ["a"]) == 1.0


def test_cover_match() -> None:
    assert cover_match("It was written by Julia Ward Howe, in 1861.", ["julia ward howe"]) == 1.0
    assert cover_match("Howe", ["Julia Ward Howe"]) == 0.0
    assert cover_match("I think it is the U.S.A.", ["USA", "France"]) == 1.0
    assert cover_match("north", ["no"]) == 1.0  # characters, as in the published figures
    assert cover_match("anything", ["the"]) == cover_match("", ["Nile"]) == 0.0
    assert cover_match("a", ["the"]) == 1.0  # as exact match: both are empty


@pytest.mark.parametrize("metric", [exact_match, f1, cover_match])
def test_answers_are_checked(metric: object) -> None:
    with pytest.raises(ValueError, match="answers: expected at least one"):
        metric("x", [])
    with pytest.raises(ValueError, match="answers: expected at least one"):
        metric("x", "")


@pytest.mark.parametrize("metric", [exact_match, f1, contains_answer])
def test_one_answer_is_a_list_of_one(metric: object) -> None:
    for text in ("Nile", "N"):
        assert metric("Nile", text) == metric("Nile", [text]) == (text == "Nile")


def test_recall_at() -> None:
    retrieved = [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    positives = [["b"], ["x", "f"], []]
    assert recall_at(retrieved, positives, 1) == 0.0
    assert recall_at(retrieved, positives, 2) == pytest.approx(1 / 3)
    assert recall_at(retrieved, positives, 3) == pytest.approx(2 / 3)
    assert recall_at([], [], 5) == 0.0
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        recall_at(retrieved, positives, 0)
    with pytest.raises(ValueError, match="got 3 and 1"):
        recall_at(retrieved, [["a"]], 1)


def test_contains_answer_matches_whole_words() -> None:
    assert contains_answer("The capital is Addis Ababa.", ["addis ababa"])
    assert not contains_answer("The capital is Addisababa", ["Addis Ababa"])
    assert contains_answer("about 3.5 million", ["3.5"])
    assert not contains_answer("about 13.5 million", ["3.5"])
    assert contains_answer("Sa\u0303o Paulo", ["S\u00e3o Paulo"])  # composed and decomposed
    assert not contains_answer("anything", ["", "  "])


def test_bootstrap_interval() -> None:
    values = [1.0] * 60 + [0.0] * 40
    low, high = bootstrap_interval(values, n=4000, seed=1)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)  # the normal approximation
    assert low == pytest.approx(0.6 - half, abs=0.02)
    assert high == pytest.approx(0.6 + half, abs=0.02)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    # a value with weight 3 is three questions of weight 1 that are drawn together
    assert bootstrap_interval([0.2, 0.8], weights=[1.0, 1.0]) == bootstrap_interval([0.2, 0.8])
    low, high = bootstrap_interval([0.0, 1.0], weights=[1.0, 3.0], level=0.4)
    assert (low, high) == (0.75, 0.75)
    spread = bootstrap_interval([1.0, 3.0], statistic=lambda drawn: float(drawn.max()))
    assert spread == (1.0, 3.0)
    with pytest.raises(ValueError, match="weights: expected 2 numbers, of which one is above 0"):
        bootstrap_interval([1.0, 2.0], weights=[0.0, 0.0])
    with pytest.raises(ValueError, match="values: expected a non-empty list"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="level: expected"):
        bootstrap_interval([1.0], level=1.0)
    with pytest.raises(ValueError, match="n: expected"):
        bootstrap_interval([1.0], n=0)
