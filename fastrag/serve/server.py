"""The process of a server: port, signals and shutdown."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from fastrag.messages import clipped, reason

if TYPE_CHECKING:
    from fastapi import FastAPI

# Seconds. Longer than clients keep an idle connection: if the server closes it first, the next
# request of the client can fail.
_KEEP_ALIVE = 75


def listen(host: str, port: int) -> socket.socket:
    """Bind a port; connections wait until `run` serves them.

    Args:
        host: name or address of this machine; `"127.0.0.1"` is reached from this machine alone.
        port: the port; 0 takes a free one.

    Returns:
        The bound socket.

    Raises:
        ValueError: the address is not one of this machine, or the port is taken.

    Example:
        >>> with listen("127.0.0.1", 0) as taken:
        ...     listen("127.0.0.1", taken.getsockname()[1])     # doctest: +SKIP
        Traceback (most recent call last):
        ValueError: port: expected a free one at 127.0.0.1, got 43210: address already in use
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"host: expected one of this machine, got {clipped(host)}: {reason(error)}"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        # a port whose last connections are being closed can be taken again
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        raise ValueError(
            f"port: expected a free one at {host}, got {port}: {reason(error)}"
        ) from error
    return bound


class Server(uvicorn.Server):
    """A uvicorn server that reports when it accepts connections.

    Args:
        app: the ASGI application.
        grace: seconds that running requests may take after a signal.
        on_started: called when connections are accepted.
    """

    def __init__(self, app: FastAPI, grace: float, on_started: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        super().__init__(config)
        self.on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_started()


def run(
    app: FastAPI, bound: socket.socket, *, grace: float = 10.0, on_started: Callable[[], None]
) -> None:
    """Serve until SIGINT or SIGTERM; then finish the running requests and return.

    A second Ctrl-C does not wait for them.

    Args:
        app: the application.
        bound: the socket, from `listen`.
        grace: seconds that running requests may take after a signal.
        on_started: called when connections are accepted.
    """
    # only tracebacks of failed requests
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fastrag: %(levelname)s: %(message)s"))
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    # after its shutdown uvicorn raises the signal again, for the previous handler
    before = {each: signal.signal(each, _done) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(app, grace, on_started).run(sockets=[bound])
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        logger.removeHandler(handler)


def _done(number: int, frame: FrameType | None) -> None:
    """Ignore a signal that has ended the server."""
