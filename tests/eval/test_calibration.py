"""Reliability table and ECE against values worked out by hand and simulated ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastrag.eval import calibrate


def test_bins_and_ece_by_hand() -> None:
    found = calibrate([[0.9, 0.1], [0.8, 0.2, 0.0]], [[True, False], [False, False, True]], 5)
    low, second, third, fourth, high = found.bins
    assert (low.low, low.high, low.n, low.accuracy) == (0.0, 0.2, 3, pytest.approx(1 / 3))
    assert low.confidence == pytest.approx(0.1)
    assert second.n == third.n == 0 and math.isnan(third.confidence)
    assert (fourth.n, fourth.confidence, fourth.accuracy) == (1, 0.8, 0.0)  # a bin has its end
    assert (high.n, high.confidence, high.accuracy) == (1, 0.9, 1.0)
    assert found.ece == pytest.approx((3 * (1 / 3 - 0.1) + 0.8 + 0.1) / 5)
    # what is certain and right, or certainly wrong, is calibrated
    assert calibrate([[1.0, 0.0]], [[True, False]]).ece == 0.0
    assert calibrate([[1.0, 0.0]], [[False, True]]).ece == 1.0


def test_probabilities_that_hold_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    priors = rng.dirichlet([0.5] * 4, size=4000)
    drawn = np.array([rng.choice(4, p=p) for p in priors])
    right = np.eye(4, dtype=bool)[drawn]
    good = calibrate(priors.tolist(), right.tolist())
    assert good.ece < 0.02
    for each in good.bins:
        assert each.accuracy == pytest.approx(each.confidence, abs=0.06)
    sharper = priors**3 / (priors**3).sum(axis=1, keepdims=True)
    bad = calibrate(sharper.tolist(), right.tolist())
    low, high = bad.interval(n=200)
    assert low < bad.ece < high and low > 5 * good.ece
    assert bad.interval(n=50, seed=1) == bad.interval(n=50, seed=1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="n_bins: expected an integer >= 1, got 0"):
        calibrate([[1.0]], [[True]], 0)
    with pytest.raises(ValueError, match="right: expected one value for each of the probabilities"):
        calibrate([[0.5, 0.5]], [[True]])
    with pytest.raises(ValueError, match=r"probabilities: expected numbers in \[0, 1\], got nan"):
        calibrate([[math.nan]], [[True]])
    with pytest.raises(ValueError, match="probabilities: expected at least one passage, got none"):
        calibrate([[]], [[]])
