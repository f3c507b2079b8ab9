from __future__ import annotations

import pytest

from fastrag.ops import backends, checks

# Bytes: everything in one chunk; a few positions a chunk; one position a chunk (and a Sequence
# example cut in pieces, hence recomputed).
WORKSPACES = {"whole": "", "some": "2000", "one": "1"}


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """An op must write every number it returns."""


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what runs on a GPU, where no value may be looked at: other walks, NaN for ValueError."""
    monkeypatch.setattr(checks, "readable", lambda x: False)


@pytest.fixture(params=WORKSPACES.values(), ids=WORKSPACES.keys())
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with each size of workspace."""
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", request.param)
    return request.param


@pytest.fixture(params=["cpp", "torch"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on each backend of the losses that a CPU has."""
    if reason := backends.why_not(request.param):
        pytest.skip(reason)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, request.param)
    return request.param
