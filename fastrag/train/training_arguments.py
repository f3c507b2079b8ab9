"""The `transformers.TrainingArguments` that a RagConfig stands for."""

from __future__ import annotations

import enum
import importlib.util
import inspect
import typing
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.utils import is_torch_bf16_gpu_available

from fastrag.messages import reason, shown
from fastrag.train.distributed import check_processes
from fastrag.train.settings import coerce, require_word, unknown

if TYPE_CHECKING:
    from fastrag.train.config import RagConfig

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one of ARM
# What a schedule is given by the trainer.
_FROM_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps")
# The types that `coerce` knows; an Enum of transformers stands next to the text that names it.
_PLAIN = (bool, int, float, str, list, dict, type(None), enum.Enum)


def training_arguments(config: RagConfig) -> TrainingArguments:
    """See `RagConfig.training_arguments`."""
    report_to = config.report_to
    if report_to is None:
        report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    else:
        _check_reporters(report_to)
    evaluate = config.eval_questions is not None and config.eval_steps is not None
    best = config.best_metric is not None and evaluate
    save_steps = config.eval_steps if best else config.save_steps
    values: dict[str, Any] = {
        "output_dir": config.output_dir,
        "max_steps": -1 if config.steps is None else config.steps,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.generator_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_betas[0],
        "adam_beta2": config.adam_betas[1],
        "lr_scheduler_type": config.lr_scheduler,
        "lr_scheduler_kwargs": dict(config.lr_scheduler_kwargs),
        "warmup_steps": config.warmup,
        "max_grad_norm": config.max_grad_norm,
        "label_smoothing_factor": config.label_smoothing,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": config.eval_steps,
        "save_strategy": "no" if save_steps is None else "steps",
        "save_steps": save_steps or 1,  # with "no" it is not read, but has to be a number
        "save_total_limit": config.keep_checkpoints,
        "load_best_model_at_end": best,
        "metric_for_best_model": f"eval_{config.best_metric}" if best else None,
        "greater_is_better": config.best_metric != "loss" if best else None,
        "logging_strategy": "steps",
        "logging_steps": config.log_steps,
        "logging_nan_inf_filter": False,  # it hides NaN losses and waits for the device
        "report_to": report_to or "none",
        "seed": config.seed,
        # said to transformers, which else forms no group of processes without a GPU
        "use_cpu": config.device == "cpu" or not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": False,
        "restore_callback_states_from_checkpoint": config.early_stopping is not None,
        # without a GPU, torch warns at every start of a data loader
        "dataloader_pin_memory": config.device != "cpu" and torch.cuda.is_available(),
    }
    _check_schedule(config.lr_scheduler, config.lr_scheduler_kwargs)
    values |= _further(config.training)
    _check_precision(values)
    try:
        args = TrainingArguments(**values)
    except Exception as error:  # its code for each field raises what it happens to
        raise ValueError(
            f"training: expected values for TrainingArguments: {reason(error)}"
        ) from error
    check_processes(args)
    return args


def _further(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields under `training`, brought to type.

    transformers takes a text for a number, and for a mapping a number, which it opens as a file.
    """
    hints = typing.get_type_hints(TrainingArguments)
    values = {}
    for key, value in settings.items():
        if key not in hints:
            raise ValueError(unknown(key, hints, prefix="training."))
        options = typing.get_args(hints[key]) or (hints[key],)
        kinds = [typing.get_origin(option) or option for option in options]
        plain = all(isinstance(kind, type) and issubclass(kind, _PLAIN) for kind in kinds)
        empty = value == "" and str in kinds  # which some fields mean, and settings of ours do not
        values[key] = coerce(f"training.{key}", value, hints[key]) if plain and not empty else value
    return values


def _check_precision(values: dict[str, Any]) -> None:
    # transformers would speak of its own fields, or find the mistake when everything is loaded
    on_cpu = values["use_cpu"]
    if values["fp16"] and on_cpu:
        raise ValueError("precision: expected fp32 or bf16 on a CPU, got 'fp16'")
    if values["bf16"] and not on_cpu and not is_torch_bf16_gpu_available():
        raise ValueError("precision: expected fp32 or fp16 on a GPU without bfloat16, got 'bf16'")
    if values["bf16"] and on_cpu and _emulates_bf16():
        warnings.warn(
            "precision: bf16 is many times slower than fp32 on this CPU, which has no instructions "
            "for it",
            stacklevel=2,
        )


def _emulates_bf16() -> bool:
    """Whether this CPU is known to have no instructions that multiply in bfloat16."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = [known[name] for name in _BF16_INSTRUCTIONS if name in known]
    return bool(found) and not any(found)


def _check_schedule(name: str, settings: dict[str, Any]) -> None:
    # transformers would find the mistake when everything is loaded
    require_word("lr_scheduler", name, [each.value for each in SchedulerType])
    schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = inspect.signature(schedule).parameters
    taken = [each for each in parameters if each not in _FROM_TRAINER]
    for key in settings:
        if key not in taken and "kwargs" not in taken:
            raise ValueError(unknown(key, taken, prefix="lr_scheduler_kwargs."))
    tried = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(name, tried, 0, 10**6, scheduler_specific_kwargs=settings)
    except Exception as error:  # transformers checks no value, so that arithmetic raises anything
        raise ValueError(
            f"lr_scheduler_kwargs: expected settings of {name}, got {shown(settings)} "
            f"({reason(error)})"
        ) from error


def _check_reporters(names: list[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in (*installed, "all", "none"):
            raise ValueError(
                f"report_to: expected reporters that are installed here "
                f"({', '.join(installed) or 'none'}), got {shown(name)}"
            )
