"""A lock that many readers or one writer hold."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class ReadWriteLock:
    """Many readers or one writer; a waiting writer goes before new readers.

    Not re-entrant. A copy (also through `copy.deepcopy`) is a new, free lock.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._n_readers = 0
        self._n_waiting_writers = 0
        self._writing = False

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Holds the lock with other readers."""
        with self._condition:
            self._condition.wait_for(lambda: not (self._writing or self._n_waiting_writers))
            self._n_readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._n_readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Holds the lock alone."""
        with self._condition:
            self._n_waiting_writers += 1
            try:
                self._condition.wait_for(lambda: not (self._writing or self._n_readers))
                self._writing = True
            finally:
                self._n_waiting_writers -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ReadWriteLock, ())
