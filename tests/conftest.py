"""What all tests share: a fixed seed, poisoned memory, and what is done without a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is loaded. Each core has a process, and a test of threads sets their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing is downloaded: a model that is neither a folder nor in the cache is refused at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is decorated, so it must stand before the first import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills memory that nobody wrote with NaN (floats) or the largest value (integers)."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
