"""Refresh policies: how a setting is read, and what is chosen when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrag.freshness import RefreshPolicy

NOTHING: Any = None


@pytest.mark.parametrize(
    ("text", "due"), [("frozen", []), ("every:1", [1, 2, 3, 4, 5, 6]), ("every:3", [3, 6])]
)
def test_policies(text: str, due: list[int]) -> None:
    policy = RefreshPolicy.parse(text)
    chosen = {step: policy.choose(step, NOTHING, NOTHING, NOTHING) for step in range(7)}
    assert [step for step, rows in chosen.items() if rows is not None] == due
    assert {chosen[step] for step in due} <= {"all"}
    assert policy.changes_index == bool(due)
    assert str(policy) == text
    assert RefreshPolicy.parse(str(policy)) == policy == RefreshPolicy.parse(policy)
    assert hash(policy) == hash(RefreshPolicy.parse(text))


@pytest.mark.parametrize(
    "text", ["", "never", "every", "every:", "every:0", "every:-1", "every:1.5", "every: 2",
             "frozen:1", "frozen:", "hourly:5", "Every:2", 5, None]
)  # fmt: skip
def test_unknown_policies_list_the_words(text: Any) -> None:
    with pytest.raises(ValueError, match=r"refresh: expected one of 'frozen', 'every:n'.*, got"):
        RefreshPolicy.parse(text)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        policy = RefreshPolicy.parse(text)
    except ValueError as error:
        assert str(error).startswith("refresh: expected one of ")
    else:
        assert str(policy) == text.strip()


def test_every_needs_a_step() -> None:
    assert RefreshPolicy.parse("every:2") != RefreshPolicy.parse("frozen")
    with pytest.raises(ValueError, match="n: expected at least 1 step, got 0"):
        type(RefreshPolicy.parse("every:2"))(0)  # type: ignore[call-arg]
