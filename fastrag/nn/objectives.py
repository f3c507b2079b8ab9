"""Objectives that train the retriever on the generator's likelihood of the answer.

The loss is a generator term and a retriever term. With a = log_softmax_k(doc_scores), l the
generator's token_logp, m = label mask, s = sum_t m l, and sg = no gradient:

    objective   generator term         retriever term
    marginal    the marginal NLL is both
    emdr2       marginal NLL, sg(a)    -sum_t m log sum_k exp(a_k + sg(l_kt))   Singh et al. 2021
    pdist       marginal NLL, sg(a)    KL(softmax_k(sg(s) / tau_lm) || a)       Izacard et al. 2022
    replug      none                   the same, s divided by sum_t m           Shi et al. 2023

A retriever term never reaches the generator, so it needs only the [B, K, T] numbers from which the
marginal NLL was computed, and its cost is negligible.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrag.messages import shown

MARGINAL = "marginal"  # the objective without a retriever term of its own


class RetrieverTerm(nn.Module):
    """The retriever's side of an objective; a subclass with a word can be named in a config.

        class Sharp(RetrieverTerm, word="sharp"):
            def forward(self, doc_scores, token_logp, label_mask): ...      # [B]

    A term may have parameters: they are those of the `RagLoss` that holds it.

    Args:
        tau_lm: temperature of the generator's distribution over passages, > 0; a term that forms
            no such distribution ignores it.

    Raises:
        ValueError: tau_lm is not a positive number.
    """

    word: ClassVar[str | None] = None
    # "none" if the objective is for a generator that does not train
    generator_loss: ClassVar[str] = "marginal"
    _known: ClassVar[dict[str, type[RetrieverTerm]]] = {}

    def __init_subclass__(cls, *, word: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.word = word
        if word is not None:
            RetrieverTerm._known[word] = cls

    def __init__(self, tau_lm: float = 1.0) -> None:
        super().__init__()
        self.tau_lm = _checked_tau(tau_lm)

    @staticmethod
    def named(word: str, tau_lm: float = 1.0) -> RetrieverTerm | None:
        """Return the retriever term of an objective, or None for "marginal".

        Raises:
            ValueError: no objective has this word (the message lists those that exist), or tau_lm
                is not a positive number.
        """
        _checked_tau(tau_lm)
        if word not in objective_words():
            raise ValueError(f"objective: expected one of {objective_words()}, got {shown(word)}")
        kind = RetrieverTerm._known.get(word)
        return None if kind is None else kind(tau_lm)

    def forward(self, doc_scores: Tensor, token_logp: Tensor, label_mask: Tensor) -> Tensor:
        """Return the term of each example, `[B]`.

        Args:
            doc_scores: `[B, K]`, -inf at missing passages; differentiable.
            token_logp: `[B, K, T]`, without gradient.
            label_mask: `[B, T]` bool, the labels that count.
        """
        raise NotImplementedError


def objective_words() -> tuple[str, ...]:
    """Return the words that name an objective.

    Example:
        >>> objective_words()[:4]
        ('marginal', 'emdr2', 'pdist', 'replug')
    """
    return (MARGINAL, *RetrieverTerm._known)


class EMDR2(RetrieverTerm, word="emdr2"):
    """-sum_t m log sum_k exp(a_k + l_kt); its gradient in a is that of the Token marginal."""

    def forward(self, doc_scores: Tensor, token_logp: Tensor, label_mask: Tensor) -> Tensor:
        present, log_prior = _log_prior(doc_scores)
        log_marginal = (log_prior.unsqueeze(2) + token_logp.detach()).logsumexp(1)
        return -torch.where(label_mask & present.any(1, keepdim=True), log_marginal, 0.0).sum(1)


class PDist(RetrieverTerm, word="pdist"):
    """KL(softmax_k(s / tau_lm) || softmax_k(doc_scores))."""

    def forward(self, doc_scores: Tensor, token_logp: Tensor, label_mask: Tensor) -> Tensor:
        target_scores = _sequence_logp(token_logp, label_mask) / self.tau_lm
        return _divergence(doc_scores, target_scores, label_mask)


class REPLUG(RetrieverTerm, word="replug"):
    """As `PDist`, with s the mean over the tokens instead of their sum."""

    generator_loss = "none"

    def forward(self, doc_scores: Tensor, token_logp: Tensor, label_mask: Tensor) -> Tensor:
        n_tokens = label_mask.sum(1, keepdim=True).clamp(min=1)
        target_scores = _sequence_logp(token_logp, label_mask) / n_tokens / self.tau_lm
        return _divergence(doc_scores, target_scores, label_mask)


def _checked_tau(tau_lm: float) -> float:
    if not 0.0 < tau_lm < float("inf"):
        raise ValueError(f"tau_lm: expected a positive number, got {tau_lm}")
    return tau_lm


def _sequence_logp(token_logp: Tensor, label_mask: Tensor) -> Tensor:
    """Return s = sum_t m l, `[B, K]`."""
    return torch.where(label_mask.unsqueeze(1), token_logp.detach(), 0.0).sum(2)


def _divergence(doc_scores: Tensor, target_scores: Tensor, label_mask: Tensor) -> Tensor:
    """Return KL(softmax_k(target_scores) || softmax_k(doc_scores)) of the present passages, `[B]`.

    It is 0 for an example without passages or without a counted label.
    """
    present, log_prior = _log_prior(doc_scores)
    live = present.any(1)
    masked = target_scores.to(log_prior.dtype).masked_fill(~present, -torch.inf)
    log_target = torch.where(live.unsqueeze(1), masked, 0.0).log_softmax(1)
    difference = torch.where(present, log_target - log_prior, 0.0)
    return torch.where(live & label_mask.any(1), (log_target.exp() * difference).sum(1), 0.0)


def _log_prior(doc_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of present passages and log p(z|x) `[B, K]`, uniform if none is present."""
    present = doc_scores != -torch.inf
    dtype = torch.float64 if doc_scores.dtype == torch.float64 else torch.float32
    # A row without any passage must not reach log_softmax: its gradient there is NaN, not 0.
    scores = torch.where(present.any(1, keepdim=True), doc_scores.to(dtype), 0.0)
    return present, scores.log_softmax(1)
