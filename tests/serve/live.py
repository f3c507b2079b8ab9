"""A server in a thread of the test's process, reached through a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrag.index import FlatIndex
from fastrag.serve import server
from fastrag.serve.app import create_app
from fastrag.serve.limits import Limits
from fastrag.serve.service import Service
from fastrag.serve.source import Source
from tests import tiny


@dataclass
class Live:
    """A running server.

    Attributes:
        service: what it serves.
        port: its port at 127.0.0.1.
        loop: the loop that it runs in.
    """

    service: Service
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str
    ) -> tuple[int, Any]:
        """Return status and body, decoded if it is JSON; all but bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        sent = {"content-type": "application/json"} | headers
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        ) as connection:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            found = response.read()
            if response.headers.get_content_type() == "application/json":
                return response.status, json.loads(found)
            return response.status, found.decode()

    def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        """POST the fields as JSON."""
        return self.request("POST", path, fields)

    def reload(self) -> bool:
        """Look at the folders now, from the server's own loop as the watcher does."""
        changed = self.service.reload_if_changed()
        return asyncio.run_coroutine_threadsafe(changed, self.loop).result(60)

    def metric(self, line: str) -> float:
        """Return the value of a line of /metrics; 0 if it is not there."""
        _, text = self.request("GET", "/metrics")
        values = [each.rpartition(" ") for each in text.splitlines()]
        return next((float(value) for name, _, value in values if name == line), 0.0)


@contextlib.contextmanager
def serving(source: Source, limits: Limits | None = None, **settings: Any) -> Iterator[Live]:
    """Serve a source at a free port; the server has ended when the block has."""
    service = Service(source, **{"reload_every": 0} | settings)
    with server.listen("127.0.0.1", 0) as bound:
        started = threading.Event()
        loops = []

        def on_started() -> None:
            loops.append(asyncio.get_running_loop())
            started.set()

        running = server.Server(create_app(service, limits), 5, on_started)
        thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
        thread.start()
        assert started.wait(60)
        try:
            yield Live(service, bound.getsockname()[1], loops[0])
        finally:
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def save_index(folder: Path, vectors: torch.Tensor | None = None, n: int = 12) -> None:
    """Write the passages of `tiny` as `fastrag index build` does, with these vectors or theirs."""
    passages = tiny.store(n=n)
    if vectors is None:
        vectors = tiny.rag_model(n_passages=n).index.vectors(torch.arange(n))
    index = FlatIndex(vectors.shape[1])
    index.add(vectors)
    index.passages_checksum = passages.checksum()
    passages.save(folder / "passages")
    index.save(folder / "index")


def save_parts(folder: Path) -> None:
    """Write `encoder`, `idx` with the vectors of that encoder, and `model` with its generator."""
    tiny.save_parts(folder)
    save_index(folder / "idx")
    model = tiny.rag_model().eval()
    model.save_pretrained(folder / "model", include_index=True)
