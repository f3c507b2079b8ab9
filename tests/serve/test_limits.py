"""Time-outs and concurrency; a busy or slow server says so and stays up."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastrag.serve.limits import Limits
from fastrag.serve.source import Served, Source
from tests.serve.live import serving


class Held:
    """Holds searches back until told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        search = Served.search

        def held(served: Served, queries: Any, k: int) -> Any:
            self.reached.set()
            assert self.go_on.wait(60)
            return search(served, queries, k)

        monkeypatch.setattr(Served, "search", held)


def test_one_request_too_many_is_refused_at_once(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    limits = Limits(max_in_flight=2)
    query = [0.5] * 16
    with (
        serving(Source(index=str(parts / "idx")), limits) as live,
        ThreadPoolExecutor(2) as threads,
    ):
        waiting = [threads.submit(live.post, "/retrieve", queries=[query]) for _ in range(2)]
        assert held.reached.wait(60)
        while live.metric("fastrag_requests_in_flight") < 3:  # the third is that of /metrics
            time.sleep(0.01)
        status, answer = live.post("/retrieve", queries=[query])
        assert (status, answer["error"]) == (503, "busy: 2 requests at once")
        assert live.request("GET", "/health")[0] == 200  # not counted among them
        held.go_on.set()
        assert [each.result()[0] for each in waiting] == [200, 200]
        assert live.post("/retrieve", queries=[query])[0] == 200


def test_an_answer_that_takes_too_long(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with serving(Source(index=str(parts / "idx")), Limits(timeout=0.2)) as live:
        status, answer = live.post("/retrieve", queries=[[0.5] * 16])
        assert (status, answer["error"]) == (504, "time-out: no answer within 0.2 seconds")
        held.go_on.set()
        assert live.post("/retrieve", queries=[[0.5] * 16])[0] == 200


def test_a_body_that_takes_too_long(parts: Path) -> None:
    with serving(Source(index=str(parts / "idx")), Limits(timeout=0.2)) as live:
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as client:
            client.sendall(b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{")
            answer = b""
            while data := client.recv(1000):  # to the end: the connection is closed
                answer += data
            assert answer.startswith(b"HTTP/1.1 408 ") and b"within 0.2 seconds" in answer
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as client:
            client.sendall(b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{")
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as client:
            client.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert live.request("GET", "/health")[0] == 200
        assert live.post("/retrieve", queries=[[0.5] * 16])[0] == 200


def test_a_request_for_too_many_passages(parts: Path) -> None:
    with serving(Source(index=str(parts / "idx")), Limits(max_passages=20)) as live:
        assert live.post("/retrieve", queries=[[0.5] * 16] * 2, topk=10)[0] == 200
        status, answer = live.post("/retrieve", queries=[[0.5] * 16] * 3, topk=10)
        assert (
            status == 422 and "at most 20 passages in an answer, got 3 queries" in answer["error"]
        )
