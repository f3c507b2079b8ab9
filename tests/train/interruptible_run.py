"""A training run in a process of its own, for tests that send it signals.

    python interruptible_run.py RUN_FOLDER [--resume] [--marker-step N] [--hang-in-save N]

It makes the file `marker` in the run folder while step N is under way and then waits in that step
until the signal has come (for SIGKILL: for good). With --hang-in-save it stops in the middle of
writing checkpoint N instead; with --signal-rank that rank signals itself in step 3.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainingArguments

from fastrag.train import RagTrainer, SignalCallback, TrainingInterrupted

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import tiny  # noqa: E402


class Marker(TrainerCallback):
    """Makes the marker in step N, and keeps the step going until a signal has come."""

    def __init__(self, trainer: RagTrainer, step: int) -> None:
        self.trainer = trainer
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            Path(args.output_dir, "marker").touch()
            while not self.interrupted():
                time.sleep(0.01)

    def interrupted(self) -> bool:
        return any(
            isinstance(each, SignalCallback) and each.guard.received is not None
            for each in self.trainer.callback_handler.callbacks
        )


class SignalItself(TrainerCallback):
    """Sends SIGTERM to this process in step 3."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--marker-step", type=int, default=0)
    parser.add_argument("--hang-in-save", type=int, default=0)
    parser.add_argument("--signal-rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    model = tiny.rag_model(train_passage_encoder=True, explore=1)
    args = TrainingArguments(
        options.folder,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        learning_rate=5e-3,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RagTrainer(model, args, tiny.collator(), tiny.questions(), refresh="every:2")
    trainer.add_callback(Marker(trainer, options.marker_step))
    if options.signal_rank == args.process_index:
        trainer.add_callback(SignalItself())
    if options.hang_in_save:
        save_rng_state = trainer._save_rng_state

        def hang(folder: str) -> None:
            if trainer.state.global_step == options.hang_in_save:
                Path(options.folder, "marker").touch()
                time.sleep(600)
            save_rng_state(folder)

        trainer._save_rng_state = hang
    try:
        trainer.train(resume_from_checkpoint=options.resume)
    except TrainingInterrupted as interrupted:
        sys.stdout.write(f"{interrupted}\n")
        return interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
