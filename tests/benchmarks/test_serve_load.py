"""The load on `fastrag serve`: what it serves, what it sends, and what it reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve_load
from benchmarks.harness.results import read
from fastrag.serve.source import Source
from tests.serve.live import serving


@pytest.mark.parametrize("kind", ["vectors", "texts"])
def test_every_request_is_answered(tmp_path: Path, kind: str) -> None:
    serve_load.write(tmp_path, 40, 12)
    encoder = str(tmp_path / "encoder") if kind == "texts" else None
    bodies = serve_load.requests(kind, 12, n=5)
    with serving(Source(encoder=encoder, index=str(tmp_path / "index"))) as live:
        seconds, passed = asyncio.run(serve_load.load(live.port, 3, 0.2, bodies))
        answered = live.metric('fastrag_requests_total{path="/retrieve",status="200"}')
    assert len(seconds) == answered >= 3
    assert 0 < min(seconds) <= max(seconds) <= passed


def test_the_rows_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates and times of each way of handling requests, printed and in the CSV."""
    ports = iter((1, 2) * 9)

    @contextlib.contextmanager
    def server(*arguments: Any) -> Iterator[int]:
        yield next(ports)

    async def load(port: int, *arguments: Any) -> tuple[list[float], float]:
        return [0.1 * port] * 10 * port, 1.0  # 10 and 20 requests/s

    monkeypatch.setattr(serve_load, "server", server)
    monkeypatch.setattr(serve_load, "load", load)
    monkeypatch.setattr(serve_load, "write", lambda *arguments: None)
    file = tmp_path / "rows.csv"
    assert serve_load.main(["--passages", "40", "--dim", "12", "--csv", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert shown == [
        "| vectors | 32 | one by one | 10 | 100.0 | 100.0 |",
        "| vectors | 32 | together | 20 (2.0 ×) | 200.0 | 200.0 |",
    ]
    rows = read(file)
    names = ("op", "provider", "mode", "shape", "ms_p50", "ms_p99", "requests_per_s", "status")
    assert [[row[name] for name in names] for row in rows] == [
        ["serve", "one-by-one", "vectors", "32,40,12,3", "100.0000", "100.0000", "10.0", "ok"],
        ["serve", "together", "vectors", "32,40,12,3", "200.0000", "200.0000", "20.0", "ok"],
    ]
