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

from fastrag import functional
from fastrag.generation.search import each_of, in_order, join_answers
from fastrag.generation.settings import refuse
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.generation.search import Reading, Search
    from fastrag.nn.generators import GeneratorAdapter


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
        answer, hidden = search.generate(reading, n_each)
        parts.append(each_of(reading.contexts, n_each))
        answers.append(answer)
        if thorough:
            part_logp.append(_logp_under_each(search, reading, answer, n_each))
        else:
            part_logp.append(_seq_logp(search.adapter, hidden, answer).squeeze(1))
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


def _logp_under_each(search: Search, reading: Reading, answers: Tensor, n_each: int) -> Tensor:
    """Return log p(y|x,z_k) of each candidate `[n * n_each, T]` under each passage, `[.., K]`.

    As many rows run at once as in the search that found the candidates.
    """
    n_docs = search.n_docs
    keys = answers.unflatten(0, (-1, n_docs * n_each))  # [b, C, T]
    first = _same(keys).int().argmax(dim=2)  # of equal candidates
    question, candidate = (first == torch.arange(first.shape[1]).to(first)).nonzero().unbind(dim=1)
    contexts = each_of(question, n_docs).split(len(answers) // n_docs * n_docs)
    labels = keys[question, candidate].split(len(answers) // n_docs)
    logp = []
    for rows, part in zip(contexts, labels, strict=True):
        state = search.adapter.select(reading.state, rows)
        hidden = search.adapter.hidden(reading.ids[rows], reading.mask[rows], part, state=state)
        logp.append(_seq_logp(search.adapter, hidden, part))
    table = torch.cat(logp)  # [U, K]
    place = torch.zeros_like(first)
    place[question, candidate] = torch.arange(len(table), device=first.device)
    return table[place.gather(1, first).flatten()]


def _seq_logp(adapter: GeneratorAdapter, hidden: Tensor, answers: Tensor) -> Tensor:
    """Return log p(y|x,z) of answers `[n, T]`, `[n, K]`, from the states `[n, K, T, H]`."""
    head = adapter.head()
    token_logp = functional.token_logp(
        hidden,
        head.weight,
        answers,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE_INDEX,
    )
    return token_logp.sum(dim=2)
