"""The section `training` of a RagConfig: the fields of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import inspect
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.utils import is_torch_bf16_gpu_available

from fastrag.messages import reason, shown
from fastrag.ops.workspace import multiplies
from fastrag.train.distributed import check_processes
from fastrag.train.parsing import require, unknown

# Arguments that the trainer passes to a schedule.
_FROM_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps")


@dataclass
class TrainingConfig(TrainingArguments):
    """The fields of transformers.TrainingArguments, some with other defaults.

    The fields stay as they are written. `arguments` turns them into TrainingArguments, which
    choose a device and join a group of processes, when a run starts.

    Args:
        output_dir: run folder.
        per_device_train_batch_size: questions per device and forward pass.
        per_device_eval_batch_size: questions per device in an evaluation batch.
        gradient_accumulation_steps: forward passes per optimiser step.
        num_train_epochs: passes over the questions when max_steps is -1.
        max_steps: number of optimiser steps; -1 trains num_train_epochs.
        learning_rate: learning rate of the generator; null: 5e-5, or 2e-4 with LoRA. The
            retriever has its own, retriever.learning_rate.
        logging_steps: number of steps between two log lines.
        logging_nan_inf_filter: hide NaN losses, which waits for the device in every step.
        eval_strategy: when to evaluate during training: no, steps or epoch.
        eval_steps: number of steps between two evaluations, with eval_strategy steps.
        save_strategy: when to write a checkpoint: no (only after a signal), steps, epoch or best.
        save_steps: number of steps between two checkpoints, with save_strategy steps.
        save_total_limit: number of checkpoints to keep besides the best; null: all.
        load_best_model_at_end: end with the checkpoint that is best by metric_for_best_model.
        metric_for_best_model: loss, em, f1 or recall@k.
        seed: seed of all random numbers.
        use_cpu: train on the CPU even where there is a GPU.
        bf16: autocast to bfloat16.
        fp16: autocast to float16, with a loss scaler.
        report_to: where to report, for example [tensorboard]; null: TensorBoard if it is
            installed.
        disable_tqdm: show no progress bars.
        remove_unused_columns: must be false, because a question is more than its columns.
    """

    output_dir: str = "runs/rag"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float | None = None
    logging_steps: int | float = 10
    logging_nan_inf_filter: bool = False
    eval_strategy: str = "no"
    eval_steps: int | float | None = None
    save_strategy: str = "no"
    save_steps: int | float = 500
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    seed: int = 0
    use_cpu: bool = False
    bf16: bool = False
    fp16: bool = False
    report_to: None | str | list[str] = None
    disable_tqdm: bool = False
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        """Leave the fields as they are written, unlike TrainingArguments."""

    @classmethod
    def inherited(cls) -> set[str]:
        """Return the names of the fields that only TrainingArguments states."""
        return {each.name for each in dataclasses.fields(cls)} - cls.__annotations__.keys()

    def written(self) -> dict[str, Any]:
        """Return the fields stated by this class and those that differ from their defaults."""
        fields = dataclasses.fields(self)
        return {
            each.name: value.value if isinstance(value, enum.Enum) else value
            for each in fields
            if (value := getattr(self, each.name)) != _default(each)
            or each.name not in self.inherited()
        }

    def check(self) -> None:
        """Raise ValueError for a field that would fail late or be ignored."""
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*counts, "gradient_accumulation_steps"):
            _require(name, getattr(self, name) >= 1, "an integer >= 1", getattr(self, name))
        steps = self.max_steps
        _require("max_steps", steps == -1 or steps >= 1, "an integer >= 1 or -1", steps)
        epochs = self.num_train_epochs
        _require("num_train_epochs", 0.0 < epochs < float("inf"), "a number > 0", epochs)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, name)
            _require(name, 0.0 <= value < float("inf"), "a number >= 0", value)
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(name, 0.0 <= value < 1.0, "a number in [0, 1)", value)
        _require("seed", 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1", self.seed)
        limit = self.save_total_limit
        _require("save_total_limit", limit is None or limit >= 1, "an integer >= 1 or null", limit)
        for kind in ("eval", "save", "logging"):
            name = f"{kind}_steps"
            value = getattr(self, name)
            _require(name, value is None or value > 0, "a number > 0", value)
            strategy = getattr(self, f"{kind}_strategy")
            used = strategy == "steps" or value == _default(type(self).__dataclass_fields__[name])
            _require(f"{kind}_strategy", used, f"steps, since {name} is {shown(value)}", strategy)
        _require(
            "label_smoothing_factor",
            self.label_smoothing_factor == 0.0,
            "0, since loss.label_smoothing sets it",
            self.label_smoothing_factor,
        )
        resumed = self.resume_from_checkpoint
        _require("resume_from_checkpoint", resumed is None, "null, since --resume sets it", resumed)
        _require("remove_unused_columns", not self.remove_unused_columns, "false", True)

    def arguments(self, **forced: Any) -> TrainingArguments:
        """Make the TrainingArguments of a run.

        Args:
            forced: fields that follow from other settings.

        Returns:
            The arguments.

        Raises:
            ValueError: TrainingArguments refuses a value, a schedule or a reporter is unknown, or
                the device cannot compute in the precision.
        """
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if self.report_to is None:
            values["report_to"] = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
        else:
            _check_reporters(self.report_to)
        # without a GPU, transformers starts a process group only if use_cpu is set
        values["use_cpu"] = self.use_cpu or not torch.accelerator.is_available()
        # without a GPU, torch warns about pinned memory at every start of a data loader
        values["dataloader_pin_memory"] = self.dataloader_pin_memory and not values["use_cpu"]
        self._check_precision(on_cpu=values["use_cpu"])
        self._check_schedule()
        try:
            args = TrainingArguments(**values | forced)
        except Exception as error:  # each field is checked by code of its own
            raise ValueError(
                f"training: expected values for TrainingArguments: {reason(error)}"
            ) from error
        check_processes(args)
        return args

    def _check_precision(self, on_cpu: bool) -> None:
        # transformers finds these mistakes only when everything is loaded
        _require("fp16", not (self.fp16 and on_cpu), "false on a CPU", True)
        runs = not self.bf16 or on_cpu or is_torch_bf16_gpu_available()
        _require("bf16", runs, "false on a GPU without bfloat16", True)
        if self.bf16 and on_cpu and not multiplies(torch.bfloat16):
            warnings.warn(
                "training.bf16: many times slower than float32 on this CPU, which has no "
                "instructions for bfloat16",
                stacklevel=4,
            )

    def _check_schedule(self) -> None:
        # transformers finds these mistakes only when everything is loaded
        names = [each.value for each in SchedulerType]
        name = self.lr_scheduler_type
        name = name.value if isinstance(name, enum.Enum) else name
        _require("lr_scheduler_type", name in names, f"one of {', '.join(names)}", name)
        settings = self.lr_scheduler_kwargs or {}
        if isinstance(settings, str):  # transformers reads JSON
            raise ValueError(
                f"training.lr_scheduler_kwargs: expected a mapping, got {shown(settings)}"
            )
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        taken = [each for each in parameters if each not in _FROM_TRAINER]
        prefix = "training.lr_scheduler_kwargs."
        for key in settings:
            if key not in taken and "kwargs" not in taken:
                raise ValueError(unknown(f"{prefix}{key}", [prefix + each for each in taken]))
        tried = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            get_scheduler(name, tried, 0, 10**6, scheduler_specific_kwargs=settings)
        except Exception as error:  # transformers computes with unchecked values
            raise ValueError(
                f"training.lr_scheduler_kwargs: expected settings of {name}, got "
                f"{shown(settings)} ({reason(error)})"
            ) from error


def _require(name: str, holds: bool, expected: str, got: Any) -> None:
    require(f"training.{name}", holds, expected, got)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_reporters(names: str | Collection[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names:
        if name not in (*installed, "all", "none"):
            raise ValueError(
                f"training.report_to: expected reporters that are installed here "
                f"({', '.join(installed) or 'none'}), got {shown(name)}"
            )
