"""`fastrag serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastrag.cli import main
from fastrag.serve import server
from tests.cli.commands import ENVIRONMENT


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_the_running_requests_finish(parts: Path, number: signal.Signals) -> None:
    options = ("--index", "idx", "--device", "cpu", "--port", "0", "--max-wait-ms", "1000")
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
        line = process.stdout.readline()
        found = re.fullmatch(r"serving 12 passages at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line
        routes = "POST /retrieve (vectors), GET /health, GET /metrics\n"
        assert process.stdout.readline() == routes
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        body = json.dumps({"queries": [[0.5] * 16], "topk": 2})
        # it waits a second for others, and the signal comes within that time
        connection.request("POST", "/retrieve", body, {"content-type": "application/json"})
        timer = threading.Timer(0.3, process.send_signal, (number,))
        timer.start()
        response = connection.getresponse()
        assert response.status == 200
        assert len(json.loads(response.read())["result"][0]) == 2
        assert not timer.is_alive()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "fastrag: stopped\n")
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
