"""Evaluation: exact match, F1, recall@k, MRR, nDCG, and the loops that compute them."""

from __future__ import annotations

from fastrag.eval.calibration import Bin, Calibration, calibrate
from fastrag.eval.evaluate import EvalResult, Prediction, evaluate
from fastrag.eval.metrics import (
    bootstrap_interval,
    contains_answer,
    cover_match,
    exact_match,
    f1,
    ndcg_at,
    normalize_answer,
    recall_at,
    reciprocal_rank,
)
from fastrag.eval.retrieval import (
    BM25Retriever,
    DenseRetriever,
    PassageRetriever,
    Ranking,
    RetrievalResult,
    evaluate_retrieval,
)

__all__ = [
    "BM25Retriever",
    "Bin",
    "Calibration",
    "DenseRetriever",
    "EvalResult",
    "PassageRetriever",
    "Prediction",
    "Ranking",
    "RetrievalResult",
    "bootstrap_interval",
    "calibrate",
    "contains_answer",
    "cover_match",
    "evaluate",
    "evaluate_retrieval",
    "exact_match",
    "f1",
    "ndcg_at",
    "normalize_answer",
    "recall_at",
    "reciprocal_rank",
]
