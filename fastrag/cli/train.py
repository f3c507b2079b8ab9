"""`fastrag train`: train from a YAML config."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastrag.cli.output import print_metrics, quiet


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    train = commands.add_parser("train", help="train from a YAML config")
    train.add_argument("config", help="YAML file of settings")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="continue the run in output_dir, from its newest or from this checkpoint",
    )
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastrag.train.config import RagConfig

    config = RagConfig.load(arguments.config, arguments.set)
    quiet()
    from fastrag.train.distributed import leave_processes
    from fastrag.train.run import train_run

    try:
        trainer = train_run(config, arguments.resume)
    except KeyboardInterrupt as error:
        if getattr(error, "checkpoint", None):
            error.add_note(_resume_command(arguments))
        raise
    leave_processes(trainer)
    if not trainer.is_world_process_zero():
        return 0
    if trainer.last_evaluation is not None:
        print_metrics(trainer.last_evaluation)
    state = trainer.state
    best = f" (of step {state.best_global_step}, the best by {config.best_metric})"
    print(f"model: {config.output_dir}/model{best if state.best_model_checkpoint else ''}")
    return 0


def _resume_command(arguments: argparse.Namespace) -> str:
    settings = "".join(f" --set {each}" for each in arguments.set)
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # as torchrun says
    command = "fastrag train"
    if processes != "1":
        command = f"torchrun --standalone --nproc-per-node {processes} -m fastrag.cli train"
    return f"resume with: {command} {arguments.config}{settings} --resume"
