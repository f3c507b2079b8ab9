"""Counters of a server in Prometheus's text format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from fastrag.index import Index

ROUTES = ("/retrieve", "/answer", "/health", "/metrics", "/openapi.json")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Metrics:
    """Requests, batches and the index of one server.

    Example:
        >>> metrics = Metrics()
        >>> metrics.request("/retrieve", 200, 0.01)
        >>> b'fastrag_requests_total{path="/retrieve",status="200"} 1.0' in metrics.text()
        True
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fastrag_requests_total",
            "Requests by path and status; 499: the client hung up.",
            ["path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "fastrag_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "fastrag_requests_in_flight", "Requests being answered.", registry=self._registry
        )
        self._batches = {
            name: Histogram(
                f"fastrag_{name}_batch_size",
                f"{items} that were computed together.",
                buckets=_QUERIES,
                registry=self._registry,
            )
            for name, items in (("search", "Queries"), ("answer", "Questions"))
        }
        self._batch_seconds = {
            name: Histogram(
                f"fastrag_{name}_batch_seconds",
                f"Seconds of a batch of {items}.",
                buckets=_SECONDS,
                registry=self._registry,
            )
            for name, items in (("search", "queries"), ("answer", "questions"))
        }
        self._reloads = Counter(
            "fastrag_index_reloads_total",
            "Replaced indexes or models, by whether they could be read.",
            ["result"],
            registry=self._registry,
        )
        self._passages = Gauge(
            "fastrag_index_passages", "Passages that a search can return.", registry=self._registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        path = path if path in ROUTES else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def in_flight(self, n: int) -> None:
        """Record how many requests are being answered."""
        self._in_flight.set(n)

    def search(self, n_queries: int, seconds: float) -> None:
        """Count a batch of queries."""
        self._batches["search"].observe(n_queries)
        self._batch_seconds["search"].observe(seconds)

    def answer(self, n_questions: int, seconds: float) -> None:
        """Count a batch of questions."""
        self._batches["answer"].observe(n_questions)
        self._batch_seconds["answer"].observe(seconds)

    def reloaded(self, *, ok: bool) -> None:
        """Count a replaced index."""
        self._reloads.labels("ok" if ok else "failed").inc()

    def index(self, index: Index) -> None:
        """Record the size of the index."""
        self._passages.set(index.n_live)

    def text(self) -> bytes:
        """Return all counters."""
        return generate_latest(self._registry)
