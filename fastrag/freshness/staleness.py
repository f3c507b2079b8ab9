"""Staleness: how far stored vectors are from those that the present encoder would make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.freshness.ledger import RowLedger
from fastrag.index.encoding import encode_passages
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.nn.retriever import Retriever

# A correction that is this many steps old counts half: staleness itself changes within N/r steps.
MEMORY_STEPS = 16
# Uniformly drawn passages (with their weights) from which the estimate counts as known.
MIN_SAMPLES = 16.0
N_AGE_BINS = 10


@dataclass(frozen=True)
class Staleness:
    """A measurement of `IndexRefresher.staleness`.

    Attributes:
        n_passages: number of passages that were encoded for it.
        drift: mean of 1 - cos(stored vector, fresh vector); stored vectors as a search sees them,
            that is mapped, if a map is in use.
        overlap: share of the k nearest passages that stay among them with fresh vectors.
        rank_correlation: Spearman's correlation between stored and fresh scores of the candidates.
        k: k of the overlap.
        ages: number of passages in each of ten equal ranges of age, youngest first.
        oldest: age of the oldest vector, in optimiser steps.
    """

    n_passages: int
    drift: float
    overlap: float
    rank_correlation: float
    k: int
    ages: tuple[int, ...]
    oldest: int


def drift_of(stored: Tensor, fresh: Tensor) -> Tensor:
    """Return 1 - cosine of vectors `[..., D]`; 0 where both are equal."""
    cosine = torch.nn.functional.cosine_similarity(stored.double(), fresh.double(), dim=-1)
    return (1.0 - cosine).clamp(0.0, 2.0).float()


def rank_correlation(stale: Tensor, fresh: Tensor) -> Tensor:
    """Return Spearman's correlation of two sets of scores of each question, `[B]`.

        1 - 6 sum d^2 / (K (K^2 - 1)),  d = difference of ranks

    Args:
        stale: `[B, K]`; K of at least 2. Of equal scores the earlier ranks first.
        fresh: `[B, K]`.

    Example:
        >>> rank_correlation(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]]))
        tensor([0.5000])
    """
    k = stale.shape[1]
    ranks = [
        each.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double()
        for each in (stale, fresh)
    ]
    return (1.0 - 6.0 * (ranks[0] - ranks[1]).square().sum(1) / (k * (k * k - 1))).float()


def age_histogram(ages: Tensor) -> tuple[int, ...]:
    """Count ages `[N]` in ten equal ranges from 0 to the largest."""
    top = int(ages.max()) if len(ages) else 0
    bins = ages.long() * N_AGE_BINS // (top + 1)
    return tuple(bins.bincount(minlength=N_AGE_BINS).tolist())


@torch.no_grad()
def measure(
    retriever: Retriever,
    rows: Tensor,
    query_emb: Tensor | None,
    n_candidates: int,
    k: int,
    batch_size: int,
) -> tuple[float, float, float, int]:
    """Encode passages and compare.

    Args:
        retriever: encoder, passages and index.
        rows: rows `[n]` whose drift is averaged.
        query_emb: questions `[B, D]`; None: overlap and correlation are NaN.
        n_candidates: nearest stored passages of each question that are encoded.
        k: k of the overlap.
        batch_size: passages per forward pass.

    Returns:
        Mean drift, overlap, rank correlation, and the number of encoded passages.

    Raises:
        ValueError: there is no passage encoder.
    """
    if retriever.passage_encoder is None:
        raise ValueError("passage_encoder: expected a module to encode passages, got None")
    found = rows.new_empty(0, 0)
    if query_emb is not None:
        query_emb = query_emb.detach().float().cpu()
        found = retriever.nearest(query_emb.to(retriever.index.device), n_candidates).rows.cpu()
    wanted = torch.cat([rows, found.flatten()]).unique()
    encoder: Any = retriever.passage_encoder
    dim = retriever.index.dim
    fresh = encode_passages(encoder, retriever.passages, batch_size, rows=wanted, dim=dim)
    stored = retriever.vectors(wanted)
    at = torch.searchsorted(wanted, rows)
    drift = float(drift_of(stored[at], fresh[at]).mean())
    if query_emb is None:
        return drift, math.nan, math.nan, len(wanted)
    places = torch.searchsorted(wanted, found)
    stale, true = (torch.einsum("bd,bld->bl", query_emb, each[places]) for each in (stored, fresh))
    k = min(k, found.shape[1])
    best = true.topk(k, dim=1).indices
    overlap = float((best < k).float().mean())  # the candidates are in the order of stored scores
    correlation = float(rank_correlation(stale, true).mean()) if found.shape[1] > 1 else 1.0
    return drift, overlap, correlation, len(wanted)


class DriftEstimate:
    """Estimate the mean drift of all passages from a few in each step.

        drift = mean_i p_i + mean_{j in S} (u_j - p_j)          (difference estimator)

    p_i is the ledger's prediction for row i and u_j the measured drift of rows S that are drawn
    uniformly. The expectation of the second mean is the mean error of the prediction, so the
    estimate is unbiased whatever the prediction is. A mean over the retrieved passages is not: they
    are those on which the encoder trains. The second mean is taken over the recent steps.
    """

    def __init__(self) -> None:
        self.reset()
        self._window: dict[str, list[float]] = {}

    def reset(self) -> None:
        """Forget the corrections, after all passages were encoded."""
        self._n = self._error = 0.0

    def sampled(self, drift: Tensor, predicted: Tensor) -> None:
        """Add the measured drift of uniformly drawn rows `[n]` and its prediction."""
        kept = 0.5 ** (1.0 / MEMORY_STEPS)
        self._n = kept * self._n + len(drift)
        self._error = kept * self._error + float((drift - predicted).sum())

    def saw(self, **figures: Tensor) -> None:
        """Add figures of a step `[n]` whose means `summary` reports."""
        for name, values in figures.items():
            total = self._window.setdefault(name, [0.0, 0.0])
            total[0] += float(values.sum())
            total[1] += values.numel()

    def mean(self, ledger: RowLedger, step: int, removed: Tensor | None = None) -> float | None:
        """Return the estimate, or None while too few passages were drawn."""
        if self._n < MIN_SAMPLES:
            return None
        predicted = ledger.predicted(step)
        if removed is not None:
            predicted = predicted[~removed]
        return max(0.0, float(predicted.mean()) + self._error / self._n)

    def summary(self) -> dict[str, float]:
        """Return the means of the figures since the last call."""
        means = {name: total / n for name, (total, n) in self._window.items() if n}
        self._window = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums that a resumed run needs."""
        window = {name: list(total) for name, total in self._window.items()}
        return {"sums": [self._n, self._error], "window": window}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: something is missing or of another kind; nothing is loaded.
        """
        try:
            n, error = map(float, state_dict["sums"])
            window = {str(name): [float(total), float(count)]
                      for name, (total, count) in state_dict["window"].items()}  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"drift: expected sums of two numbers and a window, got {shown(state_dict)}"
            ) from None
        self._n, self._error, self._window = n, error, window
