"""What the loss tests share: inputs, one factory so that all see the same hard cases; oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference

IGNORE = -100
LOSSES = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}
ORACLES = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}

both_marginals = pytest.mark.parametrize("marginal", ["token", "sequence"])
with_and_without_smoothing = pytest.mark.parametrize(
    "smoothing", [0.0, 0.1], ids=["hard", "smoothed"]
)


@dataclass
class Problem:
    """Inputs of rag_token_nll, rag_sequence_nll and token_logp."""

    hidden: Tensor  # [B, K, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [B, T]
    doc_scores: Tensor  # [B, K]
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, as fresh leaves that require grad."""
        leaves = {
            name: x.detach().to(dtype).requires_grad_()
            for name in ("hidden", "weight", "doc_scores", "bias")
            if (x := getattr(self, name)) is not None
        }
        return replace(self, **leaves)

    def leaves(self) -> dict[str, Tensor]:
        names = ("hidden", "weight", "doc_scores", "bias")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def head(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.labels, self.doc_scores


# B, K, T, H, V: one comment per regime
SHAPES = {
    "plain": (2, 3, 4, 5, 7),
    "one passage": (2, 1, 3, 4, 6),  # the marginal is the identity
    "one token": (3, 4, 1, 5, 7),  # targets of one token
    "one of each": (1, 1, 1, 3, 2),
    "odd": (3, 5, 7, 16, 131),  # nothing divides anything
}
# Enough numbers of each gradient for a comparison of errors to mean something.
MANY = (24, 5, 7, 16, 131)


def make(
    shape: tuple[int, int, int, int, int] = SHAPES["plain"],
    *,
    dtype: torch.dtype = torch.float64,
    head: str = "plain",
    padding: bool = True,
    missing: bool = True,
    scale: float = 1.0,
) -> Problem:
    """Random inputs; `head` is "plain", "bias" or "softcap" (with bias and scale).

    The last label of the first example is ignored, and its last passage is missing, where there
    are enough to leave one.
    """
    n_examples, n_passages, n_tokens, width, vocab = shape
    hidden = scale * torch.randn(n_examples, n_passages, n_tokens, width, dtype=dtype)
    weight = torch.randn(vocab, width, dtype=dtype)
    labels = torch.randint(vocab, (n_examples, n_tokens))
    doc_scores = 2.0 * torch.randn(n_examples, n_passages, dtype=dtype)
    if padding and n_tokens > 1:
        labels[0, -1] = IGNORE
    if missing and n_passages > 1:
        doc_scores[0, -1] = -torch.inf
    extra: dict[str, Any] = {}
    if head != "plain":
        extra["bias"] = torch.randn(vocab, dtype=dtype)
    if head == "softcap":
        extra |= {"softcap": 2.0, "logit_scale": 0.7}
    return Problem(hidden, weight, labels, doc_scores, **extra).to(dtype)


def grads(loss: Tensor, problem: Problem, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of every leaf by name."""
    leaves = problem.leaves()
    found = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


def oracle(marginal: str, problem: Problem, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss `[B]` and log-posterior of the reference."""
    return ORACLES[marginal](*problem.args(), **problem.head(), label_smoothing=smoothing)
