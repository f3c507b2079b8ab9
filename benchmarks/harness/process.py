"""A child process that runs functions for its parent, one at a time.

    python -m benchmarks.harness.process FD [MODULE [CHECKOUT]]

FD is an inherited socket; `multiprocessing.connection` carries functions and replies. MODULE is
imported at the start. With CHECKOUT fastrag comes from there, while the benchmarks stay those of
this folder. The child ends when the socket closes, so it never outlives its parent.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import ROOT

OK = "ok"
POLL_SECONDS = 0.1


class Refusal(Exception):
    """Raised by a function in the child; the text becomes the status as it is."""


class Process:
    """A child that lives as long as the context.

    Args:
        tree: the checkout to take fastrag from, by default this one.
        module: what to import at the start, while other children do the same, and not at the first
            request, when they wait.
        wrapper: the beginning of the command, such as a debugger.
        env: variables in addition to those of this process.
    """

    def __init__(
        self,
        tree: Path | None = None,
        *,
        module: str = "sys",
        wrapper: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        from benchmarks.harness import shared  # with torch, which not every child needs

        here, there = socket.socketpair()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
        command = [sys.executable, "-m", "benchmarks.harness.process", str(there.fileno()), module]
        # A process group of its own: everything the child starts ends with it, and Ctrl-C reaches
        # only the parent. The session is that of the parent: its end is the child's end as well.
        self.child = subprocess.Popen(
            [*wrapper, *command, *([str(tree)] if tree else [])],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            process_group=0,
            pass_fds=[there.fileno(), *shared.descriptors()],
        )
        there.close()
        self.pipe = Connection(here.detach())

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.pipe.close()
        self.log.close()

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def output(self) -> str:
        """Return the output of the child so far."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace").strip()

    def ask(
        self, function: Callable[..., Any], *args: Any, why_end: Callable[[], str] = lambda: ""
    ) -> tuple[str, Any]:
        """Return "ok" and the result of the function, or the reason why there is none, and None.

        `why_end` is called from time to time; the child is killed for the reason that it returns.
        """
        with suppress(EOFError, OSError):
            self.pipe.send((function, args))
            while not self.pipe.poll(POLL_SECONDS):
                if reason := why_end():
                    self.kill()
                    return f"failed: {reason}", None
            reply: tuple[str, Any] = self.pipe.recv()
            return reply
        code = self.child.wait()
        last = "".join(f": {line[:200]}" for line in self.output().splitlines()[-1:])
        return f"failed: its process ended with code {code}{last}", None


def reply_to(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    # Whatever a provider raises is its result; the run continues with the others.
    try:
        return OK, function(*args)
    except Refusal as refusal:
        return str(refusal), None
    except Exception as error:
        return f"failed: {error_text(error)}", None


def error_text(error: Exception) -> str:
    """Return type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(descriptor: str, module: str = "sys", tree: str = "") -> None:
    # Inductor's pool of processes would compile while another provider takes its turn.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if tree:
        sys.path.insert(0, tree)
    importlib.import_module(module)
    with suppress(EOFError, OSError), Connection(int(descriptor)) as pipe:
        while True:
            pipe.send(reply_to(*pipe.recv()))


if __name__ == "__main__":
    main(*sys.argv[1:])
