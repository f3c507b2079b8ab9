"""Limits of requests: size of the body, time for body and answer, number of requests at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS = ("/health", "/metrics")  # answered by a busy server too


@dataclass(frozen=True)
class Limits:
    """Limits of a request; `fastrag serve` has an option for each field.

    Attributes:
        max_body: bytes of a body.
        max_queries: queries of a request.
        max_length: characters of a query.
        max_passages: passages that a request may ask for, queries times topk.
        max_new_tokens: tokens of an answer.
        max_in_flight: requests at the same time; one more is refused immediately.
        timeout: seconds for the body, and again for the answer.
    """

    max_body: int = 16 << 20
    max_queries: int = 4096
    max_length: int = 10_000
    max_passages: int = 65_536
    max_new_tokens: int = 256
    max_in_flight: int = 1024
    timeout: float = 30.0


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason


class LimitsMiddleware:
    """Read each body within the limits before the application runs, and limit its time.

    The application is cancelled when its time is over or its client has hung up.

    Args:
        app: the ASGI application.
        limits: the limits.
        observe: called with path, status and seconds of each request; status 499: the client hung
            up.
        in_flight: called with the number of requests that are being answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        observe: Callable[[str, int, float], None],
        in_flight: Callable[[int], None],
    ) -> None:
        self.app = app
        self.limits = limits
        self.observe = observe
        self.in_flight = in_flight
        self._n_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        response = _Response(send)
        self._count(1)
        try:
            if self._n_in_flight > self.limits.max_in_flight and scope["path"] not in _ALWAYS:
                raise _Refused(503, f"busy: {self.limits.max_in_flight} requests at once")
            body = await self._body(scope, receive)
            await self._answer(scope, body, receive, response)
        except _Refused as refused:
            await response.refuse(refused)
        except Exception:
            response.status = 500  # which an outer middleware answers with
            raise
        finally:
            self._count(-1)
            self.observe(scope["path"], response.status, time.perf_counter() - started)

    def _count(self, change: int) -> None:
        self._n_in_flight += change
        self.in_flight(self._n_in_flight)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.limits.max_body
        too_large = _Refused(413, f"body: expected at most {limit} bytes, got more")
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.timeout):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            reason = f"body: expected all of it within {self.limits.timeout:g} seconds"
            raise _Refused(408, reason) from None
        raise _Refused(499, "body: the client hung up")

    async def _answer(
        self, scope: Scope, body: bytes, receive: Receive, response: _Response
    ) -> None:
        unread = [body]
        gone = asyncio.Event()

        async def give() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self.app(scope, give, response.send))
        watching = asyncio.ensure_future(watch())
        try:
            async with asyncio.timeout(self.limits.timeout):
                await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
                if work.done() or response.complete:
                    await work
                else:
                    response.status = 499
        except TimeoutError:
            reason = f"time-out: no answer within {self.limits.timeout:g} seconds"
            raise _Refused(504, reason) from None
        finally:
            for task in (work, watching):
                task.cancel()
            await asyncio.wait((work, watching))


class _Response:
    """Pass on a response and record how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, refused: _Refused) -> None:
        """Answer with an error, unless an answer has begun or the client has hung up."""
        if self.status or refused.status == 499:
            self.status = refused.status
            return
        body = json.dumps({"error": refused.reason}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if refused.status == 503:
            headers.append((b"retry-after", b"1"))
        if refused.status == 408:
            headers.append((b"connection", b"close"))  # the rest of the body may still come
        await self.send(
            {"type": "http.response.start", "status": refused.status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})
