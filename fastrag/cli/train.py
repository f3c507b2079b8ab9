"""`fastrag train`: train from a YAML config and settings on the command line."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrag.cli.output import print_metrics, quiet

if TYPE_CHECKING:
    import jsonargparse

_PROG = "fastrag train"
_USAGE = "%(prog)s [-h] [--resume [CHECKPOINT]] CONFIG [--SETTING VALUE ...]"
_DESCRIPTION = (
    "Train from a YAML config. Every setting of the file can be given as an option as well, for "
    "example --retriever.n_docs 8."
)
_PRINT_CONFIG = "--print_config"
_TRAINING_HELP = "--training.help"


def add(commands: Any) -> None:
    """List the command. Its arguments are read by `parser`, which has an option per setting."""
    commands.add_parser("train", help="train from a YAML config", add_help=False)


def run(words: Sequence[str]) -> int:
    """Train with the settings of a file and of the command line.

    Args:
        words: the arguments after `fastrag train`.

    Returns:
        The exit status.
    """
    if _TRAINING_HELP in words:
        _show_training_help()
        return 0
    from fastrag.train.config import RagConfig
    from fastrag.train.parsing import explained

    settings = [word for word in words if word != _PRINT_CONFIG]
    try:
        given = parser().parse_args(settings, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(explained(error, RagConfig)) from None
    path, resume = given.pop("config"), given.pop("resume", False)
    config = RagConfig.load(path, given)
    if _PRINT_CONFIG in words:
        print(config.to_yaml(), end="")
        return 0
    quiet()
    from fastrag.train.distributed import leave_processes
    from fastrag.train.run import train_run

    try:
        trainer = train_run(config, resume)
    except KeyboardInterrupt as error:
        if getattr(error, "checkpoint", None):
            error.add_note(_resume_command([each for each in words if each != "--resume"]))
        raise
    leave_processes(trainer)
    if not trainer.is_world_process_zero():
        return 0
    if trainer.last_evaluation is not None:
        print_metrics(trainer.last_evaluation)
    state = trainer.state
    best = f" (of step {state.best_global_step}, the best by {config.best_metric})"
    folder = config.training.output_dir
    print(f"model: {folder}/model{best if state.best_model_checkpoint else ''}")
    return 0


def parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the command's arguments.

    It takes every field of TrainingArguments; its help lists those that `TrainingConfig` states.
    """
    from fastrag.train.config import RagConfig
    from fastrag.train.parsing import add_settings, make_parser
    from fastrag.train.training_config import TrainingConfig

    made = make_parser(prog=_PROG, usage=_USAGE, description=_DESCRIPTION)
    made.add_argument("config", metavar="CONFIG", help="YAML file of settings")
    made.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=argparse.SUPPRESS,
        metavar="CHECKPOINT",
        help="continue the run in training.output_dir, from its newest or from this checkpoint",
    )
    made.add_argument(
        _PRINT_CONFIG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the resolved settings as YAML and exit",
    )
    made.add_argument(
        _TRAINING_HELP,
        action="store_true",
        default=argparse.SUPPRESS,
        help="list all fields of transformers.TrainingArguments and exit; each is accepted",
    )
    add_settings(made, RagConfig, unlisted=TrainingConfig.inherited())
    return made


def _show_training_help() -> None:
    from fastrag.train.parsing import add_settings, make_parser
    from fastrag.train.training_config import TrainingConfig

    fields = make_parser(prog=_PROG, usage=_USAGE)
    add_settings(fields, TrainingConfig, prefix="training.")
    fields.print_help()


def _resume_command(words: Sequence[str]) -> str:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # as torchrun says
    command = _PROG
    if processes != "1":
        command = f"torchrun --standalone --nproc-per-node {processes} -m fastrag.cli train"
    return f"resume with: {command} {shlex.join(words)} --resume"
