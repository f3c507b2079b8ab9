from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastrag.ops import backends, checks, late_errors, vocab_major

# Bytes, and rows below which a chunk is not worth its dW: everything in one chunk; a few positions
# a chunk; one position a chunk (a Sequence example that does not fit: slices of the vocabulary);
# and slices of the vocabulary, of several token ids and of one.
WORKSPACES = {
    "whole": ("", 1),
    "some": ("2000", 1),
    "one": ("1", 1),
    "some token ids": ("2000", 10**6),
    "one word": ("1", 10**6),
}


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """An op must write every number it returns."""


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs what runs on a GPU, where no value may be looked at: other walks, NaN, a late error."""
    monkeypatch.setattr(checks, "readable", lambda x: False)
    late_errors.forget()
    yield
    late_errors.forget()


@pytest.fixture
def blind(late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as long as no finding has reached the host: NaN, and no error for it yet."""
    monkeypatch.setattr(late_errors, "raise_late", lambda device: None)


@pytest.fixture(params=WORKSPACES.values(), ids=WORKSPACES.keys())
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each size of workspace."""
    size, least_rows = request.param
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", size)
    monkeypatch.setattr(vocab_major, "LEAST_ROWS", {"cpu": least_rows})
    return size


@pytest.fixture(params=["cpp", "torch"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each backend of the losses that a CPU has."""
    if reason := backends.why_not(request.param):
        pytest.skip(reason)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, request.param)
    return request.param
