"""Read and write weights without the progress bars of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Switch transformers' progress bars off within the block, also as a decorator.

    One bar for each part of a model tells little and interrupts the output of the caller.
    """
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
