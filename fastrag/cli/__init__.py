"""The command `fastrag`: train, warmup, index, evaluate, ask, inspect, serve, info.

Each command has a module here, with `add` for its options. A mistake of the user is one line on
stderr and exit status 2; FASTRAG_DEBUG=1 shows the traceback. torch and transformers are imported
inside the functions that run a command, so that `fastrag --help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from fastrag import __version__
from fastrag.cli import ask, evaluate, index, info, inspect, serve, train, warmup
from fastrag.cli.output import one_line, show_warning
from fastrag.messages import clipped

USER_ERROR = 2
INTERRUPTED = 130
_USAGE_ERROR = 600  # characters: argparse quotes arguments whole


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, whatever the arguments are."""

    def error(self, message: str) -> NoReturn:
        said = clipped(message, _USAGE_ERROR)
        self.exit(USER_ERROR, f"{self.prog}: error: {said} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0, 2 after a user's mistake, 128 + n after signal n.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            if words[:1] == ["train"]:
                return train.run(words[1:])
            arguments = parser().parse_args(words)
            return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt as error:
        # TrainingInterrupted says which signal came and where the checkpoint is; its note says how
        # to resume
        for message in (str(error) or "interrupted", *getattr(error, "__notes__", ())):
            print(f"fastrag: {message}", file=sys.stderr)
        return getattr(error, "exit_code", INTERRUPTED)
    except BrokenPipeError:
        return 0  # the reader of the pipe, for example head, has closed it
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FASTRAG_DEBUG") == "1" or not _is_user_error(error):
            raise
        print(f"fastrag: error: {one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _is_user_error(error: Exception) -> bool:
    """Return whether the user can correct it; a RuntimeError only if a forced backend raised it."""
    if not isinstance(error, RuntimeError):
        return True
    from fastrag.ops.backends import BackendError

    return isinstance(error, BackendError)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the attribute `run` of its result runs the command."""
    whole = _Parser(
        prog="fastrag", description="End-to-end training of a retriever and a generator."
    )
    whole.add_argument("--version", action="version", version=f"fastrag {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for module in (train, warmup, index, evaluate, ask, inspect, serve, info):
        module.add(commands)
    return whole
