"""Training: RagTrainer on transformers.Trainer, the run's config, callbacks and checkpoints.

Names load on first use, so that reading a config does not import transformers.Trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrag.train.batches import count_label_tokens
    from fastrag.train.callbacks import (
        CurveCallback,
        MetricsFileCallback,
        RefreshCallback,
        TerminalCallback,
    )
    from fastrag.train.config import RagConfig
    from fastrag.train.indexing import build_index
    from fastrag.train.models import build_collator, build_model, load_run
    from fastrag.train.optimizer import parameter_groups
    from fastrag.train.plots import plot_curve
    from fastrag.train.run import train_run
    from fastrag.train.signals import SignalCallback, TrainingInterrupted
    from fastrag.train.trainer import RagTrainer
    from fastrag.train.warmup import warm_up

_HOMES = {
    "CurveCallback": "callbacks",
    "MetricsFileCallback": "callbacks",
    "RagConfig": "config",
    "RagTrainer": "trainer",
    "RefreshCallback": "callbacks",
    "SignalCallback": "signals",
    "TerminalCallback": "callbacks",
    "TrainingInterrupted": "signals",
    "build_collator": "models",
    "build_index": "indexing",
    "build_model": "models",
    "count_label_tokens": "batches",
    "load_run": "models",
    "parameter_groups": "optimizer",
    "plot_curve": "plots",
    "train_run": "run",
    "warm_up": "warmup",
}

__all__ = [
    "CurveCallback",
    "MetricsFileCallback",
    "RagConfig",
    "RagTrainer",
    "RefreshCallback",
    "SignalCallback",
    "TerminalCallback",
    "TrainingInterrupted",
    "build_collator",
    "build_index",
    "build_model",
    "count_label_tokens",
    "load_run",
    "parameter_groups",
    "plot_curve",
    "train_run",
    "warm_up",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
