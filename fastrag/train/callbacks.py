"""Callbacks of a training run: index refresh, checkpoints, metrics file, curve, terminal lines.

`RagTrainer` adds all of them. A plain `transformers.Trainer` can use any but `CheckpointCallback`.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from fastrag import terminal
from fastrag.folders import replacing
from fastrag.train import checkpoint_contents, checkpoints

if TYPE_CHECKING:
    from fastrag.freshness import IndexRefresher

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
# A line has to fit 80 columns. Learning rates and speeds are in metrics.jsonl.
_TRAINING_LINE = ("loss", "prior_entropy", "kl", "unique_passages", "passages_cut", "staleness")
_TEXTS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:#.5g}",
    "prior_entropy": lambda value: f"entropy {value:.3f}",
    "kl": lambda value: f"kl {value:.3g}",
    "unique_passages": lambda value: f"unique {value}",
    "passages_cut": lambda value: f"cut {100 * value:.0f} %",
    "staleness": lambda value: f"stale {value:.2g}",
}
_METRIC = re.compile(r"eval_(?:(?P<questions>.+)_)?(?P<metric>recall@\d+|em|f1|loss)")
# Endings of names that are logged for metrics.jsonl only.
_NOT_IN_LINES = ("epoch", "total_flos", "_runtime", "_per_second", "_time", "_n_questions")


class RefreshCallback(TrainerCallback):
    """Call an `IndexRefresher` at the end of each step.

    Evaluation and saving follow, so both see the refreshed index. The refresher observes what the
    retriever returns for each micro-batch. Its figures are added to each log of a training loss.

    Args:
        refresher: the refresher.

    Example:
        >>> callback = RefreshCallback(IndexRefresher(model, "every:20"))   # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[callback], ...)                 # doctest: +SKIP
    """

    def __init__(self, refresher: IndexRefresher) -> None:
        self.refresher = refresher
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to observe the retriever."""
        if self._hook is None and self.refresher.active:
            self._hook = self.refresher.watch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call the refresher."""
        self.refresher.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures of the refresher, unless the trainer has done so."""
        if logs is not None and "loss" in logs:
            logs.update(self.refresher.summary(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop observing, and end the refresher's worker."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.refresher.close()


class CheckpointCallback(TrainerCallback):
    """Complete each checkpoint that transformers has written, and restore the best one's index.

    Args:
        refresher: the refresher of the index that checkpoints hold.
        keep: number of checkpoints to keep; None or 0: all.
    """

    def __init__(self, refresher: IndexRefresher, keep: int | None) -> None:
        self.refresher = refresher
        self.keep = keep

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the checkpoint and delete those beyond `keep`."""
        ranks = PartialState()
        ranks.wait_for_everyone()  # each rank writes its random state
        if args.should_save:
            run = Path(str(args.output_dir))
            checkpoints.finish(run / f"checkpoint-{state.global_step}")
            checkpoints.rotate(run, self.keep, state.best_model_checkpoint)
        ranks.wait_for_everyone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the index that the best checkpoint was evaluated with, if its model was loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            checkpoint_contents.check_files(best, checkpoint_contents.MODEL_FILES)
            checkpoint_contents.read_index(self.refresher.retriever, best)
            self.refresher.restart(state.global_step)


class MetricsFileCallback(TrainerCallback):
    """Write every log as one line of `metrics.jsonl` in the run folder.

    A resumed run first drops the lines after the step that it resumes from, so that no step is in
    the file twice.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._before: list[dict[str, Any]] | None = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step at which training starts, or start a new file."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0:
            kept = self._before or []
        else:
            kept = [each for each in read_metrics(self.path) if each["step"] <= state.global_step]
        self._before = None
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        with replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line. Lines that are logged before training are written when it starts."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step} | {key: _plain(value) for key, value in logs.items()}
        if self._before is not None:
            self._before.append(entry)
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class CurveCallback(TrainerCallback):
    """Plot loss, recall@k and EM over steps into the run folder, if matplotlib is installed.

    The curve is drawn after evaluations and at the end of training. During training, drawing takes
    at most a twentieth of the time.

    Args:
        metrics: the `metrics.jsonl` to draw from.
        path: the PNG to write.
    """

    def __init__(self, metrics: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        self.metrics = Path(metrics)
        self.path = Path(path)
        self._next = 0.0

    def draw(self) -> None:
        """Draw now."""
        from fastrag.train.plots import plot_curve

        start = time.monotonic()
        try:
            plot_curve(read_metrics(self.metrics), self.path)
        except OSError as error:  # a full disk: no reason to end a run
            warnings.warn(
                f"{self.path}: the curve is not drawn: {error.strerror or error}", stacklevel=2
            )
        now = time.monotonic()
        self._next = now + 20.0 * (now - start)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw unless the last drawing is too recent."""
        if state.is_world_process_zero and state.global_step and time.monotonic() >= self._next:
            self.draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        if state.is_world_process_zero:
            self.draw()
            self._next = 0.0  # an evaluation after training belongs to the picture as well


class TerminalCallback(ProgressCallback):
    """Show the progress bar of transformers, with one short line per log instead of a dict.

    Example:
        >>> TerminalCallback.line({"loss": 1.25, "grad_norm": 0.5, "epoch": 2.0}, step=30)
        'step 30  loss 1.2500'
        >>> TerminalCallback.line({"eval_em": 0.5, "epoch": 2.0}, step=30)
        'step 30  em 0.500'
    """

    training_bar: Any

    @staticmethod
    def line(logs: dict[str, Any], step: int) -> str:
        """Format one log.

        Args:
            logs: names and values.
            step: optimiser steps done.

        Returns:
            One line of text, or several where the terminal is too narrow for it.
        """
        parts = [f"step {step}"]
        if "loss" in logs:
            parts += [_TEXTS[name](logs[name]) for name in _TRAINING_LINE if name in logs]
        elif "train_runtime" in logs:
            parts.append(f"trained for {tqdm.format_interval(logs['train_runtime'])}")
        else:
            parts += _evaluation(logs)
        return "\n  ".join(terminal.wrap(parts, terminal.width() - 2, separator="  "))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and logs:
            tqdm.write(self.line(logs, state.global_step))

    def close(self) -> None:
        """Remove the bar after an error, so that the message starts on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def _evaluation(logs: dict[str, Any]) -> list[str]:
    parts = []
    for name, value in logs.items():
        if name.endswith(_NOT_IN_LINES):
            continue
        found = _METRIC.fullmatch(name)
        if found is None:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
            continue
        questions, metric = found["questions"], found["metric"]
        if questions and f"{questions}:" not in parts:
            parts.append(f"{questions}:")
        parts.append(f"loss {value:#.5g}" if metric == "loss" else f"{metric} {value:.3f}")
    return parts


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; a last line cut off by a killed process is left out.

    Args:
        path: the file; it need not exist.

    Returns:
        The entries in file order.

    Example:
        >>> read_metrics("no/such/metrics.jsonl")
        []
    """
    source = Path(path)
    if not source.is_file():
        return []
    entries = []
    for line in source.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def _plain(value: Any) -> Any:
    """Convert numpy and torch scalars for JSON; NaN and infinity become null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
