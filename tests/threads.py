"""Work in other threads that ends with the test, also when the test fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def repeated(work: Callable[[], Any], threads: int = 1) -> Iterator[None]:
    """Call `work` again and again in `threads` threads, and raise the first of their errors."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            work()

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(loop) for _ in range(threads)]
        try:
            yield
        finally:
            stop.set()
        for each in running:
            each.result()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition, and fail if it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.002)
