"""Searches and answers of one server, whose index may be replaced while it is served."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from fastrag.generation.answers import Answer, answer_questions
from fastrag.messages import clipped
from fastrag.serve.batching import Batcher
from fastrag.serve.metrics import Metrics
from fastrag.serve.source import Found, Served, Source

if TYPE_CHECKING:
    from fastrag.nn import RagModel

# Questions that are answered in one call of the generator, with K contexts each.
_ANSWERED_TOGETHER = 8


class Abandoned(Exception):
    """Raised during generation when no client waits for the answer any more."""


class SearchKey(NamedTuple):
    """Key of a batch of queries: the content that they were checked against, and k."""

    served: Served
    k: int


class AnswerKey(NamedTuple):
    """Key of a batch of questions: these settings are the same for all of them."""

    served: Served
    n_docs: int | None
    max_new_tokens: int
    marginal: str | None


class Service:
    """Search and answer in batches, and read an index again when it is replaced on disk.

    One thread searches and one answers, so that a long answer never delays a search. A request uses
    the index that was served when it arrived, even if that index is replaced before its search.

    Args:
        source: the folders to serve.
        max_batch: queries that are searched together; 1 searches every request alone.
        max_wait: seconds that a request may wait for others.
        reload_every: seconds between two checks of the folders; 0: they are read once.

    Attributes:
        served: the content that is served now.
        reload_error: why the latest replacement could not be read; None if there is no such error.
        metrics: counters for `GET /metrics`.

    Raises:
        ValueError: a folder cannot be read, or a number out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        max_batch: int = 64,
        max_wait: float = 0.002,
        reload_every: float = 2.0,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected an integer >= 1, got {max_batch}")
        if not 0 <= max_wait <= 10:
            raise ValueError(f"max_wait: expected 0 to 10 seconds, got {max_wait:g}")
        if not reload_every >= 0:
            raise ValueError(f"reload_every: expected seconds >= 0, got {reload_every:g}")
        self.source = source
        self.reload_every = reload_every
        self.metrics = Metrics()
        self.served = source.load()
        self.reload_error: str | None = None
        self._identities = source.identities(self.served)
        self._searching = ThreadPoolExecutor(1, "fastrag-search")
        self._answering = ThreadPoolExecutor(1, "fastrag-answer")
        self._searches: Batcher[SearchKey, Any, Found] = Batcher(
            _search,
            self._searching,
            max_items=max_batch,
            max_wait=max_wait,
            observe=self.metrics.search,
        )
        self._answers: Batcher[AnswerKey, str, Answer] = Batcher(
            _answer,
            self._answering,
            max_items=min(max_batch, _ANSWERED_TOGETHER),
            max_wait=max_wait,
            observe=self.metrics.answer,
        )
        self._watching: asyncio.Task[None] | None = None
        self.metrics.index(self.served.index)

    async def start(self) -> None:
        """Start to check the folders."""
        if self.reload_every:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Finish the batches that run and end the threads."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._searches.close()
        await self._answers.close()
        self._searching.shutdown(cancel_futures=True)
        self._answering.shutdown(cancel_futures=True)

    async def search(self, served: Served, queries: Sequence[Any], k: int) -> list[Found]:
        """Return the k nearest passages of each query.

        Args:
            served: the content that the queries were checked against.
            queries: questions, or vectors.
            k: passages per query.
        """
        if not queries:
            return []
        return await self._searches.submit(SearchKey(served, k), queries)

    async def answer(
        self,
        served: Served,
        question: str,
        *,
        n_docs: int | None,
        max_new_tokens: int,
        marginal: str | None,
    ) -> Answer:
        """Answer a question, together with others that come with the same settings."""
        key = AnswerKey(served, n_docs, max_new_tokens, marginal)
        return (await self._answers.submit(key, [question]))[0]

    async def stream(
        self,
        served: Served,
        question: str,
        *,
        n_docs: int | None,
        max_new_tokens: int,
        marginal: str | None,
    ) -> AsyncGenerator[str | Answer, None]:
        """Yield the pieces of an answer as they come, and the whole answer at the end.

        Closing the iterator ends the generation at its next token.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        abandoned = threading.Event()

        def put(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended with the server
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run() -> Answer:
            try:
                [answer] = answer_questions(
                    _aligned(served),
                    [question],
                    n_docs=n_docs,
                    max_new_tokens=max_new_tokens,
                    marginal=marginal,
                    on_text=put,
                    on_progress=_ending(abandoned.is_set),
                )
                return answer
            finally:
                put(None)

        work = loop.run_in_executor(self._answering, run)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await work
        finally:
            abandoned.set()
            work.cancel()

    async def reload_if_changed(self) -> bool:
        """Read folders that were replaced, and serve the new content.

        Searches continue meanwhile. If the new content cannot be read, the old content stays, and
        the next call tries again.

        Returns:
            Whether new content is served now.
        """
        now = await asyncio.to_thread(self.source.identities, self.served)
        changed = {name for name, found in now.items() if found != self._identities.get(name)}
        if not changed or None in now.values():
            return False
        try:
            fresh = await asyncio.to_thread(self.source.reload, self.served, changed)
        except Exception as error:  # a half-written folder can make a reader raise anything
            reason = clipped(error) or type(error).__name__
            if reason != self.reload_error:
                names = " and ".join(sorted(changed))
                warnings.warn(
                    f"the new {names} cannot be served, so the old content is: {reason}",
                    stacklevel=1,
                )
                self.metrics.reloaded(ok=False)
            self.reload_error = reason
            return False
        self.served, self.reload_error = fresh, None
        # from before the load, so that a folder replaced meanwhile is read at the next call
        self._identities = {**self.source.identities(fresh), **now}
        self.metrics.reloaded(ok=True)
        self.metrics.index(fresh.index)
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.reload_every)
            await self.reload_if_changed()


def _search(key: SearchKey, queries: list[Any], abandoned: Callable[[], bool]) -> list[Found]:
    return key.served.search(queries, key.k)


def _answer(key: AnswerKey, questions: list[str], abandoned: Callable[[], bool]) -> list[Answer]:
    return answer_questions(
        _aligned(key.served),
        questions,
        n_docs=key.n_docs,
        max_new_tokens=key.max_new_tokens,
        marginal=key.marginal,
        on_progress=_ending(abandoned),
    )


def _ending(abandoned: Callable[[], bool]) -> Callable[[float], None]:
    """Return a callback of `generate` that ends it when it is abandoned."""

    def check(share: float) -> None:
        if abandoned():
            raise Abandoned

    return check


def _aligned(served: Served) -> RagModel:
    """Return the model, reading the index of `served`; only the answering thread may call it."""
    model = served.model
    if model is None:
        raise ValueError("model: expected a generator, got none")
    if model.index is not served.index:
        model.index, model.passages = served.index, served.passages
    return model
