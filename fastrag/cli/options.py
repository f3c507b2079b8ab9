"""Options that several commands have, and the model and device that they name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastrag.cli.output import quiet
from fastrag.messages import clipped, reason, shown

if TYPE_CHECKING:
    from fastrag.nn import RagModel


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, run folder or checkpoint")
    add_index(parser)
    add_prefix_cache(parser)


def add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", help="folder from `fastrag index build`")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")


def add_prefix_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prefix-cache-mib",
        type=positive,
        metavar="MIB",
        help="memory in which the generator keeps what it has read of passages; for a causal "
        "generator and a template with the passage first (default: none)",
    )


def positive(text: str) -> int:
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {shown(text)}")
    if len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer below 2**31, got {shown(text)}")
    return int(text)


def device_of(arguments: argparse.Namespace) -> str:
    import torch

    if arguments.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tried = torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {clipped(arguments.device)}: {reason(error)}") from error
    if tried.is_meta:
        raise ValueError("--device: expected one that computes, got meta")
    return str(arguments.device)


def load_model(arguments: argparse.Namespace, folder: str) -> RagModel:
    quiet()
    from fastrag.nn.prefix_cache import keep_prefixes
    from fastrag.train.models import load_run

    model = load_run(folder, arguments.index)
    keep_prefixes(model, arguments.prefix_cache_mib)
    device = device_of(arguments)
    model.to(device)
    model.index.to(device)
    model.passages.to(device)
    return model
