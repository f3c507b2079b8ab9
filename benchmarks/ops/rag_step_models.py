"""A training step of fastrag, of Hugging Face, and of the generator alone, on the same problem.

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

from benchmarks.ops import rag_step_corpus as texts
from benchmarks.ops.rag_step_corpus import BOS, EOS, PAD

Range = Callable[[str], AbstractContextManager[Any]]
LEARNING_RATE = 1e-5


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

    shape: tuple[int, ...]  # B, K, L, T, H, N
    dtype: torch.dtype  # of 16 bits: float32 weights under torch.autocast
    seed: int
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
        generator = torch.Generator().manual_seed(problem.seed)
        size = size_of(width)
        vectors = torch.randn(n_passages, size.dim, generator=generator)
        self.vectors = (size.vector_scale * vectors).to(problem.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)
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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, foreach=True)
        self._make_moments()

    def _make_moments(self) -> None:
        """Make AdamW's moments: otherwise they would be missing in the first backward only."""
        group = self.optimizer.param_groups[0]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        group["lr"] = 0.0
        self.optimizer.step()
        group["lr"] = LEARNING_RATE
        self.optimizer.zero_grad()

    def make_model(self) -> Any:
        raise NotImplementedError

    def loss(self) -> Tensor:
        """The mean over label tokens."""
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
        model = kind(
            config=self._config(),
            question_encoder=parts.question_encoder,
            generator=parts.generator,
            retriever=None if parts.is_given else self._retriever(),
        )
        labels = parts.batch["labels"]
        self.n_labels = int((labels >= 0).sum())
        self.inputs = {"labels": parts.decoder_ids()}
        if parts.is_given:
            ids, mask = parts.corpus.contexts(parts.rows)
            self.inputs |= {"context_input_ids": ids, "context_attention_mask": mask}
        self.question = {name: parts.batch[name] for name in ("input_ids", "attention_mask")}
        return model.train()

    def _config(self) -> Any:
        from transformers import RagConfig

        parts = self.parts
        return RagConfig.from_question_encoder_generator_configs(
            parts.question_encoder.config,
            parts.generator.config,
            n_docs=parts.n_docs,
            max_combined_length=parts.context_width,
            retrieval_vector_size=parts.vectors.shape[1],
            title_sep=texts.TITLE_SEP,
            doc_sep=texts.DOC_SEP,
        )

    def _retriever(self) -> Any:
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
        return RagRetriever(self._config(), tokenizer, tokenizer, index=index)

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
