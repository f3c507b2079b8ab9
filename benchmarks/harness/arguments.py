"""What the commands of this folder share in reading their arguments: one line, and exit code 2."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.harness.measure import free_memory
from benchmarks.harness.registry import DEVICES, DTYPES, Op, Shape

DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
LARGEST = (1 << 31) - 1  # number of a shape
GIB = 1 << 30


def by_device(defaults: Mapping[str, object]) -> str:
    """What --help says of a default that differs."""
    return f"default: {defaults['cpu']} on a CPU, {defaults['cuda']} on a GPU"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def complete_device(parser: Parser, args: argparse.Namespace) -> None:
    """Checks and fills in --device and --dtype, and checks FASTRAG_BACKEND."""
    from fastrag.ops.backends import BACKEND_VARIABLE, NAMES

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device not in DEVICES:
        parser.error(f"--device: expected {' or '.join(DEVICES)}, got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    args.dtype = args.dtype or DEFAULT_DTYPE[args.device]
    if args.dtype not in DTYPES:
        parser.error(f"--dtype: expected one of {', '.join(DTYPES)}, got {args.dtype!r}")
    asked = os.environ.get(BACKEND_VARIABLE, "")
    if asked and asked not in NAMES:
        parser.error(f"{BACKEND_VARIABLE}: no backend is called {asked!r}; {', '.join(NAMES)}")


def check_mode(parser: Parser, op: Op, mode: str) -> None:
    if mode not in op.modes:
        parser.error(f"{op.name} has no mode {mode!r}; modes: {', '.join(op.modes)}")


def shape_of(parser: Parser, op: Op, text: str) -> Shape:
    """Reads a shape of the op, such as 2,5,32,512,50265."""
    numbers = text.split(",")
    if len(numbers) != len(op.dims) or not all(n.isascii() and n.isdigit() for n in numbers):
        parser.error(f"--shape: expected {','.join(op.dims)}, got {text!r}")
    shape = tuple(map(int, numbers))
    if not all(0 < n <= LARGEST for n in shape):
        parser.error(f"--shape: expected positive numbers, at most {LARGEST}, got {text!r}")
    return shape


def check_size(parser: Parser, args: argparse.Namespace, op: Op, mode: str, shape: Shape) -> None:
    """That the op knows such sizes, and that what it reads and writes fits into memory.

    A problem that is too large would have the system end processes, and not only ours.
    """
    try:
        least = op.bytes(mode, shape, DTYPES[args.dtype].itemsize)
    except ValueError as error:
        parser.error(f"--shape: {error}")
    free = free_memory(torch.device(args.device))
    if least > free:
        parser.error(
            f"--shape: expected inputs and outputs of at most {free / GIB:.1f} GiB, which are "
            f"free, got {','.join(map(str, shape))} with {least / GIB:.1f}"
        )


def names_of(parser: Parser, text: str | None, known: Sequence[str], what: str) -> list[str]:
    """Reads names with commas between them, each once; all that are known without a text."""
    if text is None:
        return list(known)
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            parser.error(f"{what} {name!r}; known: {', '.join(known)}")
    return names


def check_csv(parser: Parser, path: Path | None, columns: Sequence[str]) -> None:
    """That rows of these columns can be added to the file; before anything is measured."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        parser.error(f"--csv: {path.parent} is not a folder")
    if path.is_dir():
        parser.error(f"--csv: expected a file, got the folder {path}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        parser.error(f"--csv: {path} cannot be written")
    if not path.is_file() or not path.stat().st_size:
        return
    text = path.read_bytes()
    if text.partition(b"\n")[0] != ",".join(columns).encode() or not text.endswith(b"\n"):
        parser.error(
            f"--csv: rows are added to a file that has them, and {path} is not one of the columns "
            f"{','.join(columns)}"
        )
