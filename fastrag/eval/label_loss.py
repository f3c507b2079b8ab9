"""LabelLoss: the model's loss of a batch, and with it the likelihood of each question's answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrag.nn.heads import LMHead
from fastrag.nn.loss import MARGINALS, RagLoss, RagLossOutput


class LabelLoss(RagLoss):
    """Compute a model's own loss and keep -log p(y|x) of each question under a marginal.

    Both take the same states of the generator. If the model's loss is that likelihood, the head
    runs once.

    Args:
        own: the model's loss.
        decoding: name of the decoding, whose marginal is that of the likelihood; of a decoding
            that names none it is the model's.

    Attributes:
        nll: -log p(y|x) of the last batch, `[B]`; 0 for a question without labels.
    """

    def __init__(self, own: RagLoss, decoding: str) -> None:
        named = (marginal for marginal in MARGINALS if decoding.startswith(marginal))
        super().__init__(next(named, own.marginal), reduction="none")
        self.own = own
        self.nll: Tensor | None = None

    def forward(
        self, hidden: Tensor, head: LMHead, labels: Tensor, doc_scores: Tensor, **settings: Any
    ) -> RagLossOutput:
        self.nll, log_posterior = super().forward(hidden, head, labels, doc_scores)
        own = self.own
        plain = own.retriever_term is None and not own.label_smoothing
        if plain and own.marginal == self.marginal:
            return RagLossOutput(
                self.nll.sum() / (labels != self.ignore_index).sum(), log_posterior
            )
        return own(hidden, head, labels, doc_scores, **settings)
