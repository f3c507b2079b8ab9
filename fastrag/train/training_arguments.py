"""The `transformers.TrainingArguments` that a RagConfig stands for."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from fastrag.train.settings import unknown

if TYPE_CHECKING:
    from fastrag.train.config import RagConfig


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
        "use_cpu": config.device == "cpu",
        "remove_unused_columns": False,
        "disable_tqdm": False,
        "restore_callback_states_from_checkpoint": config.early_stopping is not None,
        # without a GPU, torch warns at every start of a data loader
        "dataloader_pin_memory": config.device != "cpu" and torch.cuda.is_available(),
    }
    known = {each.name: each for each in dataclasses.fields(TrainingArguments)}
    for key in config.training:
        if key not in known:
            raise ValueError(unknown(str(key), known, prefix="training."))
    return TrainingArguments(**{**values, **config.training})


def _check_reporters(names: list[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in (*installed, "all", "none"):
            raise ValueError(
                f"report_to: expected reporters that are installed here "
                f"({', '.join(installed) or 'none'}), got {name!r}"
            )
