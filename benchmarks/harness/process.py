"""A child process that runs functions for its parent, one at a time.

    python -m benchmarks.harness.process FD [CHECKOUT]

FD is an inherited socket; `multiprocessing.connection` carries functions and replies. With CHECKOUT
the child imports fastrag from there, while the benchmarks stay those of this folder. The child ends
when the socket closes, so it never outlives its parent.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import shared
from benchmarks.harness.measure import ROOT

OK = "ok"


class Refusal(Exception):
    """Raised by a function in the child; the text becomes the status as it is."""


class Process:
    """A child that lives as long as the context; `tree` is the checkout to take fastrag from."""

    def __init__(self, tree: Path | None = None) -> None:
        self.tree = tree

    def __enter__(self) -> Process:
        here, there = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        command = [sys.executable, "-m", "benchmarks.harness.process", str(there.fileno())]
        # A session of its own: everything the child starts ends with it, and Ctrl-C reaches only
        # the parent.
        self.child = subprocess.Popen(
            command + ([str(self.tree)] if self.tree else []),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            pass_fds=[there.fileno(), *shared.descriptors()],
        )
        there.close()
        self.pipe = Connection(here.detach())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self.pipe.close()
        self.log.close()

    def ask(self, function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
        """Return "ok" and the result of the function, or the reason why there is none, and None."""
        with suppress(EOFError, OSError):
            self.pipe.send((function, args))
            reply: tuple[str, Any] = self.pipe.recv()
            return reply
        code = self.child.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1][:200]}" if said else ""
        return f"failed: its process ended with code {code}{last}", None


def reply_to(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    # Whatever a provider raises is its result; the run continues with the others.
    try:
        return OK, function(*args)
    except Refusal as refusal:
        return str(refusal), None
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None


def main(descriptor: str, tree: str = "") -> None:
    # Inductor's pool of processes would compile while another provider takes its turn.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if tree:
        sys.path.insert(0, tree)
    # Import now, while other children do the same, and not at the first request, when they wait.
    importlib.import_module("benchmarks.ops")
    with suppress(EOFError, OSError), Connection(int(descriptor)) as pipe:
        while True:
            pipe.send(reply_to(*pipe.recv()))


if __name__ == "__main__":
    main(*sys.argv[1:])
