"""Literal PyTorch oracles of every op, in the dtype of their inputs; for reading and for tests.

Each function is the equation and nothing else: no chunks, no in-place work, gradients by autograd.
It holds the [B, K, T, V] log-probabilities that the ops never hold, and imports nothing of ours.
Sizes as everywhere: B questions, K passages, T target tokens, H hidden, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def doc_scores(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None = None,
    tau: float | Tensor = 1.0,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """s[b,k] = q_b . d_bk / tau, -inf where rows is -1.  [B, D] and [B, K, D] or [N, D] -> [B, K].

    With scale [D] (and offset [D]) passage_emb holds codes c: d = offset + scale c, in their dtype.

    Example:
        >>> import torch
        >>> doc_scores(torch.eye(2), torch.eye(2), rows=torch.tensor([[0, 1], [1, -1]]))
        tensor([[1., 0.],
                [1., -inf]])
    """
    vectors = passage_emb
    if rows is not None and passage_emb.dim() == 2:
        vectors = passage_emb[rows.clamp(min=0)]
    if scale is not None:
        vectors = scale * vectors if offset is None else offset + scale * vectors
    if rows is None:
        return torch.einsum("bd,bkd->bk", query_emb, vectors) / tau
    missing = rows < 0
    vectors = vectors.masked_fill(missing.unsqueeze(2), 0.0)
    scores = torch.einsum("bd,bkd->bk", query_emb, vectors) / tau
    return scores.masked_fill(missing, -torch.inf)


def log_prior(doc_scores: Tensor) -> Tensor:
    """log p(z|x) = log_softmax_k(s); -inf for a missing passage.  [B, K] -> [B, K].

    Example:
        >>> import torch
        >>> log_prior(torch.tensor([[0.0, 0.0, -torch.inf]])).exp()
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    missing = doc_scores == -torch.inf
    # A row without any passage must not reach log_softmax: its gradient there is NaN, not 0.
    finite = doc_scores.masked_fill(missing.all(1, keepdim=True), 0.0)
    return finite.log_softmax(1).masked_fill(missing, -torch.inf)


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """z = softcap * tanh(logit_scale * (h W^T + bias) / softcap).  [..., H] -> [..., V].

    Example:
        >>> import torch
        >>> logits(torch.ones(1, 2), torch.eye(2), softcap=2.0)
        tensor([[0.9242, 0.9242]])
    """
    z = hidden @ weight.t()
    z = logit_scale * (z if bias is None else z + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """log p(y_t | x, z_k, y_<t), 0 where the label is ignored.  [B, K, T, H], [B, T] -> [B, K, T].

    Example:
        >>> import torch
        >>> token_logp(torch.zeros(1, 1, 2, 3), torch.zeros(4, 3), torch.tensor([[0, -100]]))
        tensor([[[-1.3863,  0.0000]]])
    """
    logp = logits(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)
    counts = (labels != ignore_index).unsqueeze(1)
    return torch.where(counts, _pick(logp, labels, ignore_index), 0.0)


def rag_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """nll_b = -sum_t log sum_k exp(log_prior_bk + token_logp_bkt), and log p(z | x, y_t).

    Smoothing acts on the marginal distribution M: (1 - e) log M_y + e mean_v log M_v.
    Returns nll [B] and log_posterior [B, K, T], which is the prior at ignored positions.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 1, 3), torch.zeros(4, 3)
        >>> rag_token_nll(hidden, weight, torch.tensor([[0]]), torch.zeros(1, 2))[0]
        tensor([1.3863])
    """
    logp = logits(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)  # [B, K, T, V]
    prior = _prior_of_live(doc_scores)
    counts = _counts(labels, doc_scores, ignore_index)
    marginal = torch.logsumexp(prior[:, :, None, None] + logp, dim=1)  # [B, T, V]
    gold = _pick(marginal.unsqueeze(1), labels, ignore_index).squeeze(1)
    smoothed = (1.0 - label_smoothing) * gold + label_smoothing * marginal.mean(-1)
    nll = -torch.where(counts, smoothed, 0.0).sum(1)
    joint = prior.unsqueeze(2) + _pick(logp, labels, ignore_index)
    log_posterior = torch.where(
        counts.unsqueeze(1), joint.log_softmax(1), log_prior(doc_scores).unsqueeze(2)
    )
    return nll, log_posterior


def rag_sequence_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """nll_b = -log sum_k exp(log_prior_bk + sum_t token_logp_bkt), and log p(z | x, y).

    Smoothing: token_logp becomes (1 - e) log p(y) + e mean_v log p(v) before the marginal.
    Returns nll [B] and log_posterior [B, K], which is the prior where no label counts.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 1, 3), torch.zeros(4, 3)
        >>> rag_sequence_nll(hidden, weight, torch.tensor([[0]]), torch.zeros(1, 2))[0]
        tensor([1.3863])
    """
    logp = logits(hidden, weight, bias, softcap, logit_scale).log_softmax(-1)  # [B, K, T, V]
    prior = _prior_of_live(doc_scores)
    counts = _counts(labels, doc_scores, ignore_index)
    gold = _pick(logp, labels, ignore_index)
    smoothed = (1.0 - label_smoothing) * gold + label_smoothing * logp.mean(-1)
    seq_logp = torch.where(counts.unsqueeze(1), smoothed, 0.0).sum(2)  # [B, K]
    joint = prior + seq_logp
    active = counts.any(1)
    nll = -torch.where(active, joint.logsumexp(1), 0.0)
    log_posterior = torch.where(active.unsqueeze(1), joint.log_softmax(1), log_prior(doc_scores))
    return nll, log_posterior


def retriever_term(
    objective: str,
    doc_scores: Tensor,
    token_logp: Tensor,
    counts: Tensor,
    tau_lm: float = 1.0,
) -> Tensor:
    """What "emdr2", "pdist" or "replug" adds for the retriever; token_logp [B, K, T] is constant.

        emdr2     -sum_t m_t log sum_k exp(a_k + l_kt)
        pdist     sum_k t_k (log t_k - a_k),  t = softmax_k(sum_t m_t l_kt / tau_lm)
        replug    the same, t = softmax_k(mean over the counted l_kt / tau_lm)

    Returns one number per example [B]; 0 without passages or without labels that count.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[[0.9], [0.1]]]).log()
        >>> retriever_term("pdist", torch.zeros(1, 2), logp, torch.ones(1, 1, dtype=torch.bool))
        tensor([0.3681])
    """
    terms = []
    for scores, logp, counted in zip(doc_scores, token_logp.detach(), counts, strict=True):
        here = scores != -torch.inf
        logp = logp[here][:, counted]  # [passages that are there, labels that count]
        if not logp.numel():
            terms.append(scores.new_zeros(()))
            continue
        prior = scores[here].log_softmax(0)
        if objective == "emdr2":
            terms.append(-(prior.unsqueeze(1) + logp).logsumexp(0).sum())
            continue
        said = logp.mean(1) if objective == "replug" else logp.sum(1)
        target = (said / tau_lm).softmax(0)
        terms.append((target * (target.log() - prior)).sum())
    return torch.stack(terms)


def straight_through_term(
    doc_scores: Tensor,
    token_logp: Tensor,
    counts: Tensor,
    n_read: int,
    marginal: str,
    max_ratio: float = 100.0,
) -> Tensor:
    """What "topk" adds for the retriever; token_logp [B, K, T] is constant.

        -log sum_k P_k L_k,  P = pi + p - sg(p),  p = softmax_k(s),  pi = p over the n_read best

    L_k is p(y|x,z_k) (marginal "sequence"), or p(y_t|x,z_k) in a sum over t ("token"); where a
    passage outside pi has L_k > max_ratio sum_j pi_j L_j, that bound takes the place of its L_k.
    Returns one number per example [B]; 0 without passages or without labels that count.

    Example:
        >>> import torch
        >>> logp = torch.tensor([[[0.9], [0.1]]]).log()
        >>> counts = torch.ones(1, 1, dtype=torch.bool)
        >>> straight_through_term(torch.tensor([[1.0, 0.0]]), logp, counts, 1, "token")
        tensor([0.1054])
    """
    terms = []
    for scores, logp, counted in zip(doc_scores, token_logp.detach(), counts, strict=True):
        here = scores != -torch.inf
        logp = logp[here][:, counted]
        if not logp.numel():
            terms.append(scores.new_zeros(()))
            continue
        likelihood = (logp if marginal == "token" else logp.sum(1, keepdim=True)).exp()
        prior = scores[here].softmax(0)
        best = prior.detach().argsort(descending=True)[:n_read]
        read = torch.zeros_like(prior)
        read[best] = prior.detach()[best] / prior.detach()[best].sum()
        bound = max_ratio * (read.unsqueeze(1) * likelihood).sum(0)
        through = (read + prior - prior.detach()).unsqueeze(1)
        terms.append(-(through * likelihood.minimum(bound)).sum(0).log().sum())
    return torch.stack(terms)


def independence_shares(
    log_target: Tensor, log_proposal: Tensor, proposals: Tensor, uniforms: Tensor
) -> Tensor:
    """Shares of the passages among the states of a Metropolis chain per example, [B, K].

        w = target / proposal;  accept z' instead of z if u < min(1, w(z') / w(z))

    proposals [B, m] are the draws from the proposal; the first is the first state.

    Example:
        >>> import torch
        >>> target, q = torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> independence_shares(target, q, torch.tensor([[0, 1, 0, 0]]), torch.full((1, 4), 0.5))
        tensor([[0.2500, 0.7500]])
    """
    shares = torch.zeros_like(log_target)
    for b in range(len(log_target)):
        weight = (log_target[b] - log_proposal[b]).exp()
        state = int(proposals[b, 0])
        for i, proposal in enumerate(proposals[b].tolist()):
            if i and uniforms[b, i] < min(1.0, float(weight[proposal] / weight[state])):
                state = proposal
            shares[b, state] += 1.0 / proposals.shape[1]
    return shares


def pruned_nll(
    logp: Tensor,
    read_logp: Tensor,
    read: Tensor,
    doc_scores: Tensor,
    counts: Tensor,
    marginal: str,
) -> Tensor:
    """RAG's negative log-likelihood with gradients to the generator for some passages only, [B].

    logp [B, K, T] are the token log-probabilities of all passages and are constant; for the
    passages in `read` [B, K] bool, those in read_logp, with gradients, take their place.

    Example:
        >>> import torch
        >>> logp, read = torch.zeros(1, 2, 1), torch.tensor([[True, False]])
        >>> counts = torch.ones(1, 1, dtype=torch.bool)
        >>> pruned_nll(logp, logp.log_softmax(1), read, torch.zeros(1, 2), counts, "token")
        tensor([0.2877])
    """
    mixed = torch.where(read.unsqueeze(2), read_logp, logp.detach())
    prior = log_prior(doc_scores)
    if marginal == "token":
        return -torch.where(counts, (prior.unsqueeze(2) + mixed).logsumexp(1), 0.0).sum(1)
    sums = torch.where(counts.unsqueeze(1), mixed, 0.0).sum(2)
    return -torch.where(counts.any(1), (prior + sums).logsumexp(1), 0.0)


def reduce(
    nll: Tensor,
    labels: Tensor,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    example_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Weighs nll [B] by example and reduces it; "mean" divides by the labels that count.

    Example:
        >>> import torch
        >>> reduce(torch.tensor([2.0, 4.0]), torch.tensor([[1, 2], [3, -100]]))
        tensor(2.)
    """
    weighted = nll if example_weight is None else nll * example_weight
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    count = (labels != ignore_index).sum() if normalizer is None else normalizer
    return weighted.sum() / count if count > 0 else weighted.sum() * 0.0


def mips_topk(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest inner products by (score descending, row ascending), from the full matrix.

    With scale [D] (and offset [D]) index_emb holds codes c: x = offset + scale c, in their dtype.
    Returns scores [B, k] float32 and rows [B, k]; -inf and -1 where fewer than k rows are left.

    Example:
        >>> import torch
        >>> mips_topk(torch.ones(1, 1), torch.tensor([[1.0], [3.0], [3.0]]), 2)
        (tensor([[3., 3.]]), tensor([[1, 2]]))
    """
    vectors = index_emb
    if scale is not None:
        vectors = scale * vectors if offset is None else offset + scale * vectors
    scores = (query_emb @ vectors.t()).float()
    if exclude is not None and exclude.dtype == torch.bool:
        scores[:, exclude] = -torch.inf
    elif exclude is not None:
        for b, rows in enumerate(exclude.tolist()):
            scores[b, [row for row in rows if 0 <= row < index_emb.shape[0]]] = -torch.inf
    scores = torch.nn.functional.pad(scores, (0, k), value=-torch.inf)
    best, rows = scores.sort(dim=1, descending=True, stable=True)
    best, rows = best[:, :k], rows[:, :k]
    return best, rows.masked_fill(best == -torch.inf, -1)


def _pick(logp: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """logp [B, K, T, V] at the labels [B, T] -> [B, K, T]; anything where a label is ignored."""
    index = labels.masked_fill(labels == ignore_index, 0)[:, None, :, None]
    return logp.gather(-1, index.expand(*logp.shape[:-1], 1)).squeeze(-1)


def _prior_of_live(scores: Tensor) -> Tensor:
    """log p(z|x), finite in examples without any passage, whose likelihood is masked later."""
    return log_prior(scores.masked_fill((scores == -torch.inf).all(1, keepdim=True), 0.0))


def _counts(labels: Tensor, scores: Tensor, ignore_index: int) -> Tensor:
    """[B, T]: the label counts and its example has a passage."""
    return (labels != ignore_index) & (scores != -torch.inf).any(1, keepdim=True)
