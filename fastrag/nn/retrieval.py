"""What RagModel does with an index: holds it against its parts, explores, watches the prior."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrag.nn.arguments import require_finite
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index import Index, PassageStore

FLAT_PRIOR = 0.99  # share of log K above which a prior says nothing


def check_index(index: Index, passages: PassageStore, question_encoder: nn.Module) -> None:
    """Raise ValueError unless there is a vector of the right width for each passage."""
    if len(index) == 0:
        raise ValueError("index: expected vectors, got an empty index; call refresh_index()")
    if len(index) != len(passages):
        raise ValueError(
            f"index: expected one vector per passage, got {len(index)} vectors and "
            f"{len(passages)} passages"
        )
    dim = getattr(question_encoder, "dim", index.dim)
    if dim != index.dim:
        raise ValueError(
            f"index: expected vectors of width {dim} as the question encoder gives, got {index.dim}"
        )


def explore(scores: Tensor, rows: Tensor, n_docs: int, n_drawn: int, tau: float | Tensor) -> Tensor:
    """Keep the nearest candidates and draw the rest without replacement: rows `[B, n_docs]`.

        the first n_docs - n_drawn, then a sample of softmax(scores / tau) over those behind them

    Gumbel top-m draws such a sample at once.

    Args:
        scores: `[B, C]`, descending, -inf where missing.
        rows: `[B, C]`, C of at least n_docs.
        n_docs: passages per question.
        n_drawn: how many of them are drawn.
        tau: softness of the draw.

    Example:
        >>> scores, rows = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[7, 5, 4, 2]])
        >>> explore(scores, rows, n_docs=3, n_drawn=1, tau=1e-3)
        tensor([[7, 5, 4]])
    """
    n_kept = n_docs - n_drawn
    logits = (scores[:, n_kept:] / tau).detach()
    gumbel = -torch.empty_like(logits).exponential_().log()
    drawn = (logits + gumbel).topk(n_drawn, dim=1).indices
    return torch.cat([rows[:, :n_kept], rows[:, n_kept:].gather(1, drawn)], dim=1)


def encode_rows(passage_encoder: nn.Module, passages: PassageStore, rows: Tensor) -> Tensor:
    """Encode the passages of `rows` `[B, K]` with gradient, each once: `[B, K, D]`."""
    unique, where = rows.clamp(min=0).unique(return_inverse=True)
    with stage("encode_passages"):
        ids, lengths = passages.gather(unique, "encoder")
        mask = torch.arange(ids.shape[-1], device=rows.device) < lengths[:, None]
        vectors = passage_encoder(ids, mask.long())
    require_finite(
        vectors, "passage_encoder: expected finite vectors, got NaN or inf for row", unique
    )
    return vectors[where]


def is_flat(doc_scores: Tensor) -> bool:
    """Whether log_softmax_k(doc_scores) `[B, K]` is as good as uniform for every question.

    Example:
        >>> is_flat(torch.tensor([[0.0, 0.01]])), is_flat(torch.tensor([[0.0, 5.0]]))
        (True, False)
    """
    found = doc_scores.isfinite()
    log_prior = doc_scores.float().log_softmax(dim=1)
    entropy = -torch.where(found, log_prior.exp() * log_prior, 0.0).sum(dim=1)
    n_found = found.sum(dim=1).clamp(min=1)  # [B]
    several = n_found > 1
    return bool((several & (entropy > FLAT_PRIOR * n_found.log())).sum() == several.sum() > 0)
