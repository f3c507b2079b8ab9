"""One step of RAG training: fastrag's RagModel against Hugging Face's RAG classes.

    question encoder -> search -> contexts -> generator -> loss -> backward -> AdamW

Outputs: the loss (mean over label tokens), and the gradients of a weight in the question encoder's
first layer, of the generator's embedding, which is its head too, and of a weight in its decoder's
first layer. In the modes `-given` the passages of each question are given: nothing is searched, and
Hugging Face gets finished contexts.

Models start from the same random weights, since no package contains a BART or DPR of these sizes.
There is no dropout, so that the numbers of the providers can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import Op, Outputs, Provider, Shape, needs
from benchmarks.ops import rag_step_corpus as texts
from benchmarks.ops.rag_step_corpus import BOS, EOS, PAD

Range = Callable[[str], AbstractContextManager[Any]]
MODES = ("token", "sequence", "token-given", "sequence-given")
GIVEN = tuple(mode for mode in MODES if mode.endswith("-given"))
LEARNING_RATE = 1e-5
# Mean of the embedded data set's questions, with <s> and </s>: for the count of FLOPs.
QUESTION_TOKENS = 12


@dataclass(frozen=True)
class Size:
    """The generator and the question encoder, which are equally wide."""

    layers: int  # of the generator's encoder, and of its decoder
    heads: int
    vocab: int
    question_layers: int
    question_vocab: int
    dim: int  # D of the passages' vectors
    # Scale of the vectors: scores vary by about two, so that the best passages share the prior and
    # none has nearly all of it.
    vector_scale: float
    init_std: float = 0.02  # of all weights


# By H, the width.
SIZES = {
    # For the comparison with the oracle: an odd vocabulary, larger than that of the tokenizer, and
    # large weights, with which the answer depends on the passage: the question has a gradient.
    16: Size(1, 2, 4099, 1, 4099, dim=24, vector_scale=0.35, init_std=0.3),
    # BART and DPR with which two cores take about a second for a step: half the layers of bart-base
    # and a third of its width, but the vocabularies of BART and BERT and DPR's D.
    256: Size(3, 4, 50265, 4, 30522, dim=768, vector_scale=0.25),
    # facebook/bart-base and DPR-base
    768: Size(6, 12, 50265, 12, 30522, dim=768, vector_scale=0.08),
}


def size_of(width: int) -> Size:
    if width not in SIZES:
        raise ValueError(f"H: expected one of {', '.join(map(str, SIZES))}, got {width}")
    return SIZES[width]


def make_question_encoder(width: int) -> Any:
    from transformers import DPRConfig, DPRQuestionEncoder

    size = size_of(width)
    config = DPRConfig(
        vocab_size=size.question_vocab,
        hidden_size=width,
        num_hidden_layers=size.question_layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=size.init_std,
        pad_token_id=PAD,
        projection_dim=0 if size.dim == width else size.dim,
    )
    return DPRQuestionEncoder(config)


def make_generator(width: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    size = size_of(width)
    each = {"layers": size.layers, "attention_heads": size.heads, "ffn_dim": 4 * width}
    config = BartConfig(
        vocab_size=size.vocab,
        d_model=width,
        max_position_embeddings=1024,
        dropout=0.0,
        init_std=size.init_std,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in each.items()},
    )
    return BartForConditionalGeneration(config)


@functools.cache
def n_parameters(width: int) -> int:
    with torch.device("meta"):
        models = make_question_encoder(width), make_generator(width)
    return sum(parameter.numel() for model in models for parameter in model.parameters())


@dataclass(frozen=True)
class Problem:
    """The description of a step, from which `Parts` is made."""

    shape: Shape  # B, K, L, T, H, N
    dtype: torch.dtype  # of 16 bits: float32 weights under torch.autocast
    device: torch.device
    ragged: bool = False

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        return replace(self, dtype=dtype)

    def autocast(self) -> torch.autocast:
        half = self.dtype.itemsize == 2
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)


class Parts:
    """Models, passages, vectors and batch of a problem, made from its numbers.

    If the passages are given, there are only those, B*K of them.
    """

    def __init__(self, mode: str, problem: Problem) -> None:
        n_questions, n_docs, context_width, answer_width, width, n_passages = problem.shape
        self.marginal = mode.partition("-")[0]
        self.is_given = mode.endswith("-given")
        self.n_docs, self.context_width = n_docs, context_width
        if self.is_given:
            n_passages = n_questions * n_docs
        self.corpus = texts.corpus(
            n_passages, n_questions, context_width, answer_width, problem.ragged
        )
        self.rows = torch.arange(n_questions * n_docs, device=problem.device)
        self.rows = self.rows.view(n_questions, n_docs)
        # on the CPU, whatever the device: the same numbers everywhere
        generator = torch.Generator().manual_seed(0)
        size = size_of(width)
        vectors = torch.randn(n_passages, size.dim, generator=generator)
        self.vectors = (size.vector_scale * vectors).to(problem.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models = make_question_encoder(width), make_generator(width)
        wide = torch.promote_types(problem.dtype, torch.float32)
        self.question_encoder, self.generator = (
            model.to(problem.device, wide).train() for model in models
        )
        batch = texts.processor(context_width).collate(self.corpus.questions)
        self.batch = {name: x.to(problem.device) for name, x in batch.items()}

    def decoder_ids(self) -> Tensor:
        """Return start token and labels `[B, T + 1]`, padded with PAD."""
        labels = self.batch["labels"]
        start = labels.new_full((len(labels), 1), EOS)
        return torch.cat([start, labels.masked_fill(labels < 0, PAD)], 1)

    def watched(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return parameters to compare gradients of: at both ends of the graph and in between."""
        layer = self.question_encoder.question_encoder.bert_model.encoder.layer[0]
        generator = self.generator.model
        decoder = generator.decoder.layers[0]
        return layer.intermediate.dense.weight, generator.shared.weight, decoder.fc1.weight


class Step:
    """Zero the gradients, `loss`, backward, AdamW; returns the loss and the watched gradients."""

    model: Any

    def __init__(self, mode: str, problem: Problem) -> None:
        self.problem = problem
        self.parts = Parts(mode, problem)
        self.model = self.make_model()
        self.stage: Range = lambda name: nullcontext()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, foreach=True)
        # Make AdamW's moments: otherwise they would be missing in the first backward only.
        group = self.optimizer.param_groups[0]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        group["lr"] = LEARNING_RATE
        self.optimizer.zero_grad()

    def make_model(self) -> Any:
        raise NotImplementedError

    def loss(self) -> Tensor:
        """Return the mean over label tokens."""
        raise NotImplementedError

    def __call__(self) -> tuple[Tensor, ...]:
        with self.stage("optimizer"):
            self.optimizer.zero_grad()
        with self.problem.autocast():
            loss = self.loss()
        with self.stage("backward"):
            loss.backward()
        with self.stage("optimizer"):
            self.optimizer.step()
        grads = (parameter.grad for parameter in self.parts.watched())
        return (loss.detach(), *(grad for grad in grads if grad is not None))


class FastragStep(Step):
    def make_model(self) -> Any:
        from fastrag.index import FlatIndex
        from fastrag.nn import RagModel, TextEncoder

        parts = self.parts
        device = self.problem.device
        index = FlatIndex(parts.vectors.shape[1], device=device)
        index.add(parts.vectors)
        return RagModel(
            TextEncoder(parts.question_encoder, pooling="pooler"),
            None,
            parts.generator,
            index,
            parts.corpus.store().to(device),
            texts.processor(parts.context_width),
            n_docs=parts.n_docs,
            marginal=parts.marginal,
        ).train()

    def output(self) -> Any:
        rows = self.parts.rows if self.parts.is_given else None
        return self.model(**self.parts.batch, rows=rows)

    def loss(self) -> Tensor:
        return self.output().loss


class HfStep(Step):
    """Labels begin with the start token, which the loss shifts away: one column more."""

    def make_model(self) -> Any:
        from transformers.models.rag import modeling_rag

        parts = self.parts
        kind = getattr(modeling_rag, f"Rag{parts.marginal.title()}ForGeneration")
        encoder, generator = parts.question_encoder, parts.generator
        sizes = parts.n_docs, parts.context_width
        config = texts.rag_config(encoder.config, generator.config, *sizes)
        config.retrieval_vector_size = parts.vectors.shape[1]
        retriever = None if parts.is_given else self._retriever(config)
        model = kind(
            config=config, question_encoder=encoder, generator=generator, retriever=retriever
        )
        labels = parts.batch["labels"]
        self.n_labels = int((labels >= 0).sum())
        self.inputs = {"labels": parts.decoder_ids()}
        if parts.is_given:
            ids, mask = parts.corpus.contexts(parts.rows)
            self.inputs |= {"context_input_ids": ids, "context_attention_mask": mask}
        self.question = {name: parts.batch[name] for name in ("input_ids", "attention_mask")}
        return model.train()

    def _retriever(self, config: Any) -> Any:
        import datasets
        import faiss
        import pyarrow as pa
        from transformers import RagRetriever
        from transformers.models.rag.retrieval_rag import CustomHFIndex

        passages, vectors = self.parts.corpus.passages, self.parts.vectors.cpu()
        width, tokenizer = vectors.shape[1], texts.tokenizer()
        table = {
            "title": [passage.title for passage in passages],
            "text": [passage.text for passage in passages],
            "embeddings": pa.FixedSizeListArray.from_arrays(vectors.flatten().numpy(), width),
        }
        dataset = datasets.Dataset(pa.table(table))
        datasets.disable_progress_bars()
        dataset.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
        index = CustomHFIndex(width, dataset)
        return RagRetriever(config, tokenizer, tokenizer, index=index)

    def output(self) -> Any:
        if not self.parts.is_given:
            return self.model(**self.question, **self.inputs)
        # Computed as in its documentation for contexts that are at hand.
        query_emb = self.model.question_encoder(**self.question)[0]
        passage_emb = self.parts.vectors[self.parts.rows].to(query_emb.dtype)
        doc_scores = torch.bmm(query_emb.unsqueeze(1), passage_emb.transpose(1, 2)).squeeze(1)
        return self.model(**self.inputs, doc_scores=doc_scores)

    def loss(self) -> Tensor:
        return self.output().loss.sum() / self.n_labels


class GeneratorStep(Step):
    """Forward and backward of the generator's body, from given contexts: no head, no loss."""

    def make_model(self) -> Any:
        parts = self.parts
        ids, mask = parts.corpus.contexts(parts.rows)
        decoder_ids = parts.decoder_ids()[:, :-1].repeat_interleave(parts.n_docs, 0)
        self.inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
        return parts.generator.model

    def __call__(self) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        with self.problem.autocast():
            hidden = self.model(**self.inputs, use_cache=False)[0]
        hidden.backward(torch.ones_like(hidden))
        return ()


# ---------------------------------------------------------------------------------------- the entry


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
    size = size_of(width)
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
    searched = 0 if mode in GIVEN else n_passages * size_of(width).dim
    return 4.0 * (6 * n_parameters(width) + searched)


def memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Bound weights, gradients, moments and vectors twice, and, generously, the activations."""
    n_questions, n_docs, context_width, answer_width, width, n_passages = shape
    size = size_of(width)
    n_contexts = n_questions * n_docs
    kept = 16 * n_parameters(width) + 8 * n_passages * size.dim
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


def generator_step(mode: str, problem: Problem) -> Step:
    return GeneratorStep(GIVEN[0], problem)


LIMITS: dict[str, Any] = {
    "dtypes": ("float32", "bfloat16"),
    "missing": needs("transformers"),
    "memory": memory,
}

OP = Op(
    name="rag_step",
    about="a whole training step: encode, search, contexts, generator, loss, backward, AdamW",
    dims=DIMS,
    modes=MODES,
    outputs=("loss", "dquestion", "dembedding", "ddecoder"),
    make=Problem,
    # answers of different lengths, all long enough for Hugging Face's Sequence
    make_checked=functools.partial(Problem, ragged=True),
    oracle=oracle,
    providers=(
        Provider("generator", generator_step, "ceiling", **LIMITS),
        Provider("fastrag", FastragStep, "ours", **LIMITS),
        HuggingFace("hf", HfStep, **LIMITS),
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
