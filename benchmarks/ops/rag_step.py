"""One step of RAG training: fastrag's RagModel against Hugging Face's RAG classes.

    question encoder -> search -> contexts -> generator -> loss -> backward -> AdamW

Outputs: the loss (mean over label tokens), and the gradients of a weight in the question encoder's
first layer, of the generator's embedding, which is its head too, and of a weight in its decoder's
first layer. In the modes `-given` the passages of each question are given: nothing is searched, and
Hugging Face gets finished contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.registry import Op, Outputs, Prepare, Provider, Shape, needs
from benchmarks.ops import rag_step_models as models
from benchmarks.ops.rag_step_models import Parts, Problem

MODES = ("token", "sequence", "token-given", "sequence-given")
GIVEN = tuple(mode for mode in MODES if mode.endswith("-given"))
# Mean of the embedded data set's questions, with <s> and </s>: for the count of FLOPs.
QUESTION_TOKENS = 12


def make(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    return Problem(shape, dtype, seed, device)


def make_checked(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    """Return answers of different lengths, all long enough for Hugging Face's Sequence."""
    return Problem(shape, dtype, seed, device, ragged=True)


def oracle(mode: str, problem: Problem) -> Outputs:
    """Compute it literally: contexts tokenised as texts, all logits, the paper's equations."""
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


@dataclass(frozen=True)
class HuggingFace(Provider):
    """Hugging Face, whose retriever needs more packages than its loss."""

    def why_not(self, device: str, dtype: str, mode: str) -> str:
        reason = "" if mode in GIVEN else needs("datasets", "faiss")()
        return reason or super().why_not(device, dtype, mode)


def flops(mode: str, shape: Shape) -> float:
    """Count matrix products, forward and twice backward, without embeddings, scores and search."""
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
    """Count weights and AdamW's moments, read and written, and the passages' vectors, read."""
    width, n_passages = shape[4:]
    searched = 0 if mode in GIVEN else n_passages * models.size_of(width).dim
    return 4.0 * (6 * models.n_parameters(width) + searched)


def memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Bound weights, gradients, moments and vectors twice, and generously what is computed."""
    n_questions, n_docs, context_width, answer_width, width, n_passages = shape
    size = models.size_of(width)
    n_contexts = n_questions * n_docs
    kept = 16 * models.n_parameters(width) + 8 * n_passages * size.dim
    n_states = n_contexts * size.layers * (context_width * 2 + answer_width) * 32 * width
    return kept, 4 * (n_states + 6 * n_contexts * (answer_width + 1) * size.vocab)


# The paper's K, short answers, passages of about four facts. No more passages, since a process has
# to tokenise them before its first step, and the search is a negligible part of it (curve N).
BASE = (4, 5, 64, 16, 256, 10_000)
DIMS = ("B", "K", "L", "T", "H", "N")
ALONG = {"B": (1, 2, 4, 8), "K": (1, 2, 5, 10), "L": (64, 128, 256), "T": (8, 16, 32, 64)}
ALONG["N"] = (10_000, 30_000, 100_000)


def along(dim: str) -> tuple[Shape, ...]:
    place = DIMS.index(dim)
    return tuple((*BASE[:place], n, *BASE[place + 1 :]) for n in ALONG[dim])


def provider(
    name: str, prepare: Prepare, about: str, of: type[Provider] = Provider, kind: str = "peer"
) -> Provider:
    return of(
        name,
        prepare,
        about,
        kind,
        dtypes=("float32", "bfloat16"),
        missing=needs("transformers"),
        memory=memory,
    )


OP = Op(
    name="rag_step",
    about="a whole training step: encode, search, contexts, generator, loss, backward, AdamW",
    dims=DIMS,
    modes=MODES,
    outputs=("loss", "dquestion", "dembedding", "ddecoder"),
    make=make,
    make_checked=make_checked,
    oracle=oracle,
    providers=(
        provider(
            "generator",
            lambda mode, p: models.GeneratorStep(GIVEN[0], p),
            "forward and backward of the generator's body on the same contexts: no head, no loss",
            kind="ceiling",
        ),
        provider("fastrag", models.FastragStep, "RagModel, FlatIndex, PassageStore", kind="ours"),
        provider(
            "hf",
            models.HfStep,
            "RagTokenForGeneration, RagSequenceForGeneration; RagRetriever on a flat faiss index",
            of=HuggingFace,
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
    curves={dim: along(dim) for dim in ALONG},
    curve_providers=("fastrag", "hf"),
)
