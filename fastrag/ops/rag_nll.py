"""RAG-Token and RAG-Sequence by name: arguments checked, one operation called, its loss reduced.

The functions of `fastrag.functional` and `RagLoss` are this one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastrag.messages import shown
from fastrag.ops import checks
from fastrag.ops.grads import needs_grad
from fastrag.ops.marginal_nll import marginal_nll
from fastrag.ops.positions import IGNORE_INDEX
from fastrag.ops.reduction import divide


class RagNLL(NamedTuple):
    """What `rag_nll` returns: the loss, log p(z|x,y), and the token_logp that made them."""

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
    """Either loss by name, with all that its one pass found out.

    Args:
        marginal: "token" or "sequence".
        hidden, weight, labels, doc_scores, bias, softcap, logit_scale, label_smoothing,
            ignore_index, reduction, normalizer, example_weight, valid_rows: as in
            `fastrag.functional.rag_token_nll`.

    Returns:
        loss and log_posterior as there, and token_logp `[B, K, T]` float32, without gradient: 0
        where the label does not count, smoothed where RAG-Sequence smooths it.

    Raises:
        ValueError, RuntimeError: as there; an unknown `marginal`.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4)
        >>> labels, scores = torch.tensor([[1, 2, -100]]), torch.zeros(1, 2)
        >>> rag_nll("token", hidden, weight, labels, scores).token_logp[0, 0]  # -log 5
        tensor([-1.6094, -1.6094,  0.0000])
    """
    if not isinstance(marginal, str) or marginal not in ("token", "sequence"):
        raise ValueError(f"marginal: expected 'token' or 'sequence', got {shown(marginal)}")
    checks.check_floating("doc_scores", doc_scores)
    checks.check_ndim("doc_scores", doc_scores, "[B, K]")
    n_examples, n_passages = doc_scores.shape
    if n_passages == 0:
        raise ValueError(
            f"doc_scores: expected at least one passage per question, got K = 0 "
            f"({checks.show(doc_scores)})"
        )
    checks.check_tensor("hidden", hidden)
    if hidden.dim() == 3:
        checks.check_shape("hidden", hidden, (n_examples * n_passages, None, None), "[B*K, T, H]")
        hidden = hidden.unflatten(0, (n_examples, n_passages))
    else:
        expected = (n_examples, n_passages, None, None)
        checks.check_shape("hidden", hidden, expected, "[B, K, T, H], or [B*K, T, H]")
    softcap = checks.check_head(hidden, weight, bias, softcap, logit_scale)
    checks.check_labels(labels, n_examples, hidden.shape[2])
    checks.check_label_smoothing(label_smoothing)
    ignore_index = checks.whole("ignore_index", ignore_index)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {shown(reduction)}")
    if normalizer is not None:
        checks.check_normalizer(normalizer, reduction)
    if example_weight is not None:
        checks.check_floating("example_weight", example_weight)
        checks.check_shape("example_weight", example_weight, (n_examples,), "[B]")
    if valid_rows is not None:
        checks.check_integer("valid_rows", valid_rows)
        checks.check_ndim("valid_rows", valid_rows, "[R]")
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
    deferred = reduction == "none"
    total, nll, log_posterior, token_logp, *_ = marginal_nll(
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
        *(needs_grad(x) for x in (hidden, weight, bias, doc_scores)),
    )
    if deferred:
        loss = nll if example_weight is None else nll * example_weight.to(nll.dtype)
    elif reduction == "sum":
        loss = total
    else:
        loss = divide(total, (labels != ignore_index).sum() if normalizer is None else normalizer)
    return RagNLL(loss, log_posterior, token_logp)
