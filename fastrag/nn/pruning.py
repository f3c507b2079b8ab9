"""Posterior-pruned training: the generator trains only on the contexts that the answer needs.

    1. Without gradient, in eval mode:  l_kt = log p(y_t|x,z_k,y_<t) of all K contexts
    2. keep the contexts whose weight in the generator's gradient exceeds eps
    3. With gradient:  l_kt of the contexts kept; the loss takes them in place of those of 1.

The weight of a context in the generator's gradient is its posterior w (math.md, "The two
marginals"), so what a context adds to that gradient is bounded by its posterior. The value of the
loss and the gradient of the retriever contain all K contexts.

On a GPU, the host waits for the first pass, which decides how many contexts the second one has.

The first pass draws no random numbers. If every context is kept, the loss is that of the plain path
with the same dropout masks. Otherwise kept contexts have dropout, and the others do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrag.nn.loss import Pairs, RagLoss

if TYPE_CHECKING:
    from fastrag.data.processor import Contexts
    from fastrag.nn.reader import Reader


class Pruned(NamedTuple):
    """What `pruned_loss` returns.

    Attributes:
        loss: as `RagLossOutput`.
        log_posterior: as `RagLossOutput`.
        n_kept: number of contexts that were read with gradient, 0-d int64.
        dropped: posterior of the other contexts, the mean over questions (sequence) or label tokens
            (token), 0-d.
    """

    loss: Tensor
    log_posterior: Tensor
    n_kept: Tensor
    dropped: Tensor


def pruned_loss(
    reader: Reader,
    loss_fn: RagLoss,
    contexts: Contexts,
    labels: Tensor,
    doc_scores: Tensor,
    *,
    eps: float,
    unbiased: bool = False,
    normalizer: float | Tensor | None = None,
    example_weight: Tensor | None = None,
    posterior_scores: Tensor | None = None,
) -> Pruned:
    """Compute the loss, with gradients to the generator from few of the K contexts.

        kept = {k: w_k > eps}                                           w_k: largest over tokens
        |gradient - plain gradient| <= sum_t (sum of dropped w_kt) max_k |gradient of l_kt|

    With `unbiased`, a context of weight w_k <= eps is kept with probability w_k / eps, and its
    gradient is multiplied by eps / w_k: the expected gradient is the plain one
    (threshold sampling; Duffield, Lund and Thorup 2005). The best context of each question is
    always kept, so that every rank of a distributed run has a gradient for every parameter.

    Args:
        reader: reads contexts.
        loss_fn: the loss; its generator term has a gradient.
        contexts: of `doc_scores`, `[B*K, L]`.
        labels: `[B, T]` int64.
        doc_scores: `[B, K]`, -inf at missing passages, differentiable.
        eps: least weight, in [0, 1). 0 drops only contexts without any weight.
        unbiased: keep some of the others at random.
        normalizer: as for `RagLoss`.
        example_weight: as for `RagLoss`.
        posterior_scores: as for `RagLoss`.

    Returns:
        `Pruned`.

    Raises:
        ValueError: as `RagLoss.pairs`.
    """
    n_docs = doc_scores.shape[1]
    known = reader.score(loss_fn, contexts.ids, contexts.mask, labels, n_docs)
    with torch.no_grad():
        weights, drawn = loss_fn.context_weights(known, labels, doc_scores, posterior_scores)
        share = (weights > eps).to(weights.dtype)
        if unbiased and eps > 0.0:
            share = (weights / eps).clamp(max=1.0)
        share.scatter_(1, weights.argmax(1, keepdim=True), 1.0)
        kept = torch.rand_like(share) < share if unbiased else share > 0.0
        chosen = kept.flatten().nonzero().squeeze(1)
    answers = labels[chosen // n_docs]
    hidden = reader.states(contexts.ids[chosen], contexts.mask[chosen], answers)
    fresh = loss_fn.pairs(hidden, reader.head(), answers)
    evidence = fresh.evidence.squeeze(1)
    if unbiased:
        constant = evidence.detach()
        evidence = constant + (evidence - constant) / share.flatten()[chosen].unsqueeze(1)
    flat = [each.flatten(0, 1) for each in known]
    mixed = Pairs(
        flat[0].index_copy(0, chosen, evidence).unflatten(0, (-1, n_docs)),
        flat[1].index_copy(0, chosen, fresh.token_logp.squeeze(1)).unflatten(0, (-1, n_docs)),
    )
    loss, log_posterior = loss_fn.of_pairs(
        mixed,
        labels,
        doc_scores,
        drawn=drawn,
        normalizer=normalizer,
        example_weight=example_weight,
        posterior_scores=posterior_scores,
    )
    counted = labels != loss_fn.ignore_index
    return Pruned(loss, log_posterior, kept.sum(), _dropped(log_posterior, kept, counted))


def _dropped(log_posterior: Tensor, kept: Tensor, counted: Tensor) -> Tensor:
    if log_posterior.dim() == 2:
        log_posterior, counted = log_posterior.unsqueeze(2), counted.any(1, keepdim=True)
    mass = (log_posterior.exp() * ~kept.unsqueeze(2)).sum(1)  # [B, T], or [B, 1]
    return torch.where(counted, mass, 0.0).sum() / counted.sum().clamp(min=1)
