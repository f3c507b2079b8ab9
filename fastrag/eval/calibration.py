"""Calibration of the prior: is p(z|x) the probability that passage z is right?

Each retrieved passage of each question is one case: its probability p(z_k|x), and whether it is
right. The cases are sorted into M bins of equal width by their probability:

    confidence(m) = mean of p(z_k|x) in bin m,    accuracy(m) = share of right passages in bin m
    ECE = sum over m of n_m / N |accuracy(m) - confidence(m)|
                                      (Naeini et al. 2015; Guo et al. 2017, sec. 2)

The prior of a question sums to one over its K passages, so it can be calibrated only where about
one of them is right. If several hold the answer, or none does, accuracy and confidence must differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastrag.eval.metrics import bootstrap_interval
from fastrag.messages import shown


@dataclass(frozen=True, slots=True)
class Bin:
    """The passages whose probability is in (low, high]; the first bin has those at 0 as well.

    Attributes:
        low, high: ends of the bin.
        n: number of passages.
        confidence: mean of their probabilities; NaN without passages.
        accuracy: share of them that is right; NaN without passages.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Reliability table of probabilities and the expected calibration error (ECE).

    Attributes:
        bins: the reliability table.
        ece: expected calibration error, in [0, 1].
        sums: for each question and bin, the number of passages, the sum of their probabilities and
            the number of right ones, `[Q, M, 3]`.
    """

    bins: tuple[Bin, ...]
    ece: float
    sums: np.ndarray[Any, Any] = field(repr=False, compare=False)

    def interval(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile bootstrap interval of the ECE over questions.

        Args:
            n, seed, level: as in `bootstrap_interval`.

        Returns:
            Lower and upper end. The ECE of a sample is biased upwards, so the interval may lie
            above `ece` if there are few questions.
        """
        return bootstrap_interval(self.sums, n, seed, level, statistic=_ece)


def calibrate(
    probabilities: Sequence[Sequence[float]], right: Sequence[Sequence[bool]], n_bins: int = 10
) -> Calibration:
    """Compare probabilities of passages with whether the passages are right.

    Args:
        probabilities: for each question, p(z_k|x) of its passages, in [0, 1].
        right: for each question and passage, whether it is right.
        n_bins: M, at least 1.

    Returns:
        The reliability table and the ECE.

    Raises:
        ValueError: no passage, other lengths, a number outside [0, 1], or n_bins < 1.

    Example:
        >>> found = calibrate([[0.75, 0.25], [0.75, 0.25]], [[True, False], [False, True]])
        >>> found.ece, found.bins[7].accuracy
        (0.25, 0.5)
    """
    if n_bins < 1:
        raise ValueError(f"n_bins: expected an integer >= 1, got {shown(n_bins)}")
    if [len(each) for each in probabilities] != [len(each) for each in right]:
        raise ValueError("right: expected one value for each of the probabilities, got other sizes")
    highs = np.arange(1, n_bins + 1) / n_bins
    sums = np.zeros((len(probabilities), n_bins, 3))
    for question, (row, judged) in enumerate(zip(probabilities, right, strict=True)):
        for p, is_right in zip(row, judged, strict=True):
            if not 0.0 <= p <= 1.0 + 1e-6:
                raise ValueError(f"probabilities: expected numbers in [0, 1], got {shown(p)}")
            place = min(int(np.searchsorted(highs, p)), n_bins - 1)
            sums[question, place] += (1.0, p, is_right)
    total = sums.sum(axis=0)
    if not total[:, 0].any():
        raise ValueError("probabilities: expected at least one passage, got none")
    bins = tuple(
        Bin(
            i / n_bins,
            (i + 1) / n_bins,
            int(n),
            float(p / n) if n else float("nan"),
            float(hits / n) if n else float("nan"),
        )
        for i, (n, p, hits) in enumerate(total)
    )
    return Calibration(bins, _ece(total[None]), sums)


def _ece(sums: np.ndarray[Any, Any]) -> float:
    """Return sum_m |right_m - p_m| / N, which is the ECE, of sums `[Q, M, 3]`."""
    n, p, right = sums.sum(axis=0).T
    return float(np.abs(right - p).sum() / max(n.sum(), 1.0))
