"""A lock that many readers or one writer hold; no signal and no fork leaves it held.

A signal handler may raise after any call of Python code, so a Python function that has taken a lock
cannot be sure to hand it on, nor a Python `__exit__` to release it. A hold therefore lasts as long
as a token lives, which nothing but the stack of the `with` statement refers to; the interpreter
drops it wherever the block ends, or where the block was never reached. All that runs then is C.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any, NamedTuple


class _Hold(NamedTuple):
    exclusive: bool
    lock: threading.Lock  # released when the token dies; those who wait take it for a moment
    token: weakref.ref[Any]


class ReadWriteLock:
    """Many readers or one writer, in the order in which they came.

    Not re-entrant. A copy (also through `copy.deepcopy`) is a new, free lock. After a fork the lock
    of the child is free: the threads that held it exist in the parent alone.

    Args:
        cut_short: what to say in the child of a fork that came while another thread wrote, where
            that leaves half a change behind; None if it does no harm.

    Attributes:
        torn: what is wrong with that which the lock guards, if somebody found out; None: nothing.
    """

    def __init__(self, cut_short: str | None = None) -> None:
        self._cut_short = cut_short
        self.torn: str | None = None
        self._mutex = threading.Lock()
        self._queue: list[_Hold] = []
        _all.add(self)

    def read(self) -> AbstractContextManager[object]:
        """Waits for earlier writers, and returns what holds the lock, for a `with` statement.

        Raises:
            RuntimeError: it is torn.
        """
        return self._enter(exclusive=False)

    def write(self) -> AbstractContextManager[object]:
        """Waits for all who came earlier, and returns what holds the lock, for a `with` statement.

        Raises:
            RuntimeError: it is torn.
        """
        return self._enter(exclusive=True)

    def _enter(self, *, exclusive: bool) -> AbstractContextManager[object]:
        token, lock = threading.Lock(), threading.Lock()
        lock.acquire()
        # Called with the reference, as `__exit__` is called with an exception.
        release = functools.partial(lock.__exit__, None, None)
        try:
            with self._mutex:
                earlier = self._alive()
                self._queue = [*earlier, _Hold(exclusive, lock, weakref.ref(token, release))]
            for hold in earlier:
                if exclusive or hold.exclusive:
                    with hold.lock:
                        pass
            self._check_whole()
            return token
        except BaseException:
            del token  # which the traceback would keep alive
            raise

    def _alive(self) -> list[_Hold]:
        return [hold for hold in self._queue if hold.token() is not None]

    def _check_whole(self) -> None:
        if self.torn is not None:
            raise RuntimeError(self.torn)

    def _free_in_child(self) -> None:
        if any(hold.exclusive for hold in self._alive()[:1]):
            self.torn = self.torn or self._cut_short
        self._mutex, self._queue = threading.Lock(), []

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_whole()
        return (ReadWriteLock, (self._cut_short,))


_all: weakref.WeakSet[ReadWriteLock] = weakref.WeakSet()


def _free_all_in_child() -> None:
    for lock in list(_all):
        lock._free_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all_in_child)
