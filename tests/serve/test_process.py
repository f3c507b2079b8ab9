"""`fastrag serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastrag.cli import main
from fastrag.serve import server
from fastrag.serve.source import Served
from tests.cli.commands import ENVIRONMENT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_running_requests_finish(
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """The signal comes while a search runs."""
    monkeypatch.chdir(parts)
    ports: list[int] = []
    listen, search = server.listen, Served.search

    def listening(host: str, port: int) -> socket.socket:
        bound = listen(host, port)
        ports.append(bound.getsockname()[1])
        return bound

    def interrupted(served: Served, queries: Any, k: int) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        return search(served, queries, k)

    def ask() -> tuple[int, Any]:
        while not ports:
            time.sleep(0.01)
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", ports[0], timeout=60)
        ) as connection:
            body = json.dumps({"queries": [[0.5] * 16], "topk": 2})
            connection.request("POST", "/retrieve", body, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    monkeypatch.setattr(server, "listen", listening)
    monkeypatch.setattr(Served, "search", interrupted)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask)
        assert main(["serve", "--index", "idx", "--device", "cpu", "--port", "0"]) == 0
    status, answer = asked.result()
    assert status == 200 and len(answer["result"][0]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"serving 12 passages at http://127.0.0.1:{ports[0]}",
        "POST /retrieve (vectors), GET /health, GET /metrics",
    ]
    assert err == "fastrag: stopped\n"


@pytest.mark.slow
def test_the_process_ends_at_a_signal(parts: Path) -> None:
    options = ("--index", "idx", "--device", "cpu", "--port", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrag.cli", "serve", *options],
        cwd=parts,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving 12 passages at http://127.0.0.1:")
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "fastrag: stopped\n")
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken(
    parts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is loaded."""
    monkeypatch.chdir(parts)
    with server.listen("127.0.0.1", 0) as bound:
        port = str(bound.getsockname()[1])
        started = time.monotonic()
        assert main(["serve", "--index", "nowhere", "--device", "cpu", "--port", port]) == 2
        assert time.monotonic() - started < 60
    error = f"port: expected a free one at 127.0.0.1, got {port}: address already in use"
    assert capsys.readouterr().err == f"fastrag: error: {error}\n"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "index: expected a folder from `fastrag index build` where no model is given"),
        (("--model", "model", "--encoder", "encoder"), "encoder: expected none with a model"),
        (("--index", "idx", "--retrieval-only"), "retrieval_only: expected a model"),
        (("--index", "nowhere"), "nowhere/index is missing"),
        (("--encoder", "idx", "--index", "idx"), "question_encoder: expected"),
        (("--index", "idx", "--host", "192.0.2.1"), "port: expected a free one at 192.0.2.1"),
        (
            ("--index", "idx", "--host", "no host"),
            "host: expected one of this machine, got no host",
        ),
        (("--index", "idx", "--port", "65536"), "expected a port from 0 to 65535, got '65536'"),
        (("--index", "idx", "--timeout", "0"), "expected a number above 0, got 0"),
        (("--index", "idx", "--max-wait-ms", "nan"), "expected a number from 0 to 10**6"),
        (
            ("--index", "idx", "--max-wait-ms", "20000"),
            "max_wait: expected 0 to 10 seconds, got 20",
        ),
    ],
)
def test_a_mistake_is_one_line(
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    error: str,
) -> None:
    monkeypatch.chdir(parts)
    try:
        status: Any = main(["serve", "--device", "cpu", "--port", "0", *options])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert error in line


def test_without_the_extra_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--index", "idx"]) == 2
    assert "pip install 'fastrag-torch[serve]'" in capsys.readouterr().err
