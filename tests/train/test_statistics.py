"""StepStatistics against entropies and divergences worked out from the definition."""

from __future__ import annotations

import math

import pytest
import torch

from fastrag.train.statistics import StepStatistics

LABELS = torch.tensor([[5, 6, 1], [7, 1, -100]])


def outputs(scores: torch.Tensor, log_posterior: torch.Tensor, **more: object) -> dict[str, object]:
    rows = torch.arange(scores.shape[1]).expand(scores.shape[0], -1).clone()
    rows[scores == -math.inf] = -1
    return {"doc_scores": scores, "rows": rows, "log_posterior": log_posterior} | more


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).nan_to_num(0.0).sum(-1)


def test_sequence_posterior() -> None:
    torch.manual_seed(0)
    scores, logits = torch.randn(2, 4), torch.randn(2, 4)
    prior, posterior = scores.softmax(1), logits.softmax(1)
    statistics = StepStatistics()
    statistics.add(outputs(scores, posterior.log()), LABELS)
    result = statistics.summary()
    assert result["prior_entropy"] == pytest.approx(float(entropy(prior).mean()), rel=1e-5)
    assert result["posterior_entropy"] == pytest.approx(float(entropy(posterior).mean()), rel=1e-5)
    kl = (posterior * (posterior.log() - prior.log())).sum(1).mean()
    assert result["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert result["unique_passages"] == 4


def test_token_posterior_counts_label_tokens_alone() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 4)
    posterior = torch.randn(2, 4, 3).softmax(1)
    counted = LABELS.ne(-100)
    prior = scores.softmax(1).unsqueeze(2)
    each_kl = (posterior * (posterior.log() - prior.log())).sum(1)
    statistics = StepStatistics()
    statistics.add(outputs(scores, posterior.log()), LABELS)
    result = statistics.summary()
    assert result["kl"] == pytest.approx(float(each_kl[counted].mean()), rel=1e-5)
    expected = entropy(posterior.transpose(1, 2))[counted].mean()
    assert result["posterior_entropy"] == pytest.approx(float(expected), rel=1e-5)


def test_missing_passages_have_no_share() -> None:
    inf = math.inf
    scores = torch.tensor([[0.0, 0.0, -inf], [-inf, -inf, -inf]])
    log_posterior = torch.tensor([[math.log(0.5), math.log(0.5), -inf], [-inf, -inf, -inf]])
    statistics = StepStatistics()
    statistics.add(outputs(scores, log_posterior), LABELS)
    result = statistics.summary()
    assert result["prior_entropy"] == pytest.approx(math.log(2))
    assert result["posterior_entropy"] == pytest.approx(math.log(2))
    assert result["kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["unique_passages"] == 2


def test_window_is_a_mean_over_steps_and_starts_anew() -> None:
    statistics = StepStatistics()
    assert statistics.summary() == {}
    even = torch.zeros(1, 2)
    sure = torch.tensor([[100.0, 0.0]])
    for scores in (even, sure):
        statistics.start_step()
        statistics.add(
            outputs(scores, scores.log_softmax(1), n_cut=torch.tensor(1)),
            torch.tensor([[3, 1]]),
            retrieval_seconds=0.5,
        )
        statistics.end_step()
    result = statistics.summary()
    assert result["prior_entropy"] == pytest.approx(math.log(2) / 2)
    assert result["passages_cut"] == 0.5  # 2 of 4
    assert result["retrieval_ms"] == 500.0
    assert result["tokens_per_second"] > 0 and result["steps_per_second"] > 0
    assert statistics.summary() == {}


def test_keeps_no_graph() -> None:
    scores = torch.zeros(1, 2, requires_grad=True)
    statistics = StepStatistics()
    statistics.add(outputs(scores * 1, (scores * 1).log_softmax(1)), None)
    assert not statistics._sums.requires_grad
