"""Scores of K gathered passages and their log-softmax, and the gradient of the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.registry import Op, Outputs, Provider, Shape, directly, ours
from benchmarks.ops.heads import compiled

FORWARD, BOTH = MODES = ("forward", "forward-backward")


@dataclass
class Problem:
    query_emb: Tensor  # [B, D]
    index_emb: Tensor  # [N, D], no gradient
    rows: Tensor  # [B, K]

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype, the query as a new leaf."""
        query = self.query_emb.detach().to(dtype, copy=True).requires_grad_()
        return replace(self, query_emb=query, index_emb=self.index_emb.to(dtype))


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    n_examples, n_passages, n_rows, width = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows = torch.randint(n_rows, (n_examples, n_passages), generator=generator, device=device)
    query = normal(n_examples, width) / width**0.5
    return Problem(query.requires_grad_(), normal(n_rows, width), rows)


Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def with_scores(function: Scores) -> Callable[[str, Problem], Outputs]:
    def run(mode: str, p: Problem) -> Outputs:
        with torch.set_grad_enabled(mode == BOTH):
            scores, log_prior = function(p.query_emb, p.index_emb, p.rows)
        if mode == FORWARD:
            return scores, log_prior
        # Different for each k: otherwise the gradient of a log-softmax would be zero.
        upstream = torch.linspace(0.0, 1.0, log_prior.shape[1]).to(log_prior).expand_as(log_prior)
        dquery = torch.autograd.grad((scores, log_prior), p.query_emb, (upstream, upstream))
        return scores.detach(), log_prior.detach(), *dquery

    return run


@with_scores
def oracle(query_emb: Tensor, index_emb: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    from fastrag import reference

    scores = reference.doc_scores(query_emb, index_emb, rows)
    return scores, reference.log_prior(scores)


@directly
@with_scores
def fastrag(query_emb: Tensor, index_emb: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    import fastrag.functional as F

    return F.doc_scores(query_emb, index_emb, rows=rows, return_log_prior=True)


def batched_product(query_emb: Tensor, index_emb: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = (index_emb[rows] @ query_emb.unsqueeze(2)).squeeze(2)
    return scores, scores.float().log_softmax(1)


@directly
def copy(mode: str, p: Problem) -> Outputs:
    """Read and write as many bytes as the op needs at least."""
    numel = p.rows.numel() * p.index_emb.shape[1] // (1 if mode == BOTH else 2)
    return (p.index_emb.view(-1)[:numel].clone(),)


def flops(mode: str, shape: Shape) -> float:
    n_examples, n_passages, _, width = shape
    return 2.0 * n_examples * n_passages * width * (2 if mode == BOTH else 1)


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Return the bytes of the K vectors of each query; the backward reads them again."""
    return itemsize * flops(mode, shape) / 2


OP = Op(
    name="doc_scores",
    about="inner products with K rows of the index, and log p(z|x)",
    dims=("B", "K", "N", "D"),
    modes=MODES,
    outputs=("doc_scores", "log_prior", "dquery"),
    make=make,
    make_checked=make,
    oracle=oracle,
    providers=(
        Provider("copy", copy, "ceiling"),
        ours("cpp", fastrag, devices=("cpu",)),
        ours("triton", fastrag, devices=("cuda",)),
        ours("torch", fastrag),
        Provider("bmm", directly(with_scores(batched_product))),
        Provider("bmm-compile", directly(with_scores(compiled(batched_product))), compiles=True),
    ),
    ceiling="copy",
    checked=((3, 4, 50, 17), (4, 5, 100, 768)),
    shapes={
        "cpu": (
            (8, 5, 100_000, 768),  # a training batch of DPR vectors
            (64, 50, 100_000, 768),  # a reranking batch
        ),
        "cuda": (
            (64, 10, 1_000_000, 768),  # a training batch of DPR vectors
            (256, 100, 1_000_000, 768),  # a reranking batch
        ),
    },
    small=(16, 20, 20_000, 256),
    flops=flops,
    bytes=least_bytes,
    curves={"K": tuple((64, n, 100_000, 768) for n in (5, 10, 20, 50, 100, 200))},
)
