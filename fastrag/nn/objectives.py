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

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrag.messages import shown

MARGINAL = "marginal"  # the objective without a retriever term of its own
# A passage that was not read may explain the answer better than those that were by any factor.
# Above this one, a single question would decide the step.
MAX_RATIO = 100.0


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
    # Name of the constructor's argument that a number after the word sets, as in "topk:4"
    counts: ClassVar[str | None] = None
    # Whether the term needs token_logp of passages that the generator term does not have
    pairwise: ClassVar[bool] = False
    # Whether `draw` chooses the passages that the generator is trained on; it is then `pairwise`
    draws: ClassVar[bool] = False
    _known: ClassVar[dict[str, type[RetrieverTerm]]] = {}

    def __init_subclass__(cls, *, word: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.word = word
        if word is not None:
            RetrieverTerm._known[word] = cls

    def __init__(self, tau_lm: float = 1.0) -> None:
        super().__init__()
        self.tau_lm = _checked_tau(tau_lm)
        self.marginal = "token"

    @staticmethod
    def named(objective: str, tau_lm: float = 1.0) -> RetrieverTerm | None:
        """Return the retriever term of an objective, or None for "marginal".

        Args:
            objective: a word, and a number after a colon where the objective takes one ("topk:4").
            tau_lm: as for the constructor.

        Raises:
            ValueError: no objective has this word (the message lists those that exist), the number
                is missing or not expected, or tau_lm is not a positive number.
        """
        _checked_tau(tau_lm)
        word, colon, number = objective.partition(":")
        if word not in objective_words():
            raise ValueError(f"objective: expected one of {objective_words()}, got {shown(word)}")
        kind = RetrieverTerm._known.get(word)
        if kind is None or kind.counts is None:
            if colon:
                raise ValueError(
                    f"objective: expected {word} without a number, got {shown(objective)}"
                )
            return None if kind is None else kind(tau_lm)
        if not colon:
            return kind(tau_lm)
        if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) >= 1):
            raise ValueError(
                f"objective: expected {word}:<{kind.counts}>, an integer >= 1, got "
                f"{shown(objective)}"
            )
        return kind(tau_lm, **{kind.counts: int(number)})

    @property
    def setting(self) -> str | None:
        """What `named` makes this term of; None without a word."""
        if self.word is None or self.counts is None:
            return self.word
        return f"{self.word}:{getattr(self, self.counts)}"

    def use_marginal(self, marginal: str) -> None:
        """Adopt the marginal of the `RagLoss` that holds the term.

        Raises:
            ValueError: the objective is not defined for this marginal.
        """
        self.marginal = marginal

    def generator_scores(self, doc_scores: Tensor) -> Tensor:
        """Return the scores `[B, K]` whose softmax is the prior of the generator term."""
        return doc_scores.detach()

    def draw(
        self,
        doc_scores: Tensor,
        token_logp: Tensor,
        label_mask: Tensor,
        posterior_scores: Tensor | None = None,
    ) -> Tensor:
        """Return the weight of each passage's log-likelihood in the generator term, `[B, K]`.

        Only a term with `draws` is asked.
        """
        raise NotImplementedError

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
        present, log_prior = log_prior_of(doc_scores)
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


class StraightThroughTopK(RetrieverTerm, word="topk"):
    """Read the m passages of the highest scores; train the choice of them as if it were smooth.

        value:     -log sum_k pi_k p(y|x,z_k),  pi_k = p_k / p(S) for the m passages S, else 0
        gradient:  that of p_k takes the place of that of pi_k, for all K passages
             (Bengio et al. 2013; of retrieved passages: Zamani and Bendersky 2024, He et al. 2025)

    With M = sum_k pi_k p(y|x,z_k), the gradient is d term / d s_k = p_k (sum_j p_j L_j - L_k) / M,
    L_k = p(y|x,z_k). It is that of the marginal likelihood times sum_j p_j L_j / M, and equal to it
    for m = K. L_k / M is at most `MAX_RATIO`. With the Token marginal all this holds at each token.

    Args:
        tau_lm: not used.
        n_read: m, passages that the generator reads.

    Raises:
        ValueError: `n_read` below 1.
    """

    counts = "n_read"
    pairwise = True

    def __init__(self, tau_lm: float = 1.0, n_read: int = 1) -> None:
        super().__init__(tau_lm)
        self.n_read = _checked_count("n_read", n_read)

    def generator_scores(self, doc_scores: Tensor) -> Tensor:
        scores = doc_scores.detach()
        read = scores.topk(min(self.n_read, scores.shape[1]), dim=1).indices
        return torch.full_like(scores, -torch.inf).scatter(1, read, scores.gather(1, read))

    def forward(self, doc_scores: Tensor, token_logp: Tensor, label_mask: Tensor) -> Tensor:
        present, log_prior = log_prior_of(doc_scores)
        _, log_read = log_prior_of(self.generator_scores(doc_scores))
        logp, counted = token_logp.detach(), label_mask  # [B, K, T], [B, T]
        if self.marginal == "sequence":  # one sum instead of T numbers
            logp = _sequence_logp(logp, label_mask).unsqueeze(2)
            counted = label_mask.any(1, keepdim=True)
        log_marginal = (log_read.unsqueeze(2) + logp).logsumexp(1)
        ratio = (logp - log_marginal.unsqueeze(1)).clamp(max=math.log(MAX_RATIO)).exp()
        prior = log_prior.exp().unsqueeze(2)
        through = ((prior - prior.detach()) * ratio).sum(1)  # 0, with the gradient of the prior
        term = -(log_marginal + through)
        return torch.where(counted & present.any(1, keepdim=True), term, 0.0).sum(1)


class JSA(RetrieverTerm, word="jsa"):
    """Joint stochastic approximation: train on passages drawn from the posterior by a Markov chain.

        w(k) = p(z_k|x) p(y|x,z_k) / q(z_k|x,y)
        chain: z' ~ q(z|x,y), accepted instead of z with probability min(1, w(z') / w(z))
        loss = -sum_k c_k (log p(y|x,z_k) + log p(z_k|x) + log q(z_k|x,y))
                                            (Ou and Song 2020; Cao et al. 2025, JSA-RAG)

    c_k is the share of the chain's states that are passage k, without gradient. The chain's
    stationary distribution is the posterior, so c estimates it and the first two terms estimate the
    gradient of the RAG-Sequence NLL; the third fits q to the posterior.

    Args:
        tau_lm: not used.
        n_steps: states of the chain; the first is the first proposal.

    Raises:
        ValueError: `n_steps` below 1, or another marginal than "sequence".

    Note:
        Compared with the code that the authors of JSA-RAG published (Caohy23/JSA-RAG), not with the
        text of their paper. The chain, its first state, the weights c and the union of what prior
        and q retrieve are the same. Three things differ. There log p(y|x,z) is a mean over tokens,
        in the chain and in the loss; here it is their sum, without which the chain would not sample
        the posterior of RAG-Sequence. There a passage that both retrieve is one less to read; here
        the question finds K others. There q reads question and answer, here answer and question, so
        that a long question does not push the answer out of the window.
    """

    counts = "n_steps"
    pairwise = draws = True

    def __init__(self, tau_lm: float = 1.0, n_steps: int = 50) -> None:
        super().__init__(tau_lm)
        self.n_steps = _checked_count("n_steps", n_steps)

    def use_marginal(self, marginal: str) -> None:
        if marginal != "sequence":
            raise ValueError(
                f"marginal: expected 'sequence' with the objective jsa, whose chain draws one "
                f"passage for a whole answer, got {shown(marginal)}"
            )
        super().use_marginal(marginal)

    @torch.no_grad()
    def draw(
        self,
        doc_scores: Tensor,
        token_logp: Tensor,
        label_mask: Tensor,
        posterior_scores: Tensor | None = None,
    ) -> Tensor:
        present, log_prior = log_prior_of(doc_scores)
        log_q = log_prior if posterior_scores is None else log_prior_of(posterior_scores)[1]
        log_joint = log_prior + _sequence_logp(token_logp, label_mask)
        proposals = log_q.exp().multinomial(self.n_steps, replacement=True)
        uniforms = torch.rand_like(proposals, dtype=log_q.dtype)
        states = independence_chain(log_joint - log_q, proposals, uniforms)
        shares = torch.zeros_like(log_q).scatter_add_(
            1, states, torch.full_like(uniforms, 1.0 / self.n_steps)
        )
        return shares * (present.any(1) & label_mask.any(1)).unsqueeze(1)

    def forward(
        self,
        doc_scores: Tensor,
        token_logp: Tensor,
        label_mask: Tensor,
        drawn: Tensor | None = None,
        posterior_scores: Tensor | None = None,
    ) -> Tensor:
        if drawn is None:
            drawn = self.draw(doc_scores, token_logp, label_mask, posterior_scores)
        wanted = log_prior_of(doc_scores)[1]
        if posterior_scores is not None:
            wanted = wanted + log_prior_of(posterior_scores)[1]
        return -torch.where(drawn > 0, drawn * wanted, 0.0).sum(1)


def independence_chain(log_weight: Tensor, proposals: Tensor, uniforms: Tensor) -> Tensor:
    """Run Metropolis chains with independent proposals; return their states, `[B, m]`.

        state_1 = proposal_1;  proposal_i replaces state_i-1 if u_i < w(proposal_i) / w(state_i-1)

    Args:
        log_weight: log of target over proposal density, `[B, K]`, up to a constant of each row.
        proposals: `[B, m]` int64, drawn from the proposal density.
        uniforms: `[B, m]`, drawn from [0, 1); the first column is not used.

    Example:
        >>> proposals = torch.tensor([[0, 1, 0]])
        >>> independence_chain(torch.tensor([[0.0, 50.0]]), proposals, torch.full((1, 3), 0.5))
        tensor([[0, 1, 1]])
    """
    offered, log_u = log_weight.gather(1, proposals), uniforms.log()
    states, held = [proposals[:, 0]], offered[:, 0]
    for i in range(1, proposals.shape[1]):
        accepted = log_u[:, i] < offered[:, i] - held
        states.append(torch.where(accepted, proposals[:, i], states[-1]))
        held = torch.where(accepted, offered[:, i], held)
    return torch.stack(states, 1)


def _checked_count(name: str, value: int) -> int:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"{name}: expected an integer >= 1, got {shown(value)}")
    return value


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
    present, log_prior = log_prior_of(doc_scores)
    live = present.any(1)
    masked = target_scores.to(log_prior.dtype).masked_fill(~present, -torch.inf)
    log_target = torch.where(live.unsqueeze(1), masked, 0.0).log_softmax(1)
    difference = torch.where(present, log_target - log_prior, 0.0)
    return torch.where(live & label_mask.any(1), (log_target.exp() * difference).sum(1), 0.0)


def log_prior_of(doc_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of present passages and log p(z|x) `[B, K]`, uniform if none is present."""
    present = doc_scores != -torch.inf
    dtype = torch.float64 if doc_scores.dtype == torch.float64 else torch.float32
    # A row without any passage must not reach log_softmax: its gradient there is NaN, not 0.
    scores = torch.where(present.any(1, keepdim=True), doc_scores.to(dtype), 0.0)
    return present, scores.log_softmax(1)
