"""RagLoss: the marginal likelihood of the labels over the K retrieved passages, as a module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastrag import functional
from fastrag.nn.heads import LMHead
from fastrag.ops.positions import IGNORE_INDEX

_MARGINALS = {"token": functional.rag_token_nll, "sequence": functional.rag_sequence_nll}
_OBJECTIVES = ("marginal",)
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

    Args:
        marginal: "token" or "sequence".
        objective: "marginal", the likelihood above, trains retriever and generator together.
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
        objective: str = "marginal",
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _require_word("marginal", marginal, tuple(_MARGINALS))
        _require_word("objective", objective, _OBJECTIVES)
        _require_word("reduction", reduction, _REDUCTIONS)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected 0 <= number < 1, got {label_smoothing}")
        self.marginal = marginal
        self.objective = objective
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
            valid_rows: `[R]` int32, positions of counted labels, from the collator.

        Returns:
            `RagLossOutput`.

        Raises:
            ValueError: shapes or dtypes disagree.
        """
        loss, log_posterior = _MARGINALS[self.marginal](
            hidden,
            head.weight,
            labels,
            doc_scores,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
            example_weight=example_weight,
            valid_rows=valid_rows,
            return_posterior=True,
        )
        return RagLossOutput(loss, log_posterior)

    def extra_repr(self) -> str:
        return (
            f"marginal={self.marginal!r}, objective={self.objective!r}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )


def _require_word(argument: str, got: str, words: tuple[str, ...]) -> None:
    if got not in words:
        raise ValueError(f"{argument}: expected one of {words}, got {got!r}")
