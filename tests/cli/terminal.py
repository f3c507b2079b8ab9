"""The command line on a terminal: in this process, or in one that can be typed to."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from fastrag.cli import main
from fastrag.terminal import columns
from tests.cli.commands import ENVIRONMENT

COLUMNS = 80
_CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-Z]")  # moves, which take no column


def shown(*arguments: str) -> str:
    """Return the output of a successful command on a terminal of 80 columns."""
    master, slave = pty.openpty()
    _resize(slave)
    printed: list[str] = []

    def read() -> None:
        while data := _read(master):
            printed.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(COLUMNS))
        with os.fdopen(slave, "w", encoding="utf-8") as file:
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            status = main(arguments)
    reader.join()
    os.close(master)
    assert status == 0, "".join(printed)
    return "".join(printed)


class Terminal:
    """A process of fastrag on a pseudo-terminal of 80 columns; a context manager that ends it.

    Args:
        folder: its working directory.
        arguments: of the command.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES")}
        command = [sys.executable, "-m", "fastrag.cli", *arguments]
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            _resize(0)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
            state = {"TERM": "xterm", "XDG_STATE_HOME": str(folder / "state")}
            os.execve(command[0], command, environment | state)
        self.printed = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._terminal)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._terminal, keys.encode())

    def interrupt(self, then: str) -> str:
        """Press Ctrl-C until a text is printed, and return everything printed up to it.

        Python's `input` can miss a signal: one that arrives after readline has taken a key and
        before it waits for the next one is only seen at the next key. One that arrives with a key
        discards that key, for which readline then waits: read the echo of what was typed first.
        """
        while True:
            self.type("\x03")
            if self._comes(then, within=10):
                return self.read_to(then)

    def read_to(self, text: str) -> str:
        """Return everything printed since the last call, up to and with a text."""
        assert self._comes(text, within=300), f"{text!r} did not come, this did: {self.printed}"
        shown, found, self.printed = self.printed.partition(text)
        return shown + found

    def read_all(self) -> str:
        """Return everything printed until the process ends; it must succeed."""
        while self._read():
            pass
        assert os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]) == 0, self.printed
        return self.printed

    def _comes(self, text: str, within: float) -> bool:
        end = time.monotonic() + within
        while text not in self.printed:
            if not select.select([self._terminal], [], [], max(0, end - time.monotonic()))[0]:
                return False
            if not self._read():
                return False
        return True

    def _read(self) -> bool:
        data = _read(self._terminal)
        self.printed += data
        return bool(data)


def _resize(terminal: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 1 << 16).decode(errors="replace")
    except OSError:  # how Linux ends a pseudo-terminal
        return ""


def widest(printed: str) -> int:
    """Columns of the widest line, each state of a progress bar being one."""
    return max(map(columns, re.split(r"[\r\n]", _CURSOR.sub("", printed))))
