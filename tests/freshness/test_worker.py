"""WorkerLane: nobody waits, a job is written whole or not at all, a killed worker is replaced."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastrag import IndexRefresher
from fastrag.freshness import Refresh, worker
from fastrag.index import PassageStore, encode_passages
from tests import tiny
from tests.freshness import drifting
from tests.freshness.test_service import all_vectors, questions

N = 12


class ThreadContext:
    """Runs the worker in a thread, which stops where a test says."""

    def __init__(self, go: threading.Event) -> None:
        self.go = go
        self.started: list[ThreadContext.Process] = []

    @staticmethod
    def Pipe() -> Any:  # noqa: N802
        return multiprocessing.Pipe()

    def Process(self, target: Any, args: Any, daemon: bool) -> Any:  # noqa: N802
        self.started.append(ThreadContext.Process_(self.go, args))
        return self.started[-1]

    class Process_:  # noqa: N801
        exitcode = -9

        def __init__(self, go: threading.Event, args: Any) -> None:
            theirs, twin, passages, *rest = args
            self.connection = os.dup(theirs.fileno())
            self.alive = True

            def wait_and_serve() -> None:
                class Waiting(nn.Module):
                    def forward(self, *given: Any) -> Any:
                        go.wait(20)
                        return twin(*given)

                waiting: Any = Waiting().eval()
                theirs_again = multiprocessing.connection.Connection(self.connection)
                worker.serve(theirs_again, waiting, passages, *rest)

            self.thread = threading.Thread(target=wait_and_serve, daemon=True)

        def start(self) -> None:
            self.thread.start()

        def is_alive(self) -> bool:
            return self.alive

        def kill(self) -> None:
            self.alive = False

        def join(self) -> None: ...


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> ThreadContext:
    context = ThreadContext(threading.Event())
    monkeypatch.setattr(drifting.Numbers, "handle", lambda self: self, raising=False)
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda kind: context)
    return context


def until(done: Callable[[], Any]) -> Any:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if (found := done()) is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing came of it")


def test_a_step_does_not_wait_and_all_vectors_appear_at_once(threads: ThreadContext) -> None:
    made = drifting.retriever(questions(N, 8))
    table: Any = made.passage_encoder
    service = IndexRefresher(made, "every:2", batch_size=5, worker="cpu")
    table.vectors.data += 0.3 * questions(N, 8, seed=1)
    snapshot, old, version = table.all(), all_vectors(made), made.index.version
    assert service.step(2) is None  # the job is sent
    table.vectors.data += 0.3 * questions(N, 8, seed=2)
    assert service.step(3) is None and torch.equal(all_vectors(made), old)
    threads.go.set()
    steps = iter(range(4, 10**6))
    assert until(lambda: service.step(next(steps))) is not None
    torch.testing.assert_close(all_vectors(made), snapshot)
    assert made.index.version == version + 1 and service.ledger.encoded_at.tolist() == [2] * N
    service.close()


def test_a_dead_worker_leaves_the_index_and_is_replaced(threads: ThreadContext) -> None:
    made = drifting.retriever(questions(N, 8))
    table: Any = made.passage_encoder
    service = IndexRefresher(made, "rolling:5", samples=0, worker="cpu")
    table.vectors.data += 0.3 * questions(N, 8, seed=1)
    old = all_vectors(made)
    assert service.step(1) is None
    threads.started[0].alive = False
    with pytest.warns(UserWarning, match=r"worker .* died \(exit code -9\); its job is lost"):
        service.step(2)
    assert torch.equal(all_vectors(made), old) and len(threads.started) == 2
    threads.go.set()
    steps = iter(range(3, 10**6))
    report = until(lambda: service.step(next(steps)))
    assert report.n_passages == 5
    torch.testing.assert_close(all_vectors(made)[:5], table.all()[:5])
    service.close()


def test_a_worker_that_keeps_dying_is_an_error(threads: ThreadContext) -> None:
    made = drifting.retriever(questions(N, 8))
    service = IndexRefresher(made, "rolling:5", samples=0, worker="cpu")
    with pytest.warns(UserWarning, match="died"), pytest.raises(
        RuntimeError, match="worker: expected a process .* on cpu, but it died 3 times in a row"
    ):  # fmt: skip
        for step in range(1, 9):
            service.step(step)
            threads.started[-1].alive = False


def test_a_failure_in_the_worker_is_told(threads: ThreadContext) -> None:
    made = drifting.retriever(questions(N, 8))
    made.passage_encoder = nn.Sequential(nn.Linear(1, 8))  # takes no mask
    service = IndexRefresher(made, "every:1", worker="cpu")
    threads.go.set()
    service.step(1)
    with pytest.raises((RuntimeError, TypeError), match="worker: encoding failed: TypeError"):
        until(lambda: service.step(2))
    with pytest.raises(ValueError, match="worker: expected a device or None, got 'gpu'"):
        IndexRefresher(made, "every:1", worker="gpu")
    service.close()


@pytest.mark.slow
def test_a_real_worker_killed_and_restarted(tmp_path: Any) -> None:
    """SIGKILL in the middle; the store's files are mapped in both processes."""
    made = tiny.rag_model(train_passage_encoder=True)
    made.passages.save(tmp_path / "passages")
    made.retriever.passages = PassageStore.load(tmp_path / "passages")
    with torch.no_grad():
        for parameter in made.passage_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fresh = encode_passages(made.passage_encoder, made.passages)
    service = IndexRefresher(made, "every:1", worker="cpu")
    old = all_vectors(made.retriever)
    assert service.step(1) is None
    lane: Any = service._lane
    os.kill(lane._process.pid, signal.SIGKILL)
    lane._process.join()
    with pytest.warns(UserWarning, match=r"died \(exit code -9\)"):
        service.step(2)
    assert torch.equal(all_vectors(made.retriever), old)
    report = until(lambda: service.step(2))
    assert report == Refresh(2, N, made.index.version)
    torch.testing.assert_close(all_vectors(made.retriever), fresh)
    process = lane._process
    service.close()
    assert not process.is_alive()
