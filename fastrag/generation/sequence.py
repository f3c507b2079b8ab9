"""RAG-Sequence decoding: answers proposed under each passage (Lewis et al. 2020, sec. 2.5).

    candidates:  the answers that a search finds given passage z_k, for each k
    fast:        score(y) = log sum over {k : y was found given z_k} of p(z_k|x) p(y|x,z_k)
    thorough:    score(y) = log sum_k p(z_k|x) p(y|x,z_k)

Fast decoding counts a passage that did not itself propose y as giving it no probability. Thorough
decoding asks each passage for each candidate; the contexts are not read again for this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrag.generation.search import each_of, in_order, join_answers, label_logp
from fastrag.generation.settings import refuse
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.generation.search import Reading, Search


@torch.no_grad()
def rag_sequence(search: Search) -> RagGeneration:
    """Return the most probable answers that were found under the passages, by fast decoding.

    Greedy under each passage by default; `num_beams` or `do_sample` let each passage propose more,
    and `num_return_sequences` answers of a question are returned. The caller's logits processors
    and stopping criteria see all B*K contexts, each with the generator's own logits.

    Args:
        search: the questions, their contexts and the settings.

    Returns:
        `RagGeneration`. Its `candidates` are the answers found under each passage.

    Raises:
        ValueError: there is a streamer, because the answer is only known after the last of its
            tokens; `guidance_scale` with beams; more answers to return than candidates.

    Example:
        >>> rag_sequence(search).candidate_scores.shape                     # doctest: +SKIP
        torch.Size([8, 5])
    """
    return _rag_sequence(search, thorough=False)


@torch.no_grad()
def rag_sequence_thorough(search: Search) -> RagGeneration:
    """Return the most probable answers that were found under the passages, by thorough decoding.

    Args:
        search: the questions, their contexts and the settings, as for `rag_sequence`.

    Returns:
        `RagGeneration`. Scores are log p(y|x) over all passages, as in training.

    Raises:
        ValueError: as `rag_sequence`.

    Example:
        >>> rag_sequence_thorough(search).log_posterior.shape               # doctest: +SKIP
        torch.Size([8, 5])
    """
    return _rag_sequence(search, thorough=True)


def _rag_sequence(search: Search, *, thorough: bool) -> RagGeneration:
    n_docs, n_return, n_each = search.n_docs, search.n_return, _n_each(search)
    parts, answers, part_logp = [], [], []
    for reading in search.readings(tied=thorough, wanted=thorough or n_each > 1):
        answer, token_logp = search.generate(reading, n_each)
        seq_logp = token_logp.sum(dim=1)
        parts.append(each_of(reading.contexts, n_each))
        answers.append(answer)
        if thorough:
            seq_logp = _logp_under_each(search, reading, answer, seq_logp, n_each)
        part_logp.append(seq_logp)
    seq_logp = in_order(parts, part_logp).float().unflatten(0, (-1, n_docs * n_each))
    keys = join_answers(parts, answers).unflatten(0, (-1, n_docs * n_each))  # [B, C, T]
    log_prior = search.log_prior
    own_prior = log_prior.repeat_interleave(n_each, dim=1)  # of the passage of a candidate, [B, C]
    found = own_prior.isfinite() & (keys[:, :, 0] != IGNORE_INDEX)
    same = _same(keys) & found.unsqueeze(1)  # [B, C, C]
    if thorough:
        joint = log_prior.unsqueeze(1) + seq_logp  # log p(z_k|x) p(y|x,z_k), [B, C, K]
    else:
        alike = (own_prior + seq_logp).unsqueeze(1).masked_fill(~same, -torch.inf)
        joint = alike.unflatten(2, (n_docs, n_each)).amax(dim=3)
    candidate_scores = joint.logsumexp(dim=2).masked_fill(~found, -torch.inf)
    repeated = same.tril(diagonal=-1).any(dim=2)
    scores, best = candidate_scores.masked_fill(repeated, -torch.inf).topk(n_return, dim=1)
    question = torch.arange(len(best), device=best.device).unsqueeze(1)
    missing = scores.isneginf().unsqueeze(2)  # fewer answers than asked for
    log_posterior = torch.where(missing, log_prior.unsqueeze(1), joint[question, best])
    answer = keys[question, best].masked_fill(missing, IGNORE_INDEX).flatten(0, 1)
    return RagGeneration(
        sequences=answer.masked_fill(answer == IGNORE_INDEX, search.pad_id),
        scores=scores.flatten(),
        supporting_rows=search.rows.gather(1, log_posterior.argmax(dim=2)).flatten(),
        rows=search.rows,
        doc_scores=search.doc_scores,
        log_prior=log_prior,
        log_posterior=log_posterior.log_softmax(dim=2).flatten(0, 1),
        candidates=keys.masked_fill(keys == IGNORE_INDEX, search.pad_id),
        candidate_scores=candidate_scores,
        lengths=(answer != IGNORE_INDEX).sum(dim=1),
        loss=search.loss(),
    )


def _n_each(search: Search) -> int:
    """Return how many answers each passage proposes."""
    config = search.config
    if search.streamer is not None:
        raise ValueError(
            f"streamer: expected None, because RAG-Sequence chooses between finished answers, "
            f'got {type(search.streamer).__name__}; marginal="token" can stream'
        )
    if config.num_beams > 1:
        refuse(vars(config), {"guidance_scale": 1.0}, "because it keeps one cache for all beams")
        n_each = config.num_beams
    else:
        n_each = search.n_return if config.do_sample else 1
    most = search.n_docs * n_each
    if search.n_return > most:
        raise ValueError(
            f"num_return_sequences: expected at most {most}, {n_each} for each of {search.n_docs} "
            f"passages, got {search.n_return}"
        )
    return int(n_each)


def _same(keys: Tensor) -> Tensor:
    """Return which candidates `[B, C, T]` of a question are equal, `[B, C, C]`."""
    return (keys.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1)


def _logp_under_each(
    search: Search, reading: Reading, answers: Tensor, own_logp: Tensor, n_each: int
) -> Tensor:
    """Return log p(y|x,z_k) of each candidate `[n * n_each, T]` under each passage, `[.., K]`.

    Equal candidates of a question are scored once, and not under passages that proposed them, of
    which `own_logp` `[n * n_each]` has the scores, nor under missing passages, whose score is 0. As
    many rows run at once as in the search that found the candidates.
    """
    n_docs = search.n_docs
    keys = answers.unflatten(0, (-1, n_docs * n_each))  # [b, C, T]
    same = _same(keys)
    first = same.int().argmax(dim=2)  # of equal candidates, [b, C]
    question = torch.arange(len(keys), device=keys.device).unsqueeze(1)
    passage = torch.arange(n_docs, device=keys.device).repeat_interleave(n_each)
    logp = own_logp.new_zeros(*first.shape, n_docs)
    logp[question, first, passage] = own_logp.view_as(first)
    found = search.log_prior.flatten()[reading.contexts].isfinite().view(-1, n_docs)  # [b, K]
    proposed = (same & found[:, passage].unsqueeze(1)).any(dim=2)  # by a passage that is there
    wanted = torch.zeros_like(logp, dtype=torch.bool)
    wanted[question, first] = proposed.unsqueeze(2) & found.unsqueeze(1)
    wanted[question, first, passage] = False
    pairs = wanted.nonzero()
    for part in pairs.split(len(answers)) if len(pairs) else ():
        row = part[:, 0] * n_docs + part[:, 2]
        labels = keys[part[:, 0], part[:, 1]]
        state = search.adapter.select(reading.state, row)
        hidden = search.adapter.hidden(reading.ids[row], reading.mask[row], labels, state=state)
        scored = label_logp(search.adapter.head(), hidden, labels).sum(dim=2).squeeze(1)
        logp[part.unbind(dim=1)] = scored.to(logp.dtype)
    return logp[question, first].flatten(0, 1)
