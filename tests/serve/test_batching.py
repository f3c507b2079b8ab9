"""Batcher: what is joined, what a batch waits for, and what a failure touches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.serve.batching import Batcher


class Log:
    """A function of batches that remembers them; it fails for a negative item."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, key: str, items: list[int], abandoned: Callable[[], bool]) -> list[str]:
        self.batches.append((key, items))
        assert self.go_on.wait(60)
        if min(items) < 0:
            raise ValueError(f"item {min(items)}")
        return [f"{key}{item}" for item in items]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(-1, 9), min_size=1, max_size=4)),
        min_size=1,
        max_size=12,
    ),
    max_items=st.integers(1, 6),
)
def test_every_request_gets_its_own_results(
    requests: list[tuple[str, list[int]]], max_items: int
) -> None:
    log = Log()

    async def run() -> list[Any]:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(log, thread, max_items=max_items, max_wait=0.001)
            submitted = [batcher.submit(key, items) for key, items in requests]
            return await asyncio.gather(*submitted, return_exceptions=True)

    for (key, items), found in zip(requests, asyncio.run(run()), strict=True):
        if min(items) < 0:
            assert isinstance(found, ValueError)
        else:
            assert found == [f"{key}{item}" for item in items]
    largest = max(len(items) for _, items in requests)
    assert all(len(items) <= max(max_items, largest) for _, items in log.batches)


def test_what_arrives_while_a_batch_runs_forms_the_next_one() -> None:
    log = Log()
    log.go_on.clear()

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(log, thread, max_items=8, max_wait=0)
            first = asyncio.create_task(batcher.submit("a", [0]))
            while not log.batches:
                await asyncio.sleep(0.001)
            rest = [asyncio.create_task(batcher.submit(key, [i])) for i, key in enumerate("abaa")]
            await asyncio.sleep(0)
            rest[2].cancel()
            log.go_on.set()
            assert await first == ["a0"]
            assert await rest[1] == ["b1"] and await rest[3] == ["a3"]

    asyncio.run(run())
    assert log.batches == [("a", [0]), ("a", [0, 3]), ("b", [1])]


def test_a_request_waits_for_others_no_longer_than_allowed() -> None:
    log = Log()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(log, thread, max_items=3, max_wait=0.05)
            started = loop.time()
            await batcher.submit("a", [1])
            assert 0.05 <= loop.time() - started < 10
            batcher = Batcher(log, thread, max_items=3, max_wait=10)
            await asyncio.gather(*(batcher.submit("a", [i]) for i in range(3)))
            batcher = Batcher(log, thread, max_items=1, max_wait=10)
            await batcher.submit("a", [4])

    asyncio.run(run())
    assert log.batches == [("a", [1]), ("a", [0, 1, 2]), ("a", [4])]


def test_an_abandoned_batch_knows_it() -> None:
    seen: list[bool] = []
    started, go_on = threading.Event(), threading.Event()

    def function(key: str, items: list[int], abandoned: Callable[[], bool]) -> list[int]:
        seen.append(abandoned())
        started.set()
        assert go_on.wait(60)
        seen.append(abandoned())
        return items

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(function, thread)
            task = asyncio.create_task(batcher.submit("a", [1]))
            await asyncio.to_thread(started.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await batcher.close()

    asyncio.run(run())
    assert seen == [False, True]
