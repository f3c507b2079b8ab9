"""The load on `fastrag serve`: what it serves, what it sends, and what it reads."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import serve_load
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
