"""The losses of a patched model: the paper's, and those that Hugging Face's RAG classes compute.

The labels of an encoder-decoder follow Hugging Face's convention: the first column is the decoder's
start token and is never predicted, and the pad token does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag import functional
from fastrag.nn.heads import LMHead
from fastrag.ops.positions import IGNORE_INDEX


def shifted(labels: Tensor) -> Tensor:
    """Return the targets of a decoder that reads `labels` `[B, T]`: the column to the right."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def without_padding(targets: Tensor, pad_id: int | None) -> Tensor:
    """Return `targets` `[B, T]` in which the pad token does not count."""
    return targets if pad_id is None else targets.masked_fill(targets == pad_id, IGNORE_INDEX)


def without_bos(targets: Tensor, bos_id: int | None) -> Tensor:
    """Return `targets` `[B, T]` without the first column where it is BOS in every row.

    The condition stays on the device: no wait for a GPU.
    """
    if bos_id is None:
        return targets
    every = (targets[:, :1] == bos_id).all()
    first = targets[:, :1].masked_fill(every, IGNORE_INDEX)
    return torch.cat([first, targets[:, 1:]], dim=1)


def paper_nll(
    marginal: str,
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    doc_scores: Tensor,
    label_smoothing: float,
    reduction: str = "none",
) -> Tensor:
    """Return the negative log-likelihood, by default of each example; see `fastrag.functional`."""
    return functional.rag_nll(
        marginal,
        hidden,
        head.weight,
        targets,
        doc_scores,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        label_smoothing=label_smoothing,
        reduction=reduction,
    ).loss


def hf_sequence_nll(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    doc_scores: Tensor,
    label_smoothing: float,
    gold_targets: Tensor,
) -> Tensor:
    """Return what transformers' RagSequenceForGeneration computes for each example, `[B]`.

        nll    = -logsumexp_k(c a_k + sum_t m_t l_kt)
        smooth = -logsumexp_k(c V a_k + sum_tv m_t l_ktv)
        loss   = (1 - e) nll + e/V smooth,     c = 1 if the second target counts, else 0

    a is the log prior. Since it is added at the second target position, c is 0 where that position
    is padding; docs/math.md compares this with the paper.

    Args:
        hidden: states before the head, `[B*K, T, H]`.
        head: the generator's head.
        targets: `[B, T]`, -100 where they do not count.
        doc_scores: `[B, K]`.
        label_smoothing: e.
        gold_targets: the targets of the first term, from which BOS may be left out.
    """
    hidden = hidden.unflatten(0, doc_scores.shape)

    def total(labels: Tensor) -> Tensor:  # [B, K]
        logp = functional.token_logp(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        return logp.sum(dim=2)

    counts = (targets[:, 1:2] != IGNORE_INDEX).any(dim=1, keepdim=True)
    prior = torch.where(counts, doc_scores.log_softmax(dim=1), 0.0)
    nll = -(prior + total(gold_targets)).logsumexp(dim=1)
    if not label_smoothing:
        return nll
    # The loss of one passage, smoothed by a half, holds sum_tv m l.
    each, alone = hidden.flatten(0, 1).unsqueeze(1), torch.zeros_like(doc_scores).view(-1, 1)
    repeated = targets.repeat_interleave(doc_scores.shape[1], dim=0)
    half = paper_nll("sequence", each, head, repeated, alone, 0.5).view_as(doc_scores)
    n_vocab = head.weight.shape[0]
    every = n_vocab * (-2.0 * half - total(targets))
    smooth = -(n_vocab * prior + every).logsumexp(dim=1)
    return (1.0 - label_smoothing) * nll + label_smoothing / n_vocab * smooth
