"""Stateless operations of retrieval-augmented training.

    doc_scores        inner products of queries with their K passages
    token_logp        log p(y_t | x, z_k, y_<t) from hidden states, without logits
    rag_token_nll     RAG-Token negative log-likelihood, from hidden states and scores
    rag_sequence_nll  RAG-Sequence negative log-likelihood, from hidden states and scores
    mips_topk         exact maximum inner product search

Sizes: B questions, K passages per question, T target tokens, H generator hidden, V vocabulary,
D embedding width, N passages in the index.

Bad input raises a ValueError that names the argument, what was expected and what was given. No
function waits for a GPU: a bad value in a CUDA tensor, such as a label outside the vocabulary,
makes a loss NaN, and a later call raises the error. Double backward and forward-mode
differentiation raise a RuntimeError. If `torch.set_float32_matmul_precision` allows TF32, logits
use it, and so does `mips_topk` in the torch backend, which then sorts rounded products;
`doc_scores` does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastrag.messages import shown
from fastrag.ops import checks
from fastrag.ops.doc_scores import check_arguments as _check_doc_scores
from fastrag.ops.doc_scores import doc_scores as _doc_scores
from fastrag.ops.marginal_nll import divide
from fastrag.ops.marginal_nll import marginal_nll as _marginal_nll
from fastrag.ops.mips_topk import check_arguments as check_search
from fastrag.ops.mips_topk import mips_topk as _mips_topk
from fastrag.ops.positions import IGNORE_INDEX
from fastrag.ops.token_logp import token_logp as _token_logp

__all__ = [
    "doc_scores",
    "mips_topk",
    "rag_sequence_nll",
    "rag_token_nll",
    "token_logp",
]


@overload
def doc_scores(
    query_emb: Tensor,
    passage_emb: Tensor,
    *,
    rows: Tensor | None = ...,
    tau: float | Tensor = ...,
    scale: Tensor | None = ...,
    offset: Tensor | None = ...,
    return_log_prior: Literal[False] = ...,
) -> Tensor: ...


@overload
def doc_scores(
    query_emb: Tensor,
    passage_emb: Tensor,
    *,
    rows: Tensor | None = ...,
    tau: float | Tensor = ...,
    scale: Tensor | None = ...,
    offset: Tensor | None = ...,
    return_log_prior: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def doc_scores(
    query_emb: Tensor,
    passage_emb: Tensor,
    *,
    rows: Tensor | None = None,
    tau: float | Tensor = 1.0,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    return_log_prior: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Score each question's K passages by inner product, differentiably.

        doc_scores[b,k] = query_emb[b] . passage_emb[b,k] / tau    (Lewis et al. 2020, sec. 2.2)
        log_prior[b,k]  = log_softmax_k(doc_scores)[b,k] = log p(z_k | x_b)

    Gradient: d query_emb[b] = sum_k d doc_scores[b,k] passage_emb[b,k] / tau, and
    d passage_emb[b,k] = d doc_scores[b,k] query_emb[b] / tau. Memory: except in the torch backend,
    neither the gathered vectors [B, K, D] nor decoded int8 vectors are stored.

    Args:
        query_emb: question embeddings. `[B, D]`, floating point, differentiable.
        passage_emb: passage embeddings. Either `[B, K, D]`, one vector per hit, or the whole index
            matrix `[N, D]` together with `rows`. Floating point, differentiable; or int8 codes of
            the vectors `offset + scale * code`, which get no gradient.
        rows: rows of the index. `[B, K]`, int64. -1 is a missing hit: it scores -inf, gets no
            probability and no gradient, and its vector is not read. Required with `[N, D]`; with
            `[B, K, D]`, a negative row marks a missing hit and other values are ignored.
        tau: temperature, a positive number or a 0-d tensor, which may receive a gradient.
        scale: scale of int8 codes. `[D]`, float32, not differentiable. Required with int8, None
            otherwise.
        offset: offset of int8 codes, such as the mean of the corpus. `[D]`, float32, not
            differentiable; None for zero.
        return_log_prior: whether to return log p(z|x) as well.

    Returns:
        doc_scores `[B, K]`, float32 (float64 if an embedding is); with `return_log_prior` the pair
        (doc_scores, log_prior). If all hits of a question are missing, its log_prior is -inf.

    Raises:
        ValueError: shapes, dtypes or devices disagree, K = 0, int8 without scale, scale or offset
            that requires grad or is given with another dtype, tau is not positive (a tensor is
            checked on a CPU only), or (on a CPU) a row is outside [-1, N).
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run; double backward;
            forward-mode differentiation.

    Note:
        The maths is in float32 (float64 for float64), also under autocast. Deterministic. Backends:
        cpp (on a CPU, except float64), triton (CUDA), torch.

    Example:
        >>> import torch, fastrag.functional as F
        >>> query = torch.tensor([[1.0, 2.0]])
        >>> index = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> F.doc_scores(query, index, rows=torch.tensor([[2, 0, -1]]))
        tensor([[3., 1., -inf]])
    """
    _check_doc_scores(query_emb, passage_emb, rows, scale, offset)
    rows = None if rows is None else rows.long()
    checks.check_tau(tau)
    checks.check_no_tangent(
        "doc_scores",
        query_emb,
        passage_emb,
        scale,
        offset,
        tau if isinstance(tau, Tensor) else None,
    )
    if isinstance(tau, Tensor):
        dtype = torch.promote_types(torch.float32, query_emb.dtype)
        query_emb, tau = query_emb.to(dtype) / tau.to(dtype), 1.0
    if passage_emb.dim() == 2 and rows is not None:
        n_rows = passage_emb.shape[0]
        if n_rows == 0:
            raise ValueError(
                f"passage_emb: expected at least one row, got {checks.show(passage_emb)}"
            )
        checks.check_rows(rows, n_rows)
        if torch.is_grad_enabled() and passage_emb.requires_grad:
            # Two questions may share a row. torch's indexing adds their gradients in a fixed order.
            passage_emb = passage_emb[rows.clamp(0, n_rows - 1)]
            # This can only happen on a GPU. NaN, as in the op, instead of an invalid access.
            passage_emb = passage_emb.masked_fill((rows >= n_rows).unsqueeze(2), torch.nan)
    scores, log_prior = _doc_scores(query_emb, passage_emb, rows, float(tau), scale, offset)
    if return_log_prior is True:
        return scores, log_prior
    return (scores, log_prior) if checks.flag("return_log_prior", return_log_prior) else scores


def token_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Compute the log-probability of every label under every passage, from hidden states and head.

        logits = softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap)
        token_logp[b,k,t] = log_softmax_v(logits[b,k,t])[labels[b,t]] = log p(y_t | x, z_k, y_<t)

    Gradient: d logits[b,k,t,v] = d token_logp[b,k,t] (1[v = labels[b,t]] - softmax_v). Memory: one
    workspace of logits; `[B, K, T, V]` is never stored. Backward recomputes the logits slice by
    slice of V; if the head is frozen, the forward computes the gradient of hidden instead.

    Args:
        hidden: decoder hidden states before the head. `[B, K, T, H]`, floating point, any
            strides, differentiable.
        weight: head matrix. `[V, H]`, floating point, differentiable; its dtype may differ from
            that of hidden (autocast) and its gradient has its own dtype.
        labels: target token ids, the same for the K passages. `[B, T]`, int64.
        bias: head bias. `[V]`, floating point, differentiable.
        softcap: positive bound of the logits (Gemma 2), or None.
        logit_scale: factor before the softcap (Cohere; Granite: 1 / logits_scaling).
        ignore_index: label that does not count; its token_logp is 0 and has no gradient.

    Returns:
        token_logp `[B, K, T]`, float32 (float64 if hidden is).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or (on a CPU) a label is outside [0, V).
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run; double backward;
            forward-mode differentiation.

    Note:
        The maths is in float32 (float64 for float64), also under autocast.
        `FASTRAG_WORKSPACE_BYTES` bounds the workspace. On a GPU, a label outside [0, V) gives NaN,
        and a later call raises the error. Deterministic on a CPU. Backends: cpp (on a CPU, except
        float64), triton (CUDA, except float64), torch.

    Example:
        >>> import torch, fastrag.functional as F
        >>> hidden, weight = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4)
        >>> F.token_logp(hidden, weight, torch.tensor([[1, 0, -100]]))
        tensor([[[-1.6094, -1.6094,  0.0000],
                 [-1.6094, -1.6094,  0.0000]]])
    """
    checks.check_floating("hidden", hidden, "[B, K, T, H]")
    softcap = checks.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.check_int64("labels", labels, "[B, T]", (hidden.shape[0], hidden.shape[2]))
    ignore_index = checks.whole("ignore_index", ignore_index)
    if hidden.shape[1] == 0:
        raise ValueError(
            f"hidden: expected at least one passage, got K = 0 ({checks.show(hidden)})"
        )
    checks.check_device(hidden=hidden, weight=weight, bias=bias, labels=labels)
    checks.check_no_tangent("token_logp", hidden, weight, bias)
    grads = torch.is_grad_enabled()
    logp, *_ = _token_logp(
        hidden,
        weight,
        bias,
        labels,
        softcap,
        float(logit_scale),
        ignore_index,
        grads and hidden.requires_grad,
        grads and weight.requires_grad,
        grads and bias is not None and bias.requires_grad,
    )
    return logp


def rag_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    example_weight: Tensor | None = None,
    valid_rows: Tensor | None = None,
    return_posterior: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the RAG-Token negative log-likelihood, a marginal over the passages per token.

        nll[b] = -sum_t log sum_k exp(log_prior[b,k] + token_logp[b,k,t])
        log_prior = log_softmax_k(doc_scores)          (Lewis et al. 2020, sec. 2.1, RAG-Token)

    The sum is over positions whose label counts. Label smoothing e applies to the marginal
    distribution: log M[y] becomes (1 - e) log M[y] + e mean_v log M[v], where
    M[v] = sum_k exp(log_prior[k] + log p_k(v)).

    Gradient: with the posterior w[b,k,t] = softmax_k(log_prior + token_logp),
    d logits[b,k,t,v] = w (softmax_v - 1[v = label]) and d doc_scores[b,k] = sum_t (prior - w).
    Memory: gradients are computed in the forward, chunk by chunk. Apart from them, only O(B K T)
    numbers and one workspace of logits exist; `[B, K, T, V]` is never stored.

    Args:
        hidden: decoder hidden states before the head. `[B, K, T, H]` or Hugging Face's
            `[B*K, T, H]`, floating point, any strides, differentiable.
        weight: head matrix. `[V, H]`, floating point, differentiable; its dtype may differ from
            that of hidden (autocast) and its gradient has its own dtype.
        labels: target token ids. `[B, T]`, int64.
        doc_scores: raw retrieval scores. `[B, K]`, floating point, differentiable; -inf marks a
            missing passage. An example without any passage has loss 0 and gradient 0.
        bias: head bias. `[V]`, floating point, differentiable.
        softcap: positive bound of the logits (Gemma 2), or None.
        logit_scale: factor before the softcap (Cohere; Granite: 1 / logits_scaling).
        label_smoothing: e in [0, 1).
        ignore_index: label that does not count.
        reduction: "mean" (sum of example_weight * nll over the normalizer), "sum" or "none".
        normalizer: divisor of "mean": a number or a 0-d tensor, which the host does not read if it
            is on a GPU. Default: the number of labels in this call that count. For gradient
            accumulation and data parallelism, pass the number of the whole batch, over all
            micro-batches and processes. If it is 0, the loss is 0.
        example_weight: weight of each example, in the numerator only. `[B]`, floating point,
            differentiable. With "none" it multiplies the result.
        valid_rows: positions b * T + t whose label counts, ascending, padded with -1. `[R]`,
            int32. On a GPU, the other positions are then skipped, without waiting for their number.
            On a CPU, which finds the positions itself, they are only checked. On a GPU, an example
            with a counted label that is missing or repeated in the list has loss NaN, and a later
            call raises the error.
        return_posterior: whether to return log p(z | x, y_t) as well.

    Returns:
        loss, float32 (float64 if hidden is): `[]`, or `[B]` with reduction "none". With
        `return_posterior` the pair (loss, log_posterior `[B, K, T]`). log_posterior has no
        gradient, and is the prior at positions that do not count.

    Raises:
        ValueError: shapes, dtypes or devices disagree, K = 0, or (on a CPU) a label is outside
            [0, V) or a score is NaN or +inf (message names the place).
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run; double backward;
            forward-mode differentiation.

    Note:
        The maths is in float32 (float64 for float64), also under autocast. Gradients are scaled
        once, in backward. With reduction "none", backward recomputes the logits unless the head is
        frozen. Deterministic on a CPU. `FASTRAG_WORKSPACE_BYTES` bounds the workspace. On a GPU, a
        bad label or score makes the loss of its example NaN, and a later call raises the error.
        Backends: cpp (on a CPU, except float64), triton (CUDA, except float64), torch.

    Example:
        >>> import torch, fastrag.functional as F
        >>> _ = torch.manual_seed(0)
        >>> hidden = torch.randn(2, 3, 4, 8, requires_grad=True)  # B, K, T, H
        >>> weight, labels = torch.randn(10, 8), torch.tensor([[1, 2, 3, -100], [4, 5, 6, 7]])
        >>> loss = F.rag_token_nll(hidden, weight, labels, torch.randn(2, 3))
        >>> loss.backward()
        >>> hidden.grad.shape, hidden.grad[0, :, 3].abs().max().item()
        (torch.Size([2, 3, 4, 8]), 0.0)
    """
    loss, log_posterior, _ = rag_nll(
        "token",
        hidden,
        weight,
        labels,
        doc_scores,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        example_weight=example_weight,
        valid_rows=valid_rows,
    )
    return (loss, log_posterior) if checks.flag("return_posterior", return_posterior) else loss


def rag_sequence_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    example_weight: Tensor | None = None,
    valid_rows: Tensor | None = None,
    return_posterior: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the RAG-Sequence negative log-likelihood, a marginal over the passages per target.

        nll[b] = -log sum_k exp(log_prior[b,k] + sum_t token_logp[b,k,t])
        log_prior = log_softmax_k(doc_scores)       (Lewis et al. 2020, sec. 2.1, RAG-Sequence)

    The sum over t is over positions whose label counts. With label smoothing e, token_logp becomes
    (1 - e) log p_k(y_t) + e mean_v log p_k(v) before the marginal; the prior is not smoothed.

    Gradient: with the posterior w[b,k] = softmax_k(log_prior + sum_t token_logp),
    d logits[b,k,t,v] = w (softmax_v - 1[v = label]) and d doc_scores[b,k] = prior - w.
    Memory: as `rag_token_nll`. If the K*T rows of logits of an example do not fit the workspace,
    the gradients recompute the logits slice by slice of V.

    Args:
        hidden: decoder hidden states before the head. `[B, K, T, H]` or Hugging Face's
            `[B*K, T, H]`, floating point, any strides, differentiable.
        weight: head matrix. `[V, H]`, floating point, differentiable; its dtype may differ from
            that of hidden (autocast) and its gradient has its own dtype.
        labels: target token ids. `[B, T]`, int64.
        doc_scores: raw retrieval scores. `[B, K]`, floating point, differentiable; -inf marks a
            missing passage. An example without any passage has loss 0 and gradient 0.
        bias: head bias. `[V]`, floating point, differentiable.
        softcap: positive bound of the logits (Gemma 2), or None.
        logit_scale: factor before the softcap (Cohere; Granite: 1 / logits_scaling).
        label_smoothing: e in [0, 1).
        ignore_index: label that does not count.
        reduction: "mean" (sum of example_weight * nll over the normalizer), "sum" or "none".
        normalizer: as in `rag_token_nll`. Default: the number of labels that count.
        example_weight: weight of each example, in the numerator only. `[B]`, floating point,
            differentiable. With "none" it multiplies the result.
        valid_rows: as in `rag_token_nll`. `[R]`, int32.
        return_posterior: whether to return log p(z | x, y) as well.

    Returns:
        loss, float32 (float64 if hidden is): `[]`, or `[B]` with reduction "none". With
        `return_posterior` the pair (loss, log_posterior `[B, K]`). log_posterior has no gradient,
        and is the prior for an example without counted labels.

    Raises:
        ValueError: shapes, dtypes or devices disagree, K = 0, or (on a CPU) a label is outside
            [0, V) or a score is NaN or +inf (message names the place).
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run; double backward;
            forward-mode differentiation.

    Note:
        As `rag_token_nll`. Hugging Face's RagSequenceForGeneration adds the prior at the second
        target position and multiplies it by V under smoothing; docs/math.md lists the differences.

    Example:
        >>> import torch, fastrag.functional as F
        >>> hidden, weight = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4)
        >>> labels, scores = torch.tensor([[1, 2, -100]]), torch.zeros(1, 2)
        >>> F.rag_sequence_nll(hidden, weight, labels, scores, reduction="none")  # 2 log 5
        tensor([3.2189])
    """
    loss, log_posterior, _ = rag_nll(
        "sequence",
        hidden,
        weight,
        labels,
        doc_scores,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        example_weight=example_weight,
        valid_rows=valid_rows,
    )
    return (loss, log_posterior) if checks.flag("return_posterior", return_posterior) else loss


def mips_topk(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k rows of the index with the largest inner product, exactly.

        scores[b], rows[b] = top-k over n of query_emb[b] . index_emb[n], ties by lowest row

    No gradient: for training, score the rows again with `doc_scores`. Memory: at most the scores of
    one block of passages; `[B, N]` is never stored.

    Args:
        query_emb: questions. `[B, D]`, floating point.
        index_emb: all passages. `[N, D]`, floating point; or int8 codes of the vectors
            `offset + scale * code`, for which the search is then exact.
        k: number of rows to return, at least 1; it may be more than N.
        exclude: rows that must not be returned: `[B, E]` int64, E rows for each question (-1 for no
            row), or `[N]` bool for all questions.
        scale: scale of int8 codes. `[D]`, float32. Required with int8, None otherwise.
        offset: offset of int8 codes. `[D]`, float32; None for zero.

    Returns:
        scores `[B, k]` float32, descending, and rows `[B, k]` int64. If fewer than k rows remain,
        the other scores are -inf and their rows -1.

    Raises:
        ValueError: shapes, dtypes or devices disagree, int8 without scale, scale or offset with
            another dtype, k < 1, the index is empty, or (on a CPU) an excluded row is outside
            [-1, N), a query or a row of the index is not finite (message names the row) or an
            inner product overflows float32.
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run.

    Note:
        Inner products are in float32 (float64 for float64), also under autocast. Backends: cpp (on
        a CPU, except float64), triton (CUDA; small searches run in torch), torch. With cpp and
        triton, the bits of a score do not depend on the batch, the number of threads, the processor
        or the blocks of the index: elements are added in order, with one rounding for each. An int8
        vector is rounded once, as `fma(scale, code, offset)`. `FASTRAG_WORKSPACE_BYTES` bounds the
        block of the torch backend.

    Example:
        >>> import torch, fastrag.functional as F
        >>> index = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> F.mips_topk(torch.tensor([[1.0, 2.0]]), index, 2, exclude=torch.tensor([[2]]))
        (tensor([[2., 1.]]), tensor([[1, 0]]))
    """
    k = checks.whole("k", k)
    check_search(query_emb, index_emb, k, exclude, scale, offset)
    if exclude is not None and exclude.dtype != torch.bool:
        checks.check_rows(exclude, index_emb.shape[0], "exclude", "none")
        exclude = exclude.long()
    return _mips_topk(query_emb.detach(), index_emb.detach(), k, exclude, scale, offset)


class RagNLL(NamedTuple):
    """The loss, the log-posterior log p(z|x,y), and the log-probabilities of the labels."""

    loss: Tensor
    log_posterior: Tensor
    token_logp: Tensor


def rag_nll(
    marginal: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    example_weight: Tensor | None = None,
    valid_rows: Tensor | None = None,
) -> RagNLL:
    """Compute either loss by name, with posterior and token log-probabilities from the same pass.

    Args:
        marginal: "token" or "sequence".
        hidden, weight, labels, doc_scores, bias, softcap, logit_scale, label_smoothing,
            ignore_index, reduction, normalizer, example_weight, valid_rows: as in `rag_token_nll`.

    Returns:
        loss and log_posterior as in `rag_token_nll` or `rag_sequence_nll`, and token_logp
        `[B, K, T]` in the dtype of the loss, without gradient: 0 where the label does not count.
        RAG-Sequence with label smoothing returns smoothed log-probabilities.

    Raises:
        ValueError, RuntimeError: as `rag_token_nll`; an unknown `marginal`.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4)
        >>> labels, scores = torch.tensor([[1, 2, -100]]), torch.zeros(1, 2)
        >>> rag_nll("token", hidden, weight, labels, scores).token_logp[0, 0]  # -log 5
        tensor([-1.6094, -1.6094,  0.0000])
    """
    if not isinstance(marginal, str) or marginal not in ("token", "sequence"):
        raise ValueError(f"marginal: expected 'token' or 'sequence', got {shown(marginal)}")
    checks.check_floating("doc_scores", doc_scores, "[B, K]")
    n_examples, n_passages = doc_scores.shape
    if n_passages == 0:
        raise ValueError(
            f"doc_scores: expected at least one passage per question, got K = 0 "
            f"({checks.show(doc_scores)})"
        )
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        sizes = (n_examples * n_passages, None, None)
        checks.check_floating("hidden", hidden, "[B*K, T, H]", sizes)
        hidden = hidden.unflatten(0, (n_examples, n_passages))
    else:
        full = (n_examples, n_passages, None, None)
        checks.check_floating("hidden", hidden, "[B, K, T, H], or [B*K, T, H]", full)
    softcap = checks.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.check_int64("labels", labels, "[B, T]", (n_examples, hidden.shape[2]))
    checks.check_label_smoothing(label_smoothing)
    ignore_index = checks.whole("ignore_index", ignore_index)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {shown(reduction)}")
    if normalizer is not None:
        checks.check_normalizer(normalizer, reduction)
    if example_weight is not None:
        checks.check_floating("example_weight", example_weight, "[B]", (n_examples,))
    if valid_rows is not None:
        checks.check_integer("valid_rows", valid_rows, "[R]")
    checks.check_device(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        doc_scores=doc_scores,
        example_weight=example_weight,
        valid_rows=valid_rows,
    )
    checks.check_no_tangent("marginal_nll", hidden, weight, bias, doc_scores, example_weight)
    deferred, grads = reduction == "none", torch.is_grad_enabled()
    total, nll, log_posterior, token_logp, *_ = _marginal_nll(
        hidden,
        weight,
        bias,
        labels,
        doc_scores,
        None if deferred else example_weight,
        valid_rows,
        marginal,
        softcap,
        float(logit_scale),
        float(label_smoothing),
        ignore_index,
        deferred,
        grads and hidden.requires_grad,
        grads and weight.requires_grad,
        grads and bias is not None and bias.requires_grad,
        grads and doc_scores.requires_grad,
    )
    if deferred:
        loss = nll if example_weight is None else nll * example_weight.to(nll.dtype)
    elif reduction == "sum":
        loss = total
    else:
        loss = divide(total, (labels != ignore_index).sum() if normalizer is None else normalizer)
    return RagNLL(loss, log_posterior, token_logp)
