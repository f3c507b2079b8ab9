"""RAG-Sequence decoding, greedy under each passage ("fast decoding", Lewis et al. 2020, sec. 2.5).

    candidates:  y_k = greedy answer given passage z_k
    score(y)     = log sum over {k : y_k = y} of p(z_k|x) p(y|x,z_k)

A passage that did not itself propose y counts as giving it no probability. This saves the K x K
forward passes of "thorough decoding".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrag import functional
from fastrag.generation.greedy import in_order, join_answers
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.generation.greedy import GreedySearch
    from fastrag.nn.generators import GeneratorAdapter


@torch.no_grad()
def rag_sequence(search: GreedySearch) -> RagGeneration:
    """Return the most probable greedy answer of each question.

    The caller's logits processors and stopping criteria see all B*K contexts, each with the
    generator's own logits.

    Args:
        search: the questions, their contexts and the settings.

    Returns:
        `RagGeneration`. Its `candidates` are the K greedy answers of each question.

    Raises:
        ValueError: there is a streamer; the answer is only known after the last of its tokens.

    Example:
        >>> rag_sequence(search).candidate_scores.shape                     # doctest: +SKIP
        torch.Size([8, 5])
    """
    if search.streamer is not None:
        raise ValueError(
            f"streamer: expected None, because RAG-Sequence chooses between K finished answers, "
            f'got {type(search.streamer).__name__}; marginal="token" can stream'
        )
    parts, answers, part_logp = search.parts(), [], []
    for contexts in parts:
        answer, hidden = search.generate(contexts)
        answers.append(answer)
        part_logp.append(_seq_logp(search.adapter, hidden, answer))
    n_docs = search.n_docs
    seq_logp = in_order(parts, part_logp).float().view(-1, n_docs)
    joint = search.prior_scores.log_softmax(dim=1) + seq_logp  # log p(z_k|x) p(y_k|x,z_k), [B, K]
    keys = join_answers(parts, answers).unflatten(0, (-1, n_docs))  # [B, K, T]
    candidates = keys.masked_fill(keys == IGNORE_INDEX, search.pad_id)
    same = (keys.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1)  # [B, K, K]
    alike = joint.unsqueeze(1).masked_fill(~same, -torch.inf)
    candidate_scores = alike.logsumexp(dim=2).masked_fill(joint.isneginf(), -torch.inf)
    scores, best = candidate_scores.max(dim=1)
    question = torch.arange(len(best), device=best.device)
    support = alike[question, best].argmax(dim=1)
    return RagGeneration(
        sequences=candidates[question, best],
        scores=scores,
        supporting_rows=search.rows[question, support],
        rows=search.rows,
        doc_scores=search.doc_scores,
        candidates=candidates,
        candidate_scores=candidate_scores,
        lengths=(keys[question, best] != IGNORE_INDEX).sum(dim=1),
        loss=search.loss(),
    )


def _seq_logp(adapter: GeneratorAdapter, hidden: Tensor, answers: Tensor) -> Tensor:
    """Return log p(y|x,z) of one answer per context, `[n]`, from the states that predict it."""
    head = adapter.head()
    token_logp = functional.token_logp(
        hidden,  # [n, 1, T, H]
        head.weight,
        answers,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE_INDEX,
    )
    return token_logp.sum(dim=(1, 2))
