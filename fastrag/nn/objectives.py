"""Objectives that train the retriever on what the generator says about each passage.

The loss is a generator term and a retriever term. With a = log_softmax_k(doc_scores), l the
generator's token_logp, m = label counts, s = sum_t m l, and sg = no gradient:

    objective   generator term         retriever term
    marginal    the marginal NLL is both
    emdr2       marginal NLL, sg(a)    -sum_t m log sum_k exp(a_k + sg(l_kt))   Singh et al. 2021
    pdist       marginal NLL, sg(a)    KL(softmax_k(sg(s) / tau_lm) || a)       Izacard et al. 2022
    replug      none                   the same, s divided by sum_t m           Shi et al. 2023

A retriever term never reaches the generator, so it needs no more than the [B, K, T] numbers that
the marginal NLL was made of, and costs nothing beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RetrieverTerm = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def emdr2(doc_scores: Tensor, token_logp: Tensor, counts: Tensor, tau_lm: float) -> Tensor:
    """-sum_t m log sum_k exp(a_k + l_kt), [B]; its gradient in a is that of the Token marginal.

    Args:
        doc_scores: `[B, K]`, -inf at missing passages; differentiable.
        token_logp: `[B, K, T]`, without gradient.
        counts: `[B, T]` bool, the labels that count.
        tau_lm: not used.
    """
    present, log_prior = _log_prior(doc_scores)
    log_marginal = (log_prior.unsqueeze(2) + token_logp.detach()).logsumexp(1)
    return -torch.where(counts & present.any(1, keepdim=True), log_marginal, 0.0).sum(1)


def pdist(doc_scores: Tensor, token_logp: Tensor, counts: Tensor, tau_lm: float) -> Tensor:
    """KL(softmax_k(s / tau_lm) || softmax_k(doc_scores)), [B].

    Args:
        doc_scores: `[B, K]`, -inf at missing passages; differentiable.
        token_logp: `[B, K, T]`, without gradient.
        counts: `[B, T]` bool, the labels that count.
        tau_lm: temperature of the generator's distribution over passages.
    """
    return _divergence(doc_scores, _sequence_logp(token_logp, counts) / tau_lm, counts)


def replug(doc_scores: Tensor, token_logp: Tensor, counts: Tensor, tau_lm: float) -> Tensor:
    """As `pdist`, with s the mean over the tokens instead of their sum."""
    n_tokens = counts.sum(1, keepdim=True).clamp(min=1)
    return _divergence(doc_scores, _sequence_logp(token_logp, counts) / n_tokens / tau_lm, counts)


RETRIEVER_TERMS: dict[str, RetrieverTerm] = {"emdr2": emdr2, "pdist": pdist, "replug": replug}


def _sequence_logp(token_logp: Tensor, counts: Tensor) -> Tensor:
    """s [B, K]."""
    return torch.where(counts.unsqueeze(1), token_logp.detach(), 0.0).sum(2)


def _divergence(doc_scores: Tensor, target_scores: Tensor, counts: Tensor) -> Tensor:
    """KL(softmax_k(target_scores) || softmax_k(doc_scores)) over the passages that are there, [B].

    0 for an example without passages, or without a label that says which of them helped.
    """
    present, log_prior = _log_prior(doc_scores)
    live = present.any(1)
    masked = target_scores.to(log_prior.dtype).masked_fill(~present, -torch.inf)
    log_target = torch.where(live.unsqueeze(1), masked, 0.0).log_softmax(1)
    difference = torch.where(present, log_target - log_prior, 0.0)
    return torch.where(live & counts.any(1), (log_target.exp() * difference).sum(1), 0.0)


def _log_prior(doc_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which passages are there, and a [B, K]: -inf where they are not, 0 where none is."""
    present = doc_scores != -torch.inf
    dtype = torch.float64 if doc_scores.dtype == torch.float64 else torch.float32
    # A row without any passage must not reach log_softmax: its gradient there is NaN, not 0.
    scores = torch.where(present.any(1, keepdim=True), doc_scores.to(dtype), 0.0)
    return present, scores.log_softmax(1)
