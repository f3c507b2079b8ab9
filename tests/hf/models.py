"""Tiny random RAG models of transformers: DPR with BART, T5 or GPT-2, and three passages."""

from __future__ import annotations

from typing import Any

import datasets
import faiss
import numpy as np
import torch
from torch import Tensor
from transformers import (
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    RagConfig,
    RagRetriever,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)
from transformers.models.rag.retrieval_rag import CustomHFIndex

from tests import tiny
from tests.architectures import generator

# By what the weights of a generator are multiplied: in its layers, and in its head.
BODIES = {"bart": 8.0, "t5_tied": 2.0, "gpt2": 4.0}
HEADS = {"bart": 3.0, "t5_tied": 0.25, "gpt2": 2.0}
EMBEDDINGS = ("shared", "lm_head", "wte", "wpe", "embed")
CLASSES = {"token": RagTokenForGeneration, "sequence": RagSequenceForGeneration}
DIM, N_DOCS, WIDTH = 16, 3, 16
TITLES = tiny.NAMES[:3]
TEXTS = [f"likes {colour}" for colour in tiny.COLOURS[:3]]
DPR = DPRConfig(**tiny.BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def vectors(n: int = 3, scale: float = 0.3) -> np.ndarray[Any, Any]:
    drawn = torch.randn(n, DIM, generator=torch.Generator().manual_seed(5))
    return (scale * drawn).numpy()


def dataset() -> datasets.Dataset:
    """Three passages with vectors, as transformers' custom index wants them."""
    columns = {"title": list(TITLES), "text": TEXTS, "embeddings": vectors().tolist()}
    return datasets.Dataset.from_dict(columns)


def config(generator_config: Any, **settings: Any) -> RagConfig:
    defaults = {
        "n_docs": N_DOCS,
        "retrieval_vector_size": DIM,
        "max_combined_length": WIDTH,
        "title_sep": " : ",
        "doc_sep": " asked ",
    }
    return RagConfig.from_question_encoder_generator_configs(
        DPR, generator_config, **defaults | settings
    )


def retriever(rag_config: RagConfig, kind: Any = "seq2seq") -> RagRetriever:
    """transformers' own, on a flat index of faiss."""
    indexed = dataset()
    datasets.disable_progress_bars()
    indexed.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    tokenizers = tiny.tokenizer("encoder"), tiny.tokenizer(kind)
    return RagRetriever(rag_config, *tokenizers, index=CustomHFIndex(DIM, indexed))


def rag(
    marginal: str = "token",
    name: str = "bart",
    *,
    retrieves: bool = False,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Any:
    """A RAG model in eval mode; the same weights for the same arguments."""
    torch.manual_seed(0)
    reader = generator(name, dtype=dtype)
    with torch.no_grad():  # so that passages matter and no token is certain
        reader.get_output_embeddings().weight.mul_(HEADS[name])
        for part, parameter in reader.named_parameters():
            if parameter.dim() == 2 and not any(word in part for word in EMBEDDINGS):
                parameter.mul_(BODIES[name])
    question_encoder = DPRQuestionEncoder(DPR).to(dtype)
    made = config(reader.config, **settings)
    found = None
    if retrieves:
        found = retriever(made, "causal" if name == "gpt2" else "seq2seq")
    return CLASSES[marginal](
        config=made, question_encoder=question_encoder, generator=reader, retriever=found
    ).eval()


def context_encoder(dtype: torch.dtype = torch.float64) -> DPRContextEncoder:
    torch.manual_seed(7)
    return DPRContextEncoder(DPR).to(dtype).eval()


def questions(n: int = 2) -> dict[str, Tensor]:
    """Questions `[n, S]` for the question encoder."""
    batch = tiny.tokenizer("encoder")(list(tiny.NAMES[:n]), return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def contexts(n_questions: int = 3, n_docs: int = N_DOCS, seed: int = 1) -> dict[str, Tensor]:
    """Random contexts of different lengths, right-padded, and scores of their passages."""
    drawn = torch.Generator().manual_seed(seed)
    n = n_questions * n_docs
    ids = torch.randint(4, tiny.VOCAB, (n, 8), generator=drawn)
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    scores = torch.randn(n_questions, n_docs, generator=drawn, dtype=torch.float64)
    return {
        "context_input_ids": ids.masked_fill(mask == 0, tiny.PAD),
        "context_attention_mask": mask,
        "doc_scores": scores,
    }


def labels(n_tokens: int = 5, start: int = tiny.BOS) -> Tensor:
    """Start token and answers `[3, n_tokens]`, of different lengths, padded."""
    drawn = torch.Generator().manual_seed(3)
    made = torch.randint(4, tiny.VOCAB, (3, n_tokens), generator=drawn)
    made[:, 0] = start
    made[1, 3:] = tiny.PAD
    made[2, 2:] = tiny.PAD  # one token: the second target is padding
    return made


def gradients(model: Any, loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a sum that weighs each example differently: of all parameters, and leaves."""
    wanted = [p for p in model.parameters() if p.requires_grad] + list(leaves)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    found = torch.autograd.grad((loss * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def same(got: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
