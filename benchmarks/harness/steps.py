"""What the commands about a training step share: their arguments, and a process for each provider.

Times and bytes of one provider are not to be those of another that ran before it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.harness.arguments import (
    DEFAULT_DTYPE,
    Parser,
    by_device,
    check_csv,
    check_mode,
    check_size,
    complete_device,
    names_of,
    shape_of,
)
from benchmarks.harness.registry import DTYPES, Shape, error_of
from benchmarks.harness.worker import OK
from benchmarks.ops.rag_step import OP

PROVIDERS = ("fastrag", "hf")
END_SECONDS = 10.0  # for a process to end by itself


def parser_of(command: str, about: str) -> Parser:
    parser = Parser(prog=f"benchmarks.{command}", description=about)
    parser.add_argument("--providers", help=f"some of {','.join(PROVIDERS)}; default: both")
    parser.add_argument("--mode", "--marginal", default="token", help=", ".join(OP.modes))
    parser.add_argument("--shape", help=f"{','.join(OP.dims)}; default: the first of the sweep")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)}; {by_device(DEFAULT_DTYPE)}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--csv", type=Path, help="file to add the rows to")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None, columns: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; providers and shape become tuples. `columns` are those of --csv."""
    args = parser.parse_args(argv)
    complete_device(parser, args)
    check_mode(parser, OP, args.mode)
    args.providers = tuple(names_of(parser, args.providers, PROVIDERS, "no provider is called"))
    if args.shape:
        args.shape = shape_of(parser, OP, args.shape)
        check_size(parser, args, OP, args.mode, args.shape)
    else:
        args.shape = OP.sweep(args.device, args.mode)[0]
    check_csv(parser, args.csv, columns)
    return args


def make_step(provider: str, mode: str, shape: Shape, dtype: str, device: str) -> Any:
    """Returns the step of a provider that is correct at the tiny shape.

    Raises:
        ValueError: it is not; or a width that no models are known for.
    """
    chosen, on = OP.provider(provider), torch.device(device)
    wrong = error_of(OP, chosen, mode, OP.checked[0], dtype, on)
    if wrong:
        raise ValueError(f"wrong: {wrong}")
    return chosen.setup(mode, OP.make(shape, DTYPES[dtype], 0, on))


class Process:
    """Runs the functions it is given, one after the other; ends with its context, whatever it does.

    What a provider raises is its result, and its death too: the others go on.
    """

    def __enter__(self) -> Process:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.child = context.Process(target=_serve, args=(other,), daemon=True)
        # Ctrl-C reaches the parent alone, which ends it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.child.start()
        finally:
            signal.signal(signal.SIGINT, before)
        other.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pipe.close()
        if kind is None:  # it waits for a function, and has the end of the pipe instead
            self.child.join(END_SECONDS)
        self.child.kill()
        self.child.join()

    def ask(self, what: Callable[..., Any], *args: Any) -> tuple[str, Any]:
        """Returns "ok" and what the function returns, or why it returns nothing, and None."""
        try:
            self.pipe.send((what, args))
            reply: tuple[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            self.child.join()
            return f"failed: its process ended with code {self.child.exitcode}", None
        return reply


def _serve(pipe: Connection) -> None:
    while True:
        try:
            what, args = pipe.recv()
            pipe.send(_reply(what, args))
        except (EOFError, OSError):  # the parent is gone
            return


def _reply(what: Callable[..., Any], args: Sequence[Any]) -> tuple[str, Any]:
    try:
        return OK, what(*args)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return f"failed: {type(error).__name__}: {text}", None
