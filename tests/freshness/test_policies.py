"""Refresh policies: how a setting is read, and what is chosen when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.freshness import RefreshPolicy, View
from fastrag.freshness.kinds import Rolling
from fastrag.freshness.ledger import RowLedger


def view(step: int, ledger: RowLedger, **known: Any) -> View:
    return View(step, ledger, torch.empty(0, dtype=torch.int64), **known)


@pytest.mark.parametrize(
    ("text", "due"), [("frozen", []), ("every:1", [1, 2, 3, 4, 5, 6]), ("every:3", [3, 6])]
)
def test_policies(text: str, due: list[int]) -> None:
    policy, ledger = RefreshPolicy.parse(text), RowLedger(4)
    chosen = {}
    for step in range(7):
        chosen[step] = policy.choose(view(step, ledger))
        if chosen[step] == "all":
            ledger.wrote(None, step)
    assert [step for step, rows in chosen.items() if rows is not None] == due
    assert {chosen[step] for step in due} <= {"all"}
    assert policy.changes_index == bool(due)
    assert str(policy) == text
    assert RefreshPolicy.parse(str(policy)) == policy == RefreshPolicy.parse(policy)
    assert hash(policy) == hash(RefreshPolicy.parse(text))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    n=st.integers(1, 40), r=st.integers(1, 45), start=st.integers(0, 30), seed=st.integers(0, 9999)
)
def test_rolling_keeps_the_age_bound(n: int, r: int, start: int, seed: int) -> None:
    """At most r rows, none older than ceil(N / r), whatever is written back or removed."""
    draws = torch.Generator().manual_seed(seed)
    some = lambda m: torch.rand(m, generator=draws)  # noqa: E731
    policy, ledger = Rolling(r), RowLedger(n)
    removed = some(n) < 0.2 * float(some(1) < 0.5)
    live = ~removed
    n_live = int(live.sum())
    bound = -(-n_live // r)
    for step in range(start + 1, start + 2 + 3 * bound):  # after `start` steps without refresh
        found = (some(5) * n).long()
        ledger.retrieved(found)
        ledger.measured(found.unique(), some(len(found.unique())), step)
        ledger.wrote(found[: int(some(1) * 6)], step - 1)
        if step > start + bound and n_live:
            assert int(ledger.ages(step)[live].max()) <= bound
        rows = policy.choose(view(step, ledger, removed=removed if removed.any() else None))
        if rows is None:
            assert not n_live
            continue
        assert isinstance(rows, torch.Tensor) and len(rows) == len(rows.unique())
        assert len(rows) == min(r, n_live) and live[rows].all()
        ledger.wrote(rows, step)


def test_rolling_prefers_rows_that_are_retrieved_and_drift() -> None:
    """Slots that no row needs for its age go to the row whose staleness costs most."""
    ledger = RowLedger(10)  # four slots for three steps, of which ten rows need ten
    ledger.wrote(torch.arange(6), 1)
    ledger.retrieved(torch.tensor([2, 2, 5, 5, 4]))
    ledger.measured(torch.tensor([2, 4, 5]), torch.tensor([0.1, 0.1, 0.3]), 2)
    rows = Rolling(4).choose(view(2, ledger))
    assert isinstance(rows, torch.Tensor) and rows.tolist() == [2, 5, 6, 7]
    untouched = RowLedger(12)
    order = []
    for step in range(1, 5):
        rows = Rolling(3).choose(view(step, untouched))
        assert isinstance(rows, torch.Tensor)
        order += rows.tolist()
        untouched.wrote(rows, step)
    assert order == list(range(12))  # without retrievals in the order of the rows


def test_drift_waits_for_an_estimate() -> None:
    policy, ledger = RefreshPolicy.parse("drift:0.02"), RowLedger(3)
    chosen = [policy.choose(view(1, ledger, drift=drift)) for drift in (None, 0.02, 0.021)]
    assert chosen == [None, None, "all"]


def test_a_sum_and_a_schedule() -> None:
    policy = RefreshPolicy.parse(" 2-4:rolling:1+every:3,6- : drift:1e-2 ")
    assert str(policy) == "2-4:rolling:1+every:3, 6-:drift:0.01"
    assert [str(policy.at(step)) for step in (0, 2, 3, 4, 6, 10**6)] == [
        "frozen",
        *["rolling:1+every:3"] * 2,
        "frozen",
        *["drift:0.01"] * 2,
    ]
    both, ledger = policy.at(2), RowLedger(5)
    assert torch.equal(both.choose(view(2, ledger)), torch.tensor([0]))  # type: ignore[arg-type]
    assert both.choose(view(3, ledger)) == "all"
    assert not both.writes_back and both.samples == 4 and policy.changes_index
    assert RefreshPolicy.parse("rolling:1+write-back").writes_back
    state = policy.state_dict()
    policy.load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict: expected a state of each of 2-4:"):
        policy.load_state_dict({"0": {}})


@pytest.mark.parametrize(
    ("text", "written", "fit"),
    [
        ("map", "map", ("affine", None)),
        ("map:8", "map:8", ("affine", 8)),
        ("map:orthogonal", "map:orthogonal", ("orthogonal", None)),
        ("map:orthogonal:32", "map:orthogonal:32", ("orthogonal", 32)),
        ("rolling:2+map:orthogonal:8", "rolling:2+map:orthogonal:8", ("orthogonal", 8)),
    ],
)
def test_the_settings_of_a_map(text: str, written: str, fit: tuple[str, int]) -> None:
    policy = RefreshPolicy.parse(text)
    assert str(policy) == written and policy.map == fit
    assert RefreshPolicy.parse(written) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-9:hourly", r"expected one of 'frozen', .*, got 'hourly' at position 4 of '0-9:hourly'"),
        ("0-9:every:2, 9-:map+every:0", r"got 'every:0' at position 20 of"),
        ("0-9:every:2, every:3", r"expected a range of steps.*got ' every:3' at position 12 of"),
        ("0-9:every:2, 8-:map", r"expected a start at or after step 9, got 8-:map at position 12"),
        ("0-:every:2, 8-:map", r"expected a start at or after the end, got 8-:map at position 11"),
        ("9-9:map", r"expected an end after step 9, got 9-9:map at position 0"),
        ("rolling:3+rolling:4", r"two or more policies of different kinds.*got rolling:3\+roll"),
        ("5-:map+frozen", r"two or more policies of different kinds.* at position 3 of"),
        ("rolling:2+", r"expected one of .*, got '' at position 10 of 'rolling:2\+'"),
        ("drift:0", r"expected one of .*'drift:x'.*, got 'drift:0'"),
        ("drift:2.0", r"got 'drift:2.0'"),
        ("map:round", r"got 'map:round'"),
        ("map:0", r"got 'map:0'"),
        ("rolling:" + "9" * 5000, r"got 'rolling:9999"),
    ],
)
def test_faults_are_named_with_their_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^refresh: .*{message}"):
        RefreshPolicy.parse(text)


@pytest.mark.parametrize(
    "text", ["", "never", "every", "every:", "every:0", "every:-1", "every:1.5", "every: 2",
             "frozen:1", "frozen:", "hourly:5", "Every:2", 5, None]
)  # fmt: skip
def test_unknown_policies_list_the_words(text: Any) -> None:
    with pytest.raises(ValueError, match=r"refresh: expected one of 'frozen', 'every:n'.*, got"):
        RefreshPolicy.parse(text)


@given(st.text(alphabet="0123456789-:+, .aeflnopvyrz") | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        policy = RefreshPolicy.parse(text)
    except ValueError as error:
        assert str(error).startswith("refresh: expected one of ")
    else:
        assert RefreshPolicy.parse(str(policy)) == policy


def test_every_needs_a_step() -> None:
    assert RefreshPolicy.parse("every:2") != RefreshPolicy.parse("frozen")
    with pytest.raises(ValueError, match="n: expected at least 1 step, got 0"):
        type(RefreshPolicy.parse("every:2"))(0)  # type: ignore[call-arg]
