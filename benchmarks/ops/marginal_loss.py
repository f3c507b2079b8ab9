"""Forward and backward of the RAG marginal loss, from hidden states and scores.

Outputs: the loss summed over examples, and the gradients of hidden, weight and doc_scores. The
labels of the timed problem all count, so that every provider has the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import (
    HALF,
    Goal,
    Op,
    Outputs,
    Prepare,
    Provider,
    Shape,
    directly,
    needs,
)
from benchmarks.ops.heads import PAD, Head, compiled, gather, providers


@dataclass
class Problem:
    hidden: Tensor  # [B, K, T, H]
    weight: Tensor  # [V, H]
    doc_scores: Tensor  # [B, K], at least float32
    labels: Tensor  # [B, T]; PAD does not count

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.doc_scores

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype, as new leaves."""
        wide = torch.promote_types(dtype, torch.float32)
        hidden, weight, scores = (
            x.detach().to(kind, copy=True).requires_grad_()
            for x, kind in zip(self.leaves(), (dtype, dtype, wide), strict=True)
        )
        return replace(self, hidden=hidden, weight=weight, doc_scores=scores)

    def backward(self, loss: Tensor) -> Outputs:
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves()))


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    n_examples, n_passages, n_tokens, width, vocab = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=kind)

    hidden = normal(n_examples, n_passages, n_tokens, width).requires_grad_()
    weight = (normal(vocab, width) / width**0.5).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    scores = normal(n_examples, n_passages, kind=wide).requires_grad_()
    size = n_examples, n_tokens
    labels = torch.randint(PAD + 1, vocab, size, generator=generator, device=device)
    return Problem(hidden, weight, scores, labels)


def make_checked(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the same with the last label ignored, since Hugging Face's loss drops it anyway."""
    problem = make(shape, dtype, device)
    problem.labels[:, -1] = PAD
    return problem


def oracle(mode: str, p: Problem) -> Outputs:
    from fastrag import reference

    loss = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}[mode]
    nll, _ = loss(p.hidden, p.weight, p.labels, p.doc_scores, ignore_index=PAD)
    return p.backward(nll.sum())


@directly
def fastrag_loss(mode: str, p: Problem) -> Outputs:
    import fastrag.functional as F

    loss = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}[mode]
    options = {"reduction": "sum", "ignore_index": PAD}
    return p.backward(loss(p.hidden, p.weight, p.labels, p.doc_scores, **options))


def marginal(mode: str, token_logp: Tensor, doc_scores: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of token_logp [B, K, T], summed over examples."""
    prior = doc_scores.log_softmax(1)
    counts = labels != PAD
    if mode == "token":
        per_token = (prior.unsqueeze(2) + token_logp).logsumexp(1)
        return -torch.where(counts, per_token, 0.0).sum()
    seq_logp = torch.where(counts.unsqueeze(1), token_logp, 0.0).sum(2)
    return -(prior + seq_logp).logsumexp(1).sum()


def with_head(head: Head) -> Prepare:
    @directly
    def run(mode: str, p: Problem) -> Outputs:
        token_logp = head(p.hidden, p.weight, p.labels)
        return p.backward(marginal(mode, token_logp, p.doc_scores, p.labels))

    return run


@compiled
def _compiled_loss(
    mode: str, hidden: Tensor, weight: Tensor, scores: Tensor, labels: Tensor
) -> Any:
    return marginal(mode, gather(hidden, weight, labels), scores, labels)


@directly
def gather_compiled(mode: str, p: Problem) -> Outputs:
    return p.backward(_compiled_loss(mode, *p.leaves(), p.labels))


def transformers_loss(mode: str, p: Problem) -> Outputs:
    from transformers.models.rag import modeling_rag

    n_passages = p.hidden.shape[1]
    generator = SimpleNamespace(pad_token_id=PAD, bos_token_id=None)
    config = SimpleNamespace(n_docs=n_passages, bos_token_id=None, generator=generator)
    stub = SimpleNamespace(config=config)
    kind = modeling_rag.RagSequenceForGeneration
    if mode == "token":
        kind = modeling_rag.RagTokenForGeneration
        stub.marginalize = lambda *args: kind.marginalize(stub, *args)
    # get_nll shifts its targets left by one and appends a pad, which drops the last label.
    target = torch.cat([p.labels.new_ones(len(p.labels), 1), p.labels[:, :-1]], 1)
    logits = p.hidden.flatten(0, 1) @ p.weight.t()
    return p.backward(kind.get_nll(stub, logits, p.doc_scores, target).sum())


@directly
def transformers_autocast(mode: str, p: Problem) -> Outputs:
    with torch.autocast(p.hidden.device.type, dtype=p.hidden.dtype):
        return transformers_loss(mode, p)


def products(p: Problem) -> Outputs:
    """Return the gradients of hidden and weight if every gradient of a logit were the logit."""
    x, weight = p.hidden.detach().flatten(0, 2), p.weight.detach()
    if x.device.type == "cuda":
        # Rows padded to 128 bytes: with an odd vocabulary the fast products cannot be used.
        z = x.new_empty(len(x), -(-len(weight) // 64) * 64)[:, : len(weight)]
        torch.mm(x, weight.t(), out=z)
        return z @ weight, z.t() @ x
    from fastrag.ops import workspace

    n = len(weight) * len(x)
    buffer = workspace.take(-(-n * x.dtype.itemsize // torch.float32.itemsize))
    z = buffer.view(x.dtype)[:n].view(len(weight), len(x))
    torch.mm(weight, x.t(), out=z)
    dweight = workspace.advise(torch.empty_like(weight))
    torch.mm(z, x, out=dweight)
    dhidden = z.t() @ weight
    workspace.give_back(buffer)
    return dhidden, dweight


def multiplied(p: Problem) -> Problem:
    """Return the problem of a ceiling: in float32 if the processor does not multiply its dtype."""
    from fastrag.ops import workspace

    dtype = p.weight.dtype
    converted = not p.weight.is_cuda and dtype.itemsize == 2 and not workspace.multiplies(dtype)
    return p.to(torch.float32) if converted else p


def flops(mode: str, shape: Shape) -> float:
    """Count three products: logits, d hidden, d weight."""
    n_examples, n_passages, n_tokens, width, vocab = shape
    return 6.0 * n_examples * n_passages * n_tokens * width * vocab


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count hidden and weight, which are read, and their gradients; the rest is negligible."""
    n_examples, n_passages, n_tokens, width, vocab = shape
    return 2.0 * itemsize * width * (n_examples * n_passages * n_tokens + vocab)


def workspace_bytes(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Return the logits of all rows in float32, or the limit if they are larger, and the limit."""
    from fastrag.ops import workspace

    n_examples, n_passages, n_tokens, _, vocab = shape
    limit = workspace.workspace_bytes(device)
    return min(4 * n_examples * n_passages * n_tokens * vocab, limit), limit


HF = needs("transformers")
CURVE_PROVIDERS = ("gemms", "cpp", "triton", "gather", "linear-cross-entropy", "cce", "liger")

OP = Op(
    name="marginal_loss",
    about="loss and gradients of RAG-Token and RAG-Sequence from hidden states",
    dims=("B", "K", "T", "H", "V"),
    modes=("token", "sequence"),
    outputs=("loss", "dhidden", "dweight", "ddoc_scores"),
    make=make,
    make_checked=make_checked,
    oracle=oracle,
    providers=(
        Provider("gemms", lambda mode, p: partial(products, multiplied(p)), "ceiling"),
        *providers(fastrag_loss, with_head),
        Provider("gather-compile", gather_compiled, compiles=True),
        Provider("hf", directly(transformers_loss), missing=HF),
        Provider("hf-autocast", transformers_autocast, dtypes=HALF, missing=HF),
    ),
    ceiling="gemms",
    checked=(
        (3, 4, 5, 16, 131),  # nothing divides anything
        (2, 3, 4, 64, 50265),  # a real vocabulary
    ),
    shapes={
        "cpu": (
            (2, 5, 32, 512, 50265),  # BART's vocabulary, a short answer
            (4, 8, 16, 576, 49152),  # SmolLM2-135M
        ),
        "cuda": (
            (8, 5, 64, 1024, 50265),  # S1: BART-large, the paper's training batch
            (8, 5, 64, 1024, 50304),  # S1 with a vocabulary that is a multiple of 64
            (8, 10, 128, 1024, 50265),  # S2: BART-large, K = 10, long answers
            (8, 10, 128, 1024, 50304),  # S2, with that vocabulary
            (4, 8, 256, 2048, 128256),  # S3: Llama 3.2 1B
        ),
    },
    small=(2, 5, 16, 256, 8192),
    flops=flops,
    bytes=least_bytes,
    goals=(
        Goal("gemms", at_most=1.15),
        Goal("hf", at_least=1.9),
        Goal("gather", at_least=1.5),
        Goal("best peer", at_least=1.2),
    ),
    workspace=workspace_bytes,
    patience=10.0,  # for peers whose products in 16 bits the processor does not have
    curves={
        # around a short answer to five passages; the vocabulary is small enough for many points
        "B": tuple((n, 5, 32, 512, 16384) for n in (1, 2, 4, 8)),
        "K": tuple((2, n, 32, 512, 16384) for n in (1, 2, 5, 10, 20)),
        "T": tuple((2, 5, n, 512, 16384) for n in (8, 16, 32, 64, 128)),
        # from a toy's to that of Llama 3.2, and beyond
        "V": tuple((2, 5, 32, 512, n) for n in (4096, 8192, 16384, 32768, 65536, 131072)),
    },
    curve_providers=(*CURVE_PROVIDERS, "hf"),
)
