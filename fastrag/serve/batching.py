"""Requests that arrive together are computed together, in one call and in order of arrival."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(eq=False, slots=True)
class _Request:
    key: Any
    items: Sequence[Any]
    arrived: float
    result: asyncio.Future[list[Any]]


class Batcher(Generic[K, X, Y]):
    """Join the items of concurrent requests into batches for a function.

    One batch runs at a time. It starts when `max_items` have arrived or its oldest request has
    waited for `max_wait` seconds; requests that arrive while a batch runs form the next one. Only
    requests with equal keys share a batch. A request is never split, and one that is cancelled
    while it waits is dropped. If a batch of several requests fails, each of them runs alone, so
    that no request fails because of another one.

    Args:
        run: `run(key, items, abandoned) -> one result per item`. It is called in a thread of
            `executor`. `abandoned()` says whether every request of the batch was cancelled.
        executor: an executor with one thread.
        max_items: items that are enough to start a batch. A batch holds no more, except that a
            larger request runs alone. 1 runs every request alone.
        max_wait: seconds that a request waits for others.
        observe: called with the number of items and the seconds of each batch.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> async def two_requests():
        ...     with ThreadPoolExecutor(1) as thread:
        ...         double = Batcher(lambda key, xs, abandoned: [2 * x for x in xs], thread)
        ...         return await asyncio.gather(double.submit("", [1, 2]), double.submit("", [3]))
        >>> asyncio.run(two_requests())
        [[2, 4], [6]]
    """

    def __init__(
        self,
        run: Callable[[K, list[X], Callable[[], bool]], list[Y]],
        executor: Executor,
        *,
        max_items: int = 64,
        max_wait: float = 0.002,
        observe: Callable[[int, float], None] = lambda n_items, seconds: None,
    ) -> None:
        self.run = run
        self.executor = executor
        self.max_items = max_items
        self.max_wait = max_wait if max_items > 1 else 0.0
        self.observe = observe
        self._waiting: list[_Request] = []
        self._running: asyncio.Task[None] | None = None
        self._clock: asyncio.TimerHandle | None = None

    async def submit(self, key: K, items: Sequence[X]) -> list[Y]:
        """Return one result per item, once the batch with them has run.

        Args:
            key: requests with another key are not in the same batch.
            items: at least one item.

        Raises:
            Exception: what `run` raised for these items.
        """
        loop = asyncio.get_running_loop()
        request = _Request(key, items, loop.time(), loop.create_future())
        self._waiting.append(request)
        self._start_if_due()
        return await request.result

    async def close(self) -> None:
        """Wait for the batch that runs, and cancel the requests that still wait."""
        for request in self._waiting:
            request.result.cancel()
        self._waiting.clear()
        if self._running is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    def _start_if_due(self) -> None:
        """Start a batch if none runs and one is due; else set a timer for the oldest request."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if self._running is not None:
            return
        self._waiting = [each for each in self._waiting if not each.result.done()]
        if not self._waiting:
            return
        loop = asyncio.get_running_loop()
        oldest = self._waiting[0]
        alike = [each for each in self._waiting if each.key == oldest.key]
        due = oldest.arrived + self.max_wait
        if sum(len(each.items) for each in alike) < self.max_items and loop.time() < due:
            self._clock = loop.call_at(due, self._start_if_due)
            return
        batch, n_items = [oldest], len(oldest.items)
        for request in alike[1:]:
            n_items += len(request.items)
            if n_items > self.max_items:
                break
            batch.append(request)
        taken = set(batch)
        self._waiting = [each for each in self._waiting if each not in taken]
        self._running = loop.create_task(self._run(batch))

    async def _run(self, batch: list[_Request]) -> None:
        try:
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self.executor, self._outcomes, batch)
            for request, outcome in zip(batch, outcomes, strict=True):
                if request.result.done():
                    continue  # cancelled while the batch ran
                if isinstance(outcome, BaseException):
                    request.result.set_exception(outcome)
                else:
                    request.result.set_result(outcome)
        except BaseException as error:  # the executor was shut down
            for request in batch:
                if not request.result.done():
                    request.result.set_exception(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._running = None
            self._start_if_due()

    def _outcomes(self, batch: list[_Request]) -> list[Any]:
        """Return the results of each request, or the exception that it raised."""
        items = [item for request in batch for item in request.items]
        started = time.perf_counter()
        try:
            results = iter(
                self.run(batch[0].key, items, lambda: all(r.result.cancelled() for r in batch))
            )
            return [[next(results) for _ in request.items] for request in batch]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [outcome for request in batch for outcome in self._outcomes([request])]
        finally:
            self.observe(len(items), time.perf_counter() - started)
