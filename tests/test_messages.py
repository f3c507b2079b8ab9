"""Values in messages: short, on one line, and never walked to their end."""

from __future__ import annotations

import ast
import errno
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.messages import LIMIT, clipped, refusal, shown

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(VALUES)
def test_it_is_the_repr_as_far_as_it_goes(value: Any) -> None:
    text, whole = shown(value), repr(value)
    assert len(text) <= LIMIT and "\n" not in text
    if "integer of about" not in text:
        assert text == whole if len(whole) <= LIMIT else whole.startswith(text[: LIMIT - 3])


def bomb(levels: int) -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def test_what_has_no_end_is_cut() -> None:
    endless: list[Any] = []
    endless.append(endless)
    circle: dict[str, Any] = {}
    circle["in"] = circle
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, circle, bomb(50), deep, "x" * 10**7, {"k": bomb(50)}):
        assert len(shown(value)) == LIMIT and shown(value).endswith("...")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**400, "an integer of about 401 digits"),
        (-(10**5000), "a negative integer of about 5001 digits"),
        (10**20, "1" + "0" * 20),
        (torch.zeros(2, 3), "Tensor [2, 3] float32"),
        (torch.tensor(3), "Tensor [] int64"),
        (torch.empty(2, device="meta"), "Tensor [2] float32"),
        (np.zeros(4), "ndarray [4] float64"),
        (np.int64(3), repr(np.int64(3))),
        ((1,), "(1,)"),
        (torch.nn.Sequential(torch.nn.ReLU()), "Sequential( (0): ReLU() )"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_values_of_a_kind(value: Any, text: str) -> None:
    assert shown(value) == text


def test_an_object_that_cannot_print_itself() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert shown([Broken(), 1]) == "[<Broken>, 1]"
    nested = torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])
    assert shown(nested).startswith("nested_tensor([ tensor([0.])")


def test_names_are_cut_and_on_one_line() -> None:
    assert clipped("a\nb  c") == "a b c"
    assert len(clipped("key" * 1000)) == LIMIT


def test_the_system_is_quoted_without_a_number() -> None:
    error = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a.yaml")
    assert refusal(error) == "a.yaml: no such file or directory"
    assert refusal(error, "b") == "b: no such file or directory"
    assert refusal(OSError("Not a gzipped file")) == "Not a gzipped file"
    assert ast.literal_eval(shown("\ud800")) == "\ud800"
