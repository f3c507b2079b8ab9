"""How many cases a fuzz test tries: some in the quick half of the tests, many in the heavy one."""

from __future__ import annotations

from typing import Any

import pytest


def effort(quick: int, slow: int) -> list[Any]:
    """Return the parameters of a fuzz test; hypothesis derives the cases from the test's name."""
    return [
        pytest.param(quick, id="quick"),
        pytest.param(slow, id="thorough", marks=pytest.mark.slow),
    ]
