"""Evaluation: exact match, F1, recall@k, and the loop that computes them for a model."""

from __future__ import annotations

from fastrag.eval.evaluate import EvalResult, Prediction, evaluate
from fastrag.eval.metrics import (
    bootstrap_interval,
    contains_answer,
    exact_match,
    f1,
    normalize_answer,
    recall_at,
)

__all__ = [
    "EvalResult",
    "Prediction",
    "bootstrap_interval",
    "contains_answer",
    "evaluate",
    "exact_match",
    "f1",
    "normalize_answer",
    "recall_at",
]
