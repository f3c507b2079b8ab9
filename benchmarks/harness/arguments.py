"""The options that several commands share: a bad argument is one line and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.harness.measure import free_memory
from benchmarks.harness.registry import DEVICES, DTYPES, Op, Shape, shape_text
from benchmarks.harness.results import COLUMNS
from benchmarks.harness.timing import Case

DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULT_ROUNDS = {"cpu": 5, "cuda": 20}
LARGEST = (1 << 31) - 1  # number of a shape
GIB = 1 << 30


def by_device(defaults: Mapping[str, object]) -> str:
    """Return how --help describes a default that depends on the device."""
    return f"default: {defaults['cpu']} on a CPU, {defaults['cuda']} on a GPU"


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
        return text

    return read


def at_least_one(text: str) -> int:
    if not text.lstrip("-").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return number


def folder(text: str) -> Path:
    """Read a folder that exists or can be made, and written to."""
    there = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {there}")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """The parser of `python -m benchmarks.NAME`, whose docstring is `about`."""

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(prog=f"benchmarks.{name}", description=(about or "").partition("\n")[0])

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")

    def add_problem(self, *, several: bool = False) -> None:
        """Add the options that describe a problem: --shape, --mode, --dtype, --device."""
        nargs = "+" if several else None
        self.add_argument("--shape", nargs=nargs, help="such as 2,5,32,512,50265; default: sweep")
        self.add_argument("--mode", "--marginal", nargs=nargs, help="of the op's modes")
        help_of_dtype = f"one of {', '.join(DTYPES)}; {by_device(DEFAULT_DTYPE)}"
        self.add_argument("--dtype", type=one_of(list(DTYPES)), help=help_of_dtype)
        help_of_device = "cpu or cuda; default: cuda if there is one"
        self.add_argument("--device", type=one_of(DEVICES), help=help_of_device)

    def add_rounds(self) -> None:
        help_of_rounds = f"turns that count; {by_device(DEFAULT_ROUNDS)}"
        self.add_argument("--rounds", type=at_least_one, help=help_of_rounds)

    def add_csv(self, columns: Sequence[str] = COLUMNS) -> None:
        """Add --csv, a file that rows of these columns can be added to."""

        def read(text: str) -> Path:
            head = ",".join(columns)
            try:
                with Path(text).open("a+", encoding="utf-8") as file:  # made if it is not there
                    file.seek(0)
                    content = file.read()
            except OSError as error:
                raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
            if content and not (content.startswith(f"{head}\n") and content.endswith("\n")):
                expected = f"expected a file with the columns {head}"
                raise argparse.ArgumentTypeError(f"{expected}, got {text}")
            return Path(text)

        self.add_argument("--csv", type=read, help="file to add the rows to")

    def complete(self, args: argparse.Namespace) -> None:
        """Check the device and FASTRAG_BACKEND, and set the defaults that depend on the device."""
        from fastrag.ops.backends import BACKEND_VARIABLE, names

        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("--device: torch sees no CUDA device")
        args.dtype = args.dtype or DEFAULT_DTYPE[args.device]
        if "rounds" in args:
            args.rounds = args.rounds or DEFAULT_ROUNDS[args.device]
        asked = os.environ.get(BACKEND_VARIABLE, "")
        if asked and asked not in names():
            self.error(f"{BACKEND_VARIABLE}: no backend is called {asked!r}; {', '.join(names())}")

    def check_mode(self, op: Op, mode: str) -> None:
        if mode not in op.modes:
            self.error(f"{op.name} has no mode {mode!r}; modes: {', '.join(op.modes)}")

    def shape(self, op: Op, text: str) -> Shape:
        """Read a shape of the op, such as 2,5,32,512,50265."""
        numbers = text.split(",")
        if len(numbers) != len(op.dims) or not all(n.isascii() and n.isdigit() for n in numbers):
            self.error(f"--shape: expected {','.join(op.dims)}, got {text!r}")
        shape = tuple(map(int, numbers))
        if not all(0 < n <= LARGEST for n in shape):
            self.error(f"--shape: expected positive numbers, at most {LARGEST}, got {text!r}")
        return shape

    def check_size(self, args: argparse.Namespace, op: Op, mode: str, shape: Shape) -> None:
        """Check that the op knows such sizes, and that inputs and outputs fit into memory.

        A problem that is too large would make the system end processes, not only ours.
        """
        try:
            least = op.bytes(mode, shape, DTYPES[args.dtype].itemsize)
        except ValueError as error:
            self.error(f"--shape: {error}")
        free = free_memory(torch.device(args.device))
        if least > free:
            self.error(
                f"--shape: expected inputs and outputs of at most {free / GIB:.1f} GiB, which are "
                f"free, got {shape_text(shape)} with {least / GIB:.1f}"
            )

    def names(self, text: str | None, known: Sequence[str], what: str) -> list[str]:
        """Read names separated by commas, each once; all that are known if there is no text."""
        names = list(known) if text is None else list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                self.error(f"{what} {name!r}; known: {', '.join(known)}")
        return names

    def parse_cases(
        self, argv: Sequence[str] | None, op: Op, known: Sequence[str], columns: Sequence[str]
    ) -> tuple[argparse.Namespace, list[Case]]:
        """Add and read the options of a command about one op at one point.

        Returns the arguments and a case for each provider that was asked for, of those `known`.
        """
        self.add_argument("--providers", help=f"some of {','.join(known)}; default: all")
        self.add_problem()
        self.add_csv(columns)
        args = self.parse_args(argv)
        self.complete(args)
        mode = args.mode or op.modes[0]
        self.check_mode(op, mode)
        names = self.names(args.providers, known, "no provider is called")
        shape = op.sweep(args.device, mode)[0]
        if args.shape:
            shape = self.shape(op, args.shape)
            self.check_size(args, op, mode, shape)
        return args, [Case(op.name, name, mode, shape, args.dtype, args.device) for name in names]
