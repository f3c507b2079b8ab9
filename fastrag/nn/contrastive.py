"""Contrastive terms of the retriever, over all passages of a batch.

    S_bj = q_b . d_j / tau,  j over the distinct passages of all questions of the batch
    term_b = log sum_j exp S_bj - log sum_{j in P_b} exp S_bj

If P_b are the positive passages of the question, it is InfoNCE with in-batch negatives (Karpukhin
et al. 2020). If P_b are the K passages that the question retrieved, it is -log p(own K | x), which
the NLL gains if the prior is over all passages of the batch and those of other questions do not
explain the answer. It is smallest where each question prefers passages that the others do not find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.nn.retrieved import Retrieved


def in_batch_nll(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor,
    targets: Tensor,
    tau: float | Tensor = 1.0,
) -> Tensor:
    """Return the term of each question, `[B]`; 0 where no target is in the batch.

    Args:
        query_emb: `[B, D]`, differentiable.
        passage_emb: `[B, K, D]`, differentiable.
        rows: rows of `passage_emb`, `[B, K]` int64, -1 = missing. A row that several questions
            found counts once.
        targets: rows of P_b, `[B, P]` int64, -1 for none.
        tau: temperature of the scores.

    Example:
        >>> vectors = torch.eye(2).unsqueeze(1)                     # one passage per question
        >>> rows = torch.tensor([[3], [5]])
        >>> in_batch_nll(torch.eye(2), vectors, rows, rows)
        tensor([0.3133, 0.3133])
    """
    flat = rows.flatten()  # [J]
    dtype = torch.float64 if query_emb.dtype == torch.float64 else torch.float32
    with torch.autocast(query_emb.device.type, enabled=False):
        scores = query_emb.to(dtype) @ passage_emb.flatten(0, 1).to(dtype).t() / tau  # [B, J]
    copies = (flat.unsqueeze(0) == flat.unsqueeze(1)).sum(1)
    scores = (scores - copies.log()).masked_fill(flat < 0, -torch.inf)
    wanted = (flat.view(1, -1, 1) == targets.unsqueeze(1)).any(2) & (flat >= 0)
    some = wanted.any(1, keepdim=True)
    # A question without a target must not reach logsumexp: its gradient there is NaN, not 0.
    scores = torch.where(some, scores, 0.0)
    target_scores = torch.where(wanted | ~some, scores, -torch.inf)
    return scores.logsumexp(1) - target_scores.logsumexp(1)


class Contrast(NamedTuple):
    """Weights of the contrastive terms of a training step.

    Attributes:
        in_batch: weight of the term whose P_b are the K passages of the question.
        contrastive: weight of the term whose P_b are its positive passages.
    """

    in_batch: float = 0.0
    contrastive: float = 0.0

    def terms(self, found: Retrieved, tau: float | Tensor, positive_rows: Tensor | None) -> Tensor:
        """Return the weighted sum of the terms of each question, `[B]`.

        Args:
            found: what the retriever returned.
            tau: temperature of the scores.
            positive_rows: `[B, P]` int64, -1 for none; None: no question has any.

        Raises:
            ValueError: the scores were given, not made by the retriever.
        """
        if found.query_emb is None:
            raise ValueError(
                "doc_scores: expected None with in_batch or contrastive, which train the retriever"
            )
        rows = found.hits.rows
        total = found.doc_scores.new_zeros(len(rows))
        with stage("contrast"):
            for weight, targets in zip(self, (rows, positive_rows), strict=True):
                if weight and targets is not None:
                    term = in_batch_nll(found.query_emb, found.vectors, rows, targets, tau)
                    total = total + weight * term
        return total
