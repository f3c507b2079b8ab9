"""A readers-writer lock that neither a signal nor a fork leaves held.

A signal handler may raise an exception after any call of Python code. A Python function that has
acquired a lock may therefore never return it, and a Python `__exit__` may never release it. So a
lock is held as long as a token lives. Only the stack of the `with` statement refers to the token,
and the interpreter drops it when the block ends, or if the block is never entered. Only C code runs
at that point.
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
    lock: threading.Lock  # released when the token dies; waiting threads acquire it for a moment
    token: weakref.ref[Any]


class ReadWriteLock:
    """A lock for many readers or one writer, granted in the order of the calls.

    Not re-entrant. A copy (also through `copy.deepcopy`) is a new, free lock. After a fork the lock
    is free in the child, where the threads that held it do not exist.

    Args:
        inconsistent: message of the error in a child that was forked while another thread was
            writing and may have left half a change; None if that does no harm.

    Attributes:
        broken: why the guarded data cannot be used any more, or None. Acquiring the lock then
            raises a RuntimeError with this message.
    """

    def __init__(self, inconsistent: str | None = None) -> None:
        self._inconsistent = inconsistent
        self.broken: str | None = None
        self._mutex = threading.Lock()
        self._queue: list[_Hold] = []
        _all.add(self)

    def read(self) -> AbstractContextManager[object]:
        """Wait for earlier writers and acquire the lock for reading, in a `with` statement.

        Raises:
            RuntimeError: the guarded data is `broken`.
        """
        return self._enter(exclusive=False)

    def write(self) -> AbstractContextManager[object]:
        """Wait for earlier readers and writers and acquire the lock for writing.

        Raises:
            RuntimeError: the guarded data is `broken`.
        """
        return self._enter(exclusive=True)

    def _enter(self, *, exclusive: bool) -> AbstractContextManager[object]:
        token, lock = threading.Lock(), threading.Lock()
        lock.acquire()
        # The weak reference passes itself as an argument, which `__exit__` ignores.
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
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def _free_in_child(self) -> None:
        if any(hold.exclusive for hold in self._alive()[:1]):
            self.broken = self.broken or self._inconsistent
        self._mutex, self._queue = threading.Lock(), []

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_whole()
        return (ReadWriteLock, (self._inconsistent,))


_all: weakref.WeakSet[ReadWriteLock] = weakref.WeakSet()


def _free_all_in_child() -> None:
    for lock in list(_all):
        lock._free_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all_in_child)
