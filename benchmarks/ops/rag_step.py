"""One step of RAG training: fastrag's RagModel against Hugging Face's RAG classes.

    question encoder -> search -> contexts -> generator -> loss -> backward -> AdamW

Outputs: the loss (mean over label tokens), and the gradients of a weight in the question encoder's
first layer, of the generator's embedding, which is its head too, and of a weight in its decoder's
first layer. In the modes `-given` the passages of each question are given: there is no search, and
Hugging Face gets the contexts ready-made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.registry import Op, Provider, Shape, needs
from benchmarks.ops import rag_step_models as models
from benchmarks.ops.rag_step_models import Parts, Problem, Step

MODES = ("token", "sequence", "token-given", "sequence-given")
GIVEN = tuple(mode for mode in MODES if mode.endswith("-given"))
# Of the embedded data set's questions, in the mean, with <s> and </s>: for the count of FLOPs
QUESTION_TOKENS = 12


def make(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    return Problem(shape, dtype, seed, device)


def make_checked(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    """Answers of different lengths, none so short that Hugging Face's Sequence loses its prior."""
    return Problem(shape, dtype, seed, device, ragged=True)


def oracle(mode: str, problem: Problem) -> tuple[Tensor, ...]:
    """All in the open: contexts tokenised as texts, all logits, the equations of the paper."""
    from fastrag import reference

    parts = Parts(mode, problem)
    labels = parts.batch["labels"]
    with problem.autocast():
        query_emb = parts.question_encoder(
            input_ids=parts.batch["input_ids"], attention_mask=parts.batch["attention_mask"]
        ).pooler_output
        query_emb = query_emb.to(parts.question_encoder.dtype)
        vectors = parts.vectors.to(query_emb.dtype)
        rows = parts.rows
        if not parts.is_given:
            rows = (query_emb.detach() @ vectors.t()).topk(parts.n_docs, dim=1).indices
        doc_scores = (query_emb.unsqueeze(1) * vectors[rows]).sum(2)
        ids, mask = parts.corpus.contexts(rows)
        hidden = parts.generator.model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=parts.decoder_ids()[:, :-1].repeat_interleave(parts.n_docs, 0),
            use_cache=False,
        )[0].unflatten(0, (len(labels), parts.n_docs))
        nll = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}
        weight = parts.generator.lm_head.weight
        loss = nll[parts.marginal](hidden, weight, labels, doc_scores)[0].sum()
    loss = loss / (labels >= 0).sum()
    return (loss.detach(), *torch.autograd.grad(loss, parts.watched()))


def step(mode: str, ready: Step) -> tuple[Tensor, ...]:
    return ready()


@dataclass(frozen=True)
class HuggingFace(Provider):
    """Its retriever needs more than its loss does."""

    def why_not(self, device: str, dtype: str, mode: str) -> str:
        for module in () if mode in GIVEN else ("datasets", "faiss"):
            reason = needs(module)()
            if reason:
                return reason
        return super().why_not(device, dtype, mode)


def flops(mode: str, shape: Shape) -> float:
    """Matrix products, forward and twice backward; embeddings, scores and search are left out."""
    n_questions, n_docs, context_width, answer_width, width, _ = shape
    size = models.size_of(width)
    # of one token in one layer: four projections, two of the feed-forward net, twice attention
    around, between = 4 * width**2, 8 * width**2
    n_context, n_answer = n_questions * n_docs * context_width, n_questions * n_docs * answer_width
    encoder = n_context * (around + between + 2 * context_width * width)
    decoder = n_answer * (around + between + (answer_width + 1) * width)
    # queries and output of the decoder's tokens, keys and values of the encoder's
    across = (n_answer + n_context) * 2 * width**2 + n_answer * 2 * context_width * width
    head = n_answer * width * size.vocab
    question = n_questions * QUESTION_TOKENS * (around + between + 2 * QUESTION_TOKENS * width)
    products = size.layers * (encoder + decoder + across) + head + size.question_layers * question
    return 6.0 * products


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Weights and both moments of AdamW are read and written; the passages' vectors are read."""
    width, n_passages = shape[4:]
    searched = 0 if mode in GIVEN else n_passages * models.size_of(width).dim
    return 4.0 * (6 * models.n_parameters(width) + searched)


def memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Weights, gradients and moments, vectors twice; what is computed, with room to spare."""
    n_questions, n_docs, context_width, answer_width, width, n_passages = shape
    size = models.size_of(width)
    n_contexts = n_questions * n_docs
    kept = 16 * models.n_parameters(width) + 8 * n_passages * size.dim
    n_states = n_contexts * size.layers * (context_width * 2 + answer_width) * 32 * width
    return kept, 4 * (n_states + 6 * n_contexts * (answer_width + 1) * size.vocab)


# The paper's K, short answers, passages of some four facts. Not more passages, for a process has to
# tokenise them before its first step; the search is next to nothing of such a step (curve N).
BASE = (4, 5, 64, 16, 256, 10_000)
CURVES = {
    "B": tuple((n, 5, 64, 16, 256, 10_000) for n in (1, 2, 4, 8)),
    "K": tuple((4, n, 64, 16, 256, 10_000) for n in (1, 2, 5, 10)),
    "L": tuple((4, 5, n, 16, 256, 10_000) for n in (64, 128, 256)),
    "T": tuple((4, 5, 64, n, 256, 10_000) for n in (8, 16, 32, 64)),
    "N": tuple((4, 5, 64, 16, 256, n) for n in (10_000, 30_000, 100_000)),
}

OP = Op(
    name="rag_step",
    about="a whole training step: encode, search, contexts, generator, loss, backward, AdamW",
    dims=("B", "K", "L", "T", "H", "N"),
    modes=MODES,
    outputs=("loss", "dquestion", "dembedding", "ddecoder"),
    make=make,
    make_checked=make_checked,
    oracle=oracle,
    providers=(
        Provider(
            "generator",
            step,
            "forward and backward of the generator's body on the same contexts: no head, no loss",
            kind="ceiling",
            dtypes=("float32", "bfloat16"),
            setup=lambda mode, p: models.GeneratorStep(GIVEN[0], p),
            missing=needs("transformers"),
            memory=memory,
        ),
        Provider(
            "fastrag",
            step,
            "RagModel with FlatIndex and PassageStore",
            kind="ours",
            dtypes=("float32", "bfloat16"),
            setup=models.FastragStep,
            memory=memory,
        ),
        HuggingFace(
            "hf",
            step,
            "RagTokenForGeneration, RagSequenceForGeneration; RagRetriever on a flat faiss index",
            dtypes=("float32", "bfloat16"),
            setup=models.HfStep,
            missing=needs("transformers"),
            memory=memory,
        ),
    ),
    ceiling="generator",
    checked=((3, 4, 41, 7, 16, 50),),  # nothing divides anything
    shapes={
        "cpu": (BASE,),
        "cuda": (
            (8, 5, 256, 32, 768, 100_000),  # the paper's K on bart-base, DPR's 100-word passages
            (8, 10, 256, 64, 768, 100_000),
        ),
    },
    small=(2, 2, 48, 8, 16, 200),
    flops=flops,
    bytes=least_bytes,
    patience=2.0,
    curves=CURVES,
    curve_providers=("fastrag", "hf"),
)
