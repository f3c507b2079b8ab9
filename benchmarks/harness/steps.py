"""What the commands about a training step share: their arguments, and a process for each provider.

Times and bytes of one provider are not to be those of another that ran before it.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arguments import Parser, check_mode, complete_device, shape_of
from benchmarks.harness.registry import DTYPES, Shape, error_of
from benchmarks.harness.worker import OK
from benchmarks.ops.rag_step import OP

PROVIDERS = ("fastrag", "hf")


def parser_of(command: str, about: str) -> Parser:
    parser = Parser(prog=f"benchmarks.{command}", description=about)
    parser.add_argument("--providers", help=f"some of {','.join(PROVIDERS)}; default: both")
    parser.add_argument("--mode", "--marginal", default="token", help=", ".join(OP.modes))
    parser.add_argument("--shape", help=f"{','.join(OP.dims)}; default: the first of the sweep")
    parser.add_argument("--dtype", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the arguments; providers and shape become tuples."""
    args = parser.parse_args(argv)
    complete_device(parser, args)
    check_mode(parser, OP, args.mode)
    names = tuple(dict.fromkeys(args.providers.split(","))) if args.providers else PROVIDERS
    for name in names:
        if name not in PROVIDERS:
            parser.error(f"no provider is called {name!r}; known: {', '.join(PROVIDERS)}")
    args.providers = names
    if args.shape:
        args.shape = shape_of(parser, OP, args.shape)
    else:
        args.shape = OP.sweep(args.device, args.mode)[0]
    if args.csv and not args.csv.absolute().parent.is_dir():
        parser.error(f"--csv: {args.csv.parent} is not a folder")
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


def new_process() -> ProcessPoolExecutor:
    """One process, started when it is first asked, that runs the functions it is given."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def ask(process: ProcessPoolExecutor, what: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """Returns "ok" and what a function returns in a process, or why it returns nothing, and None.

    What a provider raises is its result: the other goes on.
    """
    try:
        return OK, process.submit(what, *args).result()
    except BrokenProcessPool:
        return "failed: its process ended", None
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return f"failed: {type(error).__name__}: {text}", None
