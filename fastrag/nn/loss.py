"""RagLoss: the marginal likelihood of the labels over the K retrieved passages, as a module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastrag.functional import rag_nll
from fastrag.messages import shown
from fastrag.nn.heads import LMHead
from fastrag.nn.objectives import MARGINAL, RetrieverTerm
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

    Both terms are weighted by example and reduced alike.

    Args:
        marginal: "token" or "sequence".
        objective: "marginal", the likelihood above, trains retriever and generator together;
            "emdr2", "pdist" and "replug" as above. A `RetrieverTerm` takes the place of theirs.
        tau_lm: temperature of the generator's distribution over passages (pdist, replug), > 0.
        generator_loss: "marginal", or "none" for a generator that does not train: nothing flows
            to hidden states and head. None: that of the objective.
        label_smoothing: share of the target distribution spread over the vocabulary, in [0, 1).
        ignore_index: label that does not count.
        reduction: "mean" (over counted label tokens, or `normalizer`), "sum" or "none" (`[B]`).

    Raises:
        ValueError: a word or number outside these.

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

        Returns:
            `RagLossOutput`.

        Raises:
            ValueError: shapes or dtypes disagree.
        """
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
                doc_scores if self.retriever_term is None else doc_scores.detach(),
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
        if self.retriever_term is not None:
            with stage("objective"):
                label_mask = labels != self.ignore_index
                retriever = reduce_examples(
                    self.retriever_term(doc_scores, token_logp.detach(), label_mask),
                    self.reduction,
                    normalizer=label_mask.sum() if normalizer is None else normalizer,
                    example_weight=example_weight,
                )
            loss = retriever if self.generator_loss == "none" else loss + retriever
        return RagLossOutput(loss, log_posterior)

    @property
    def objective(self) -> str | None:
        """The word of the objective; None for a retriever term that has no word."""
        return MARGINAL if self.retriever_term is None else self.retriever_term.word

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
