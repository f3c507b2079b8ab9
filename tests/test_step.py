"""What a warm training step costs in Python: files of the package entered, and its calls."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest

import fastrag
from tests import tiny

ROOT = str(Path(fastrag.__file__).parent)

# Lower them with every call that goes; never raise them without a reason in the commit.
MOST_FILES = 27
MOST_CALLS = 220


def calls_of_a_step(kind: str) -> Counter[str]:
    """Count the Python calls of one warm forward and backward by file of the package.

    Backward runs in this thread on a CPU, so that the profile function sees it.
    """
    model, batch = tiny.rag_model(kind), tiny.batch(kind)
    for _ in range(3):
        model(**batch).loss.backward()
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, arg: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(ROOT):
            calls[file.removeprefix(ROOT)] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        model(**batch).loss.backward()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_a_step_is_few_calls_in_few_files(kind: str) -> None:
    calls = calls_of_a_step(kind)
    found = ", ".join(f"{n} {file}" for file, n in calls.most_common())
    assert calls.total() <= MOST_CALLS, f"{calls.total()} calls: {found}"
    assert len(calls) <= MOST_FILES, f"{len(calls)} files: {found}"
