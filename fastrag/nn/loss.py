"""RagLoss: the marginal likelihood of the labels over the K retrieved passages, as a module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrag.functional import rag_nll, token_logp
from fastrag.messages import shown
from fastrag.nn.heads import LMHead
from fastrag.nn.objectives import MARGINAL, RetrieverTerm, log_prior_of
from fastrag.ops.marginal_nll import reduce_examples
from fastrag.ops.positions import IGNORE_INDEX
from fastrag.profiling import stage

MARGINALS = ("token", "sequence")
_GENERATOR_LOSSES = ("marginal", "none")
_REDUCTIONS = ("mean", "sum", "none")


class RagLossOutput(NamedTuple):
    """What `RagLoss` returns: the loss and log p(z|x,y), `[B, K, T]` (token) or `[B, K]`."""

    loss: Tensor
    log_posterior: Tensor


class Pairs(NamedTuple):
    """Log-likelihoods of B questions' answers in K contexts each.

    Attributes:
        evidence: log p(y_t|x,z_k,y_<t), `[B, K, T]` (token), or log p(y|x,z_k), `[B, K, 1]`
            (sequence), smoothed if the loss smooths; differentiable.
        token_logp: `[B, K, T]`, without gradient.
    """

    evidence: Tensor
    token_logp: Tensor


class RagLoss(nn.Module):
    """Negative log marginal likelihood of the labels over K passages, without the logits.

        token:     loss_b = -sum_t log sum_k p(z_k|x) p(y_t|x,z_k,y_<t)
        sequence:  loss_b = -log sum_k p(z_k|x) prod_t p(y_t|x,z_k,y_<t)
                                            (Lewis et al. 2020, sec. 2.1)

    Other objectives keep that likelihood for the generator, with the passages' prior held fixed,
    and add a term of their own that trains the retriever on the generator's token_logp l, held
    fixed in turn. With a = log_softmax_k(doc_scores), m = label counts, s = sum_t m l:

        emdr2     -sum_t m log sum_k exp(a_k + l_kt)                (Singh et al. 2021, EMDR2)
        pdist     KL(softmax_k(s / tau_lm) || exp a)                (Izacard et al. 2022, Atlas)
        replug    the same with s / sum_t m, the generator frozen   (Shi et al. 2023, REPLUG)
        topk:m    the marginal NLL of the m best passages, straight through (`StraightThroughTopK`)
        jsa:n     -sum_k c_k (s_k + a_k + log q_k), c drawn by a chain of n steps (`JSA`)

    Both terms are weighted by example and reduced alike.

    Args:
        marginal: "token" or "sequence".
        objective: "marginal", the likelihood above, trains retriever and generator together;
            the others as above. A `RetrieverTerm` takes the place of theirs.
        tau_lm: temperature of the generator's distribution over passages (pdist, replug), > 0.
        generator_loss: "marginal", or "none" for a generator that does not train: nothing flows
            to hidden states and head. None: that of the objective.
        label_smoothing: share of the target distribution spread over the vocabulary, in [0, 1).
        ignore_index: label that does not count.
        reduction: "mean" (over counted label tokens, or `normalizer`), "sum" or "none" (`[B]`).

    Raises:
        ValueError: a word or number outside these, or an objective without this marginal.

    Example:
        >>> import torch
        >>> from fastrag import LMHead, RagLoss
        >>> loss_fn = RagLoss("sequence")
        >>> hidden = torch.zeros(1, 2, 3, 4)                        # [B, K, T, H]
        >>> head = LMHead(torch.zeros(10, 4))                       # uniform over 10 words
        >>> labels, doc_scores = torch.tensor([[1, 2, -100]]), torch.zeros(1, 2)
        >>> round(loss_fn(hidden, head, labels, doc_scores).loss.item(), 4)     # log 10
        2.3026
    """

    def __init__(
        self,
        marginal: str = "token",
        objective: str | RetrieverTerm = "marginal",
        *,
        tau_lm: float = 1.0,
        generator_loss: str | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(objective, str):
            term = RetrieverTerm.named(objective, tau_lm)
        elif isinstance(objective, RetrieverTerm):
            term = objective
        else:
            raise ValueError(
                f"objective: expected a word or a RetrieverTerm, got {type(objective).__name__}"
            )
        if generator_loss is None:
            generator_loss = "marginal" if term is None else term.generator_loss
        _require_word("marginal", marginal, MARGINALS)
        _require_word("generator_loss", generator_loss, _GENERATOR_LOSSES)
        _require_word("reduction", reduction, _REDUCTIONS)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected 0 <= number < 1, got {label_smoothing}")
        if term is not None:
            term.use_marginal(marginal)
        self.marginal = marginal
        self.retriever_term = term
        self.generator_loss = generator_loss
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor,
        doc_scores: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        example_weight: Tensor | None = None,
        valid_rows: Tensor | None = None,
        posterior_scores: Tensor | None = None,
    ) -> RagLossOutput:
        """Return loss and posterior of `hidden` `[B, K, T, H]` under `head`.

        Args:
            hidden: states before the head, `[B, K, T, H]` or `[B*K, T, H]`.
            head: weight, bias, scale and softcap of the generator.
            labels: `[B, T]` int64.
            doc_scores: `[B, K]`, -inf at missing passages.
            normalizer: what "mean" divides by; default the counted tokens of this call.
            example_weight: `[B]` factors of the examples.
            valid_rows: `[R]` int32, positions of counted labels, see `functional.rag_token_nll`.
            posterior_scores: `[B, K]`, whose softmax is q(z|x,y) (jsa).

        Returns:
            `RagLossOutput`.

        Raises:
            ValueError: shapes or dtypes disagree.
        """
        term = None if self.retriever_term is None else self._term
        if term is not None and term.pairwise:
            pairs = self.pairs(hidden, head, labels, doc_scores.shape[1])
            return self.of_pairs(
                pairs,
                labels,
                doc_scores,
                normalizer=normalizer,
                example_weight=example_weight,
                posterior_scores=posterior_scores,
            )
        weight, bias = head.weight, head.bias
        if self.generator_loss == "none":
            hidden, weight = hidden.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
        with stage("loss"):
            loss, log_posterior, token_logp = rag_nll(
                self.marginal,
                hidden,
                weight,
                labels,
                doc_scores if term is None else term.generator_scores(doc_scores),
                bias=bias,
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                normalizer=normalizer,
                example_weight=example_weight,
                valid_rows=valid_rows,
            )
        if term is not None:
            with stage("objective"):
                label_mask = labels != self.ignore_index
                retriever = self.reduce(
                    term(doc_scores, token_logp.detach(), label_mask),
                    labels,
                    normalizer=normalizer,
                    example_weight=example_weight,
                )
            loss = retriever if self.generator_loss == "none" else loss + retriever
        return RagLossOutput(loss, log_posterior)

    def pairs(self, hidden: Tensor, head: LMHead, labels: Tensor, n_docs: int = 1) -> Pairs:
        """Return the log-likelihood of each context on its own, with gradients.

        Args:
            hidden: states before the head, `[B, K, T, H]` or `[B*K, T, H]`.
            head: as for `forward`.
            labels: `[B, T]` int64.
            n_docs: K.

        Returns:
            `Pairs`.

        Raises:
            ValueError: shapes disagree, or label smoothing with the Token marginal, where it is not
                a function of single contexts.
        """
        hidden = hidden.reshape(-1, 1, *hidden.shape[-2:])
        labels = labels.repeat_interleave(n_docs, dim=0)
        settings: dict[str, Any] = {
            "bias": head.bias,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "ignore_index": self.ignore_index,
        }
        with stage("loss"):
            if self.marginal == "sequence":
                zeros = torch.zeros(len(labels), 1, device=hidden.device)
                found = rag_nll(
                    "sequence",
                    hidden,
                    head.weight,
                    labels,
                    zeros,
                    label_smoothing=self.label_smoothing,
                    reduction="none",
                    **settings,
                )
                evidence, logp = -found.loss.unsqueeze(1), found.token_logp
            else:
                if self.label_smoothing:
                    raise ValueError(
                        f"label_smoothing: expected 0 where contexts are scored one by one with "
                        f"the Token marginal, got {self.label_smoothing}"
                    )
                logp = token_logp(hidden, head.weight, labels, **settings)
                evidence = logp.squeeze(1)
        shape = (-1, n_docs)
        return Pairs(evidence.unflatten(0, shape), logp.detach().squeeze(1).unflatten(0, shape))

    def of_pairs(
        self,
        pairs: Pairs,
        labels: Tensor,
        doc_scores: Tensor,
        *,
        drawn: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        example_weight: Tensor | None = None,
        posterior_scores: Tensor | None = None,
    ) -> RagLossOutput:
        """Return the loss that `forward` returns, from the log-likelihoods of the contexts.

        Args:
            pairs: what `pairs` returned; `evidence` may have a gradient for some contexts only.
            labels: as for `forward`.
            doc_scores: as for `forward`.
            drawn: weights of the passages that `context_weights` has drawn (jsa); None: draw them.
            normalizer: as for `forward`.
            example_weight: as for `forward`.
            posterior_scores: as for `forward`.

        Returns:
            `RagLossOutput`.
        """
        term, label_mask = self._term, labels != self.ignore_index
        joint, live = self._joint(pairs, label_mask, doc_scores)
        further: dict[str, Any] = {}
        if term is None or not term.draws:
            loss = -torch.where(live, joint.logsumexp(1), 0.0).sum(1)
        else:
            if drawn is None:
                drawn = term.draw(doc_scores, pairs.token_logp, label_mask, posterior_scores)
            loss = -(drawn * pairs.evidence.squeeze(2)).sum(1)
            further = {"drawn": drawn, "posterior_scores": posterior_scores}
        if term is not None:
            with stage("objective"):
                retriever = term(doc_scores, pairs.token_logp, label_mask, **further)
            loss = retriever if self.generator_loss == "none" else loss + retriever
        loss = self.reduce(loss, labels, normalizer=normalizer, example_weight=example_weight)
        log_posterior = joint.detach().log_softmax(1)
        return RagLossOutput(
            loss, log_posterior if self.marginal == "token" else log_posterior[..., 0]
        )

    def reduce(
        self,
        values: Tensor,
        labels: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        example_weight: Tensor | None = None,
    ) -> Tensor:
        """Reduce one number per question, `[B]`, as the loss is reduced."""
        return reduce_examples(
            values,
            self.reduction,
            normalizer=(labels != self.ignore_index).sum() if normalizer is None else normalizer,
            example_weight=example_weight,
        )

    def context_weights(
        self,
        pairs: Pairs,
        labels: Tensor,
        doc_scores: Tensor,
        posterior_scores: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the largest weight of each context in the generator's gradient, `[B, K]`.

        That is -dloss / d token_logp: the posterior under the prior of the generator term, at the
        token where it is largest; or the drawn weights, which are then returned as well.
        """
        term, label_mask = self.retriever_term, labels != self.ignore_index
        if term is not None and term.draws:
            drawn = term.draw(doc_scores, pairs.token_logp, label_mask, posterior_scores)
            return drawn, drawn
        joint, live = self._joint(pairs, label_mask, doc_scores)
        posterior = joint.softmax(1).masked_fill(~live.unsqueeze(1), 0.0)
        return posterior.amax(2), None

    def _joint(self, pairs: Pairs, label_mask: Tensor, doc_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z|x) + log-likelihood, `[B, K, T]` or `[B, K, 1]`, and where it counts."""
        term = self._term
        scores = doc_scores if term is None else term.generator_scores(doc_scores)
        present, log_prior = log_prior_of(scores)
        live = label_mask if self.marginal == "token" else label_mask.any(1, keepdim=True)
        live = live & present.any(1, keepdim=True)
        likelihood = torch.where(live.unsqueeze(1), pairs.evidence, 0.0)
        return log_prior.unsqueeze(2) + likelihood, live

    @property
    def _term(self) -> RetrieverTerm | None:
        """The retriever's term; None in eval mode for one that draws.

        The loss is then the likelihood that the draws estimate, which differs in no two calls.
        """
        term = self.retriever_term
        return None if term is not None and term.draws and not self.training else term

    @property
    def objective(self) -> str | None:
        """The setting of the objective; None for a retriever term that has no word."""
        return MARGINAL if self.retriever_term is None else self.retriever_term.setting

    @property
    def tau_lm(self) -> float:
        """Temperature of the generator's distribution over passages."""
        return 1.0 if self.retriever_term is None else self.retriever_term.tau_lm

    def extra_repr(self) -> str:
        return (
            f"marginal={self.marginal!r}, objective={self.objective!r}, tau_lm={self.tau_lm}, "
            f"generator_loss={self.generator_loss!r}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )


def _require_word(argument: str, got: str, words: tuple[str, ...]) -> None:
    if got not in words:
        raise ValueError(f"{argument}: expected one of {words}, got {shown(got)}")
