"""Retrieved: what a retriever returns; and which K passages of the candidates it takes."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastrag.index.base import Hits
from fastrag.nn.objectives import log_prior_of
from fastrag.ops import checks

FLAT_PRIOR = 0.99  # share of log K above which a prior says nothing


class Retrieved(NamedTuple):
    """What `Retriever` returns.

    Attributes:
        query_emb: question vectors `[B, D]`, differentiable; None if the scores were given.
        hits: the K passages of each question, in the version of the index that was searched. The
            scores of rows that the caller chose are `doc_scores` times tau.
        doc_scores: q . d / tau `[B, K]`, differentiable; -inf where a passage is missing.
        log_prior: log p(z|x) `[B, K]`, differentiable.
        passage_emb: vectors `[B, K, D]` of passages that were encoded again, differentiable; None
            if the stored vectors were scored.
        candidates: the L candidates of each question with the fresh vectors and scores by which the
            K were chosen; None without `Retriever.rescore`.
        posterior_scores: scores `[B, K]` whose softmax is q(z|x,y), differentiable; None without a
            posterior encoder.
    """

    query_emb: Tensor | None
    hits: Hits
    doc_scores: Tensor
    log_prior: Tensor
    passage_emb: Tensor | None = None
    candidates: Hits | None = None
    posterior_scores: Tensor | None = None

    @property
    def vectors(self) -> Tensor:
        """Vectors of the K passages that were scored, `[B, K, D]`."""
        return cast(Tensor, self.hits.vectors) if self.passage_emb is None else self.passage_emb


def given_scores(
    rows: Tensor | None, doc_scores: Tensor, input_ids: Tensor, *unused: Tensor | None
) -> Retrieved:
    """Return what the caller's own search has found, where the questions are.

    Args:
        rows: `[B, K]` int64, -1 = missing, whose score becomes -inf.
        doc_scores: `[B, K]`.
        input_ids: the questions, `[B, S]`.
        unused: arguments of `RagModel.forward` that change a search.

    Raises:
        ValueError: no rows `[B, K]` of integers, scores of another shape or dtype, or an argument
            that only a search of the model can take.
    """
    checks.check_tensor("doc_scores", doc_scores)
    if any(each is not None for each in unused):
        raise ValueError(
            "include_rows, exclude_rows, posterior_ids: expected None with doc_scores, which are "
            "those of another search"
        )
    if rows is None:
        raise ValueError("doc_scores: expected the rows that they score as well, got None")
    checks.check_integer("rows", rows)
    shape = (len(input_ids), *rows.shape[1:])
    if rows.dim() != 2 or rows.shape != shape or 0 in shape:
        raise ValueError(
            f"rows: expected [B, K] with B = {len(input_ids)} and K of at least 1, got "
            f"{list(rows.shape)}"
        )
    if doc_scores.shape != shape or not doc_scores.is_floating_point():
        raise ValueError(
            f"doc_scores: expected floating point {list(shape)} as rows, got "
            f"{checks.show(doc_scores)}"
        )
    rows, doc_scores = rows.to(input_ids.device), doc_scores.to(input_ids.device)
    doc_scores = doc_scores.masked_fill(rows < 0, -torch.inf)
    hits = Hits(doc_scores.detach(), rows, None, 0)
    return Retrieved(None, hits, doc_scores, log_prior_of(doc_scores)[1])


def explore(scores: Tensor, n_docs: int, n_drawn: int, tau: float | Tensor) -> Tensor:
    """Keep the nearest candidates and draw the rest without replacement: columns `[B, n_docs]`.

        the first n_docs - n_drawn, then a sample of softmax(scores / tau) over those after them

    Gumbel top-m draws such a sample in one step.

    Args:
        scores: `[B, C]`, descending, -inf where missing, C of at least n_docs.
        n_docs: passages per question.
        n_drawn: how many of them are drawn.
        tau: softness of the draw.

    Example:
        >>> scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
        >>> explore(scores, n_docs=3, n_drawn=1, tau=1e-3)
        tensor([[0, 1, 2]])
    """
    n_kept = n_docs - n_drawn
    logits = (scores[:, n_kept:] / tau).detach()
    gumbel = -torch.empty_like(logits).exponential_().log()
    drawn = n_kept + (logits + gumbel).topk(n_drawn, dim=1).indices
    kept = torch.arange(n_kept, device=drawn.device).expand(len(drawn), -1)
    return torch.cat([kept, drawn], dim=1)


def included(given: Hits, found: Hits, k: int) -> Hits:
    """Put given passages before those found, and keep the first k that are there."""
    both = Hits(
        torch.cat([given.scores, found.scores], 1),
        torch.cat([given.rows, found.rows], 1),
        torch.cat([cast(Tensor, given.vectors), cast(Tensor, found.vectors)], 1),
        found.version,
    )
    return both.columns((both.rows < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :k])


def joined(include: Tensor | None, rows: Tensor) -> Tensor:
    """Append rows `[B, K]` to those that have to be found anyway, each once."""
    if include is None:
        return rows
    repeated = (rows.unsqueeze(2) == include.unsqueeze(1)).any(2)
    return torch.cat([include, rows.masked_fill(repeated, -1)], 1)


def with_null(found: Retrieved, null_score: Tensor) -> Retrieved:
    """Append the passage without text, row -1, to what was found."""
    hits, again, posterior = found.hits, found.passage_emb, found.posterior_scores
    scores = _append_null(found.doc_scores, null_score)
    return found._replace(
        hits=Hits(
            nn.functional.pad(hits.scores, (0, 1), value=-torch.inf),
            nn.functional.pad(hits.rows, (0, 1), value=-1),
            nn.functional.pad(cast(Tensor, hits.vectors), (0, 0, 0, 1)),
            hits.version,
        ),
        doc_scores=scores,
        log_prior=scores.log_softmax(1),
        passage_emb=None if again is None else nn.functional.pad(again, (0, 0, 0, 1)),
        posterior_scores=None if posterior is None else _append_null(posterior, null_score),
    )


def _append_null(doc_scores: Tensor, null_score: Tensor) -> Tensor:
    """Append the score of the passage without text, `[B, K + 1]`: the mean of the others + null."""
    others = doc_scores.detach()
    here = others.isfinite()
    mean = torch.where(here, others, 0.0).sum(1) / here.sum(1).clamp(min=1)
    return torch.cat([doc_scores, (mean + null_score).unsqueeze(1)], 1)


def is_flat(doc_scores: Tensor) -> bool:
    """Whether log_softmax_k(doc_scores) `[B, K]` is nearly uniform for every question.

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
