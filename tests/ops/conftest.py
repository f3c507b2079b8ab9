from __future__ import annotations

import pytest

from fastrag.ops import checks


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """An op must write every number it returns."""


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what runs on a GPU, where no value may be looked at: other walks, NaN for ValueError."""
    monkeypatch.setattr(checks, "readable", lambda x: False)
