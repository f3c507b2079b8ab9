from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """An op must write every number it returns."""


@pytest.fixture
def plain_torch(_poisoned: None) -> None:
    """Torch as users run it: poisoning takes its deterministic mode, whose kernels are others.

    What waits, what a graph can hold and what repeats to the bit is that of the usual ones.
    """
    torch.use_deterministic_algorithms(False)
