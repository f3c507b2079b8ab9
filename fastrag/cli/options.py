"""Options that several commands have, and what they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastrag.cli.output import one_line, quiet

if TYPE_CHECKING:
    from fastrag.nn import RagModel


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, run folder or checkpoint")
    parser.add_argument("--index", help="folder from `fastrag index build`")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 …; default: a GPU if there is one")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def device_of(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device}: {one_line(error)}") from error
    return str(arguments.device)


def load_model(arguments: argparse.Namespace) -> RagModel:
    quiet()
    from fastrag.train.load import load_run

    model = load_run(arguments.model, arguments.index)
    device = device_of(arguments)
    model.to(device)
    model.index.to(device)
    model.passages.to(device)
    return model
