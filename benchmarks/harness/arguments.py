"""What the commands of this folder share in reading their arguments: one line, and exit code 2."""

from __future__ import annotations

import argparse
import os
from typing import NoReturn

import torch

from benchmarks.harness.registry import DEVICES, DTYPES, Op, Shape

DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


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
    if 0 in shape:
        parser.error(f"--shape: expected positive numbers, got {text!r}")
    return shape
