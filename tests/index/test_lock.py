"""Locks of an index: who waits for whom, and what a signal, an exception or a fork leaves held."""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from fastrag import FaissIndex, FlatIndex
from fastrag.index import codec, codes, faiss_index, faiss_support, flat, lock, rows
from fastrag.index.lock import ReadWriteLock

SIGNAL = signal.SIGUSR1


class Interrupted(Exception):
    """Raised by a signal handler."""


# Sets a flag, as the operating system's signal does, and runs no bytecode that would look at it. As
# a trace function: C passes over the frame, the event and its argument.
_trip_with = ctypes.PYFUNCTYPE(None, ctypes.c_int, *[ctypes.py_object] * 3)
TRIP = functools.partial(_trip_with(("PyErr_SetInterruptEx", ctypes.pythonapi)), SIGNAL)


@pytest.fixture
def signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are handled in the main thread")

    def handle(signum: int, frame: FrameType | None) -> None:
        sys.settrace(None)
        raise Interrupted

    previous, tracer = signal.signal(SIGNAL, handle), sys.gettrace()
    yield
    sys.settrace(tracer)
    signal.signal(SIGNAL, previous)


def run_with_signal(work: Callable[[], object], step: int, files: set[str], event: str) -> bool:
    """Runs with a signal that comes behind the step-th event in these files; whether it came."""
    left = step

    def trace(frame: FrameType, what: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = event == "opcode"
        left -= what == event
        if left >= 0:
            return trace
        # No more trace functions in Python, which would handle the signal in frames of their own:
        # `getattr` is called for each new frame, finds nothing, and returns the argument, None.
        sys.settrace(getattr)
        caller = frame.f_back
        while caller is not None:
            caller.f_trace, caller = None, caller.f_back
        return TRIP

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return left < 0


def in_time(work: Callable[[], object]) -> bool:
    """Whether another thread can do this."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def hold(held: Any) -> None:
    with held():
        pass


def interrupt_everywhere(
    prepare: Callable[[], Callable[[], object]],
    after: Callable[[], object],
    files: set[str],
    event: str,
) -> int:
    """Calls `after` while the exception of each signal is handled; returns how many there were."""
    n = 0
    for step in itertools.count():
        work = prepare()
        try:
            if not run_with_signal(work, step, files, event):
                return n
        except Interrupted:
            n += 1
            after()
    raise AssertionError


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("how", ["read", "write"])
def test_a_signal_anywhere_leaves_the_lock_free(how: str) -> None:
    guard = ReadWriteLock()

    def work() -> None:
        with getattr(guard, how)():
            len("")

    def after() -> None:
        assert in_time(lambda: hold(guard.write))

    files = {__file__, lock.__file__, threading.__file__}
    assert interrupt_everywhere(lambda: work, after, files, "opcode") > 50


@pytest.mark.usefixtures("signals")
def test_a_signal_to_one_who_waits_leaves_the_lock_free() -> None:
    guard = ReadWriteLock()
    for how in (guard.read, guard.write):
        waiting = threading.main_thread().ident
        with guard.write():
            pass
        held, done = threading.Event(), threading.Event()

        def writer(held: Any = held, done: Any = done) -> None:
            with guard.write():
                held.set()
                done.wait()

        thread = threading.Thread(target=writer)
        thread.start()
        held.wait()
        threading.Timer(0.2, signal.pthread_kill, (waiting, SIGNAL)).start()
        with pytest.raises(Interrupted):
            hold(how)
        done.set()
        thread.join()
        assert in_time(lambda: hold(guard.write))


VECTORS = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
OTHERS = VECTORS.flip(1)


def flat_index() -> FlatIndex:
    index = FlatIndex(8, codes=True)
    index.add(VECTORS)
    return index


def faiss_flat() -> FaissIndex:
    pytest.importorskip("faiss")
    index = FaissIndex(8, "Flat")
    index.add(VECTORS)
    return index


CHANGES: dict[str, Callable[[Any], object]] = {
    "search": lambda index: index.search(VECTORS[:2], 3),
    "vectors": lambda index: index.vectors(torch.tensor([3])),
    "checksum": lambda index: index.checksum(),
    "add": lambda index: index.add(OTHERS),
    "update": lambda index: index.update(torch.arange(4, 9), OTHERS[4:9]),
    "remove": lambda index: index.remove([1, 2]),
    "replace": lambda index: index.replace(OTHERS),
}


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [flat_index, faiss_flat])
def test_a_signal_anywhere_leaves_an_index_whole(
    make: Callable[[], Any], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "pay", lambda *args: True)  # read by the search, kept by `update`
    index = make()

    def prepare() -> Callable[[], object]:
        nonlocal index
        index = copy.deepcopy(trained)
        return lambda: CHANGES[change](index)

    def check() -> None:
        try:
            stored = index.vectors(torch.arange(len(index)))
        except RuntimeError as error:
            assert make is faiss_flat and "when the change was interrupted" in str(error)
            return
        live = torch.arange(len(index))[~index.removed]
        scores, found = index.search(VECTORS, 1)
        expected, at = (VECTORS @ stored[live].T).max(1)
        torch.testing.assert_close(scores[:, 0], expected)
        assert torch.equal(found[:, 0], live[at])
        kept, fresh = index.checksum(), copy.deepcopy(index)
        fresh._checksum = None
        assert kept == fresh.checksum()
        index.remove([0])
        assert index.n_live == len(live) - 1
        checked.append(None)

    def after() -> None:
        n = len(checked)
        assert in_time(check)
        assert index._lock.broken or len(checked) == n + 1

    trained, checked = index, []
    index.search(VECTORS[:2], 3)
    index.checksum()
    files = {m.__file__ for m in (lock, rows, flat, faiss_index, faiss_support, codes, codec)}
    assert interrupt_everywhere(prepare, after, files, "line") > 10
    assert len(checked) > 10


def test_in_the_order_in_which_they_came() -> None:
    guard, order = ReadWriteLock(), []

    def enter(name: str, how: Any) -> threading.Thread:
        def work() -> None:
            with how():
                order.append(name)

        n = len(guard._alive())
        thread = threading.Thread(target=work)
        thread.start()
        while len(guard._alive()) == n:
            time.sleep(0.001)
        return thread

    with guard.read():
        assert in_time(lambda: hold(guard.read))  # beside the first
        threads = [enter("writer", guard.write), enter("reader", guard.read)]
        time.sleep(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["writer", "reader"]


# ------------------------------------------------------------------------------------------ forks


def in_child(work: Callable[[], object]) -> int:
    """Forks, and returns how the child ended that did this; 14: it was killed as it hung."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def beside(work: Callable[[Callable[[], None]], object], then: Callable[[], int]) -> int:
    """What `then` returns while another thread is where `work` calls the function it is given."""
    there, done = threading.Event(), threading.Event()

    def stay() -> None:
        there.set()
        done.wait()

    thread = threading.Thread(target=work, args=(stay,), daemon=True)
    thread.start()
    assert there.wait(20)
    try:
        return then()
    finally:
        done.set()
        thread.join()


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def use(index: Any) -> None:
    index.update([3], OTHERS[:1])
    scores, found = index.search(OTHERS[:1], 1)
    assert scores.shape == found.shape == (1, 1)
    index.add(OTHERS)
    assert len(index) == 80 and index.version == 3


@pytest.mark.parametrize("make", [flat_index, faiss_flat])
def test_a_child_uses_an_index_that_its_parent_searches(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make()
    index.search(VECTORS[:1], 1)  # what the first search imports takes seconds

    def search(stay: Callable[[], None]) -> None:
        topk = index._topk
        monkeypatch.setattr(index, "_topk", lambda *args: (stay(), topk(*args))[1])
        index.search(VECTORS[:1], 1)

    def then() -> int:
        monkeypatch.undo()
        return in_child(lambda: use(index))

    assert beside(search, then) == 0
    use(index)


def test_a_child_uses_an_index_to_which_its_parent_prepares_to_add() -> None:
    index = flat_index()

    def add(stay: Callable[[], None]) -> None:
        index.add(stay() or block for block in (OTHERS[:30], OTHERS[30:]))

    assert beside(add, lambda: in_child(lambda: use(index))) == 0
    assert len(index) == 80


def test_a_child_refuses_rows_that_its_parent_was_changing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, put_rows = flat_index(), codec.put_rows
    uses: list[Callable[[], object]] = [
        lambda: index.search(VECTORS[:1], 1),
        lambda: index.vectors(torch.tensor([0])),
        lambda: index.update([3], OTHERS[:1]),
        lambda: index.add(OTHERS),
        lambda: index.save(tmp_path / "index"),
        lambda: index.checksum(),
        lambda: copy.deepcopy(index),
    ]

    def update(stay: Callable[[], None]) -> None:
        monkeypatch.setattr(codec, "put_rows", lambda *args: (stay(), put_rows(*args)))
        index.update([3], OTHERS[:1])

    def refused() -> None:
        for each in uses:
            with pytest.raises(RuntimeError, match="changed when this process was forked, so its"):
                each()

    assert beside(update, lambda: in_child(refused)) == 0
    assert not (tmp_path / "index").exists()
    monkeypatch.undo()
    for each in uses:
        each()
