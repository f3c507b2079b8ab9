"""IndexRetriever: transformers' RagRetriever on an index and passages of fastrag."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from transformers import RagRetriever
from transformers.models.rag.retrieval_rag import Index as HFIndex

from fastrag.data import RagProcessor, Template
from fastrag.data.processor import MAX_PASSAGE, shortest
from fastrag.index import Index, PassageStore


def rag_processor(
    config: Any, question_tokenizer: Any, generator_tokenizer: Any, **settings: Any
) -> RagProcessor:
    """Make the processor that writes passages and question as a Hugging Face RAG model does.

        context = prefix + title + title_sep + text + doc_sep + question

    A passage without a title is its text alone. Question and template are never cut; the passage
    is, to fit `max_combined_length`.

    Args:
        config: transformers' RagConfig.
        question_tokenizer: the question encoder's tokenizer.
        generator_tokenizer: the generator's tokenizer.
        settings: further arguments of `RagProcessor`, which replace those from the config.

    Returns:
        The processor, which `PassageStore.build` takes as well.

    Raises:
        ValueError: as `RagProcessor`.

    Example:
        >>> processor = rag_processor(model.config, *tokenizers)        # doctest: +SKIP
        >>> passages = PassageStore.build(corpus, processor)            # doctest: +SKIP
    """
    seq2seq = config.generator.is_encoder_decoder
    prefix = getattr(config.generator, "prefix", None) or ""
    positions = getattr(config.question_encoder, "max_position_embeddings", None)
    defaults = {
        "kind": "seq2seq" if seq2seq else "causal",
        "template": Template(
            context=f"{prefix}{{passage}}{config.doc_sep}{{question}}",
            passage=f"{{title}}{config.title_sep}{{text}}",
            answer="{answer}" if seq2seq else " {answer}",
        ),
        "max_question": positions,
        "max_passage": shortest(MAX_PASSAGE, positions),
        "max_context": config.max_combined_length,
    }
    return RagProcessor(question_tokenizer, generator_tokenizer, **defaults | settings)


class IndexRetriever(RagRetriever):
    """Retrieve for a Hugging Face RAG model from an index of fastrag.

    All questions of a batch are searched at once.

    Args:
        config: transformers' RagConfig.
        index: vectors of the passages.
        passages: the passages, in the same order.
        question_tokenizer: the question encoder's tokenizer, with which questions are decoded.
        generator_tokenizer: the generator's tokenizer.
        processor: builds the contexts, in which no question is cut. None: transformers builds them
            from the texts, as its own retriever does, and cuts them on the right.

    Raises:
        ValueError: index or passages of another kind or of different lengths, vectors of another
            width than the question encoder's, or passages that another processor tokenised.
        ImportError: the package datasets, which transformers asks for, is not installed.

    Example:
        >>> retriever = IndexRetriever(config, index, passages, *tokenizers)    # doctest: +SKIP
        >>> model.set_retriever(retriever)                                      # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        index: Index,
        passages: PassageStore,
        question_tokenizer: Any,
        generator_tokenizer: Any,
        processor: RagProcessor | None = None,
    ) -> None:
        check_parts(index, passages, processor)
        if len(index) != len(passages):
            raise ValueError(
                f"index: expected one vector per passage, got {len(index)} vectors and "
                f"{len(passages)} passages"
            )
        encoder = config.question_encoder
        dim = getattr(encoder, "projection_dim", 0) or encoder.hidden_size
        if index.dim != dim:
            raise ValueError(
                f"index: expected vectors of width {dim} as the question encoder gives, got "
                f"{index.dim}"
            )
        if processor is not None:
            processor.check(passages)
        searched = _SearchedIndex(index, passages)
        super().__init__(config, question_tokenizer, generator_tokenizer, index=searched)
        self.batch_size = sys.maxsize  # transformers would search for eight questions at a time
        self.processor = processor
        self.passages = passages

    def postprocess_docs(
        self,
        docs: Any,
        input_strings: Any,
        prefix: str | None,
        n_docs: int,
        return_tensors: str | None = None,
    ) -> tuple[Any, Any]:
        """Join passages and questions to the generator's inputs; see RagRetriever.

        Raises:
            ValueError: an empty question, or one that leaves no room for a passage.
        """
        if self.processor is None:
            return super().postprocess_docs(docs, input_strings, prefix, n_docs, return_tensors)
        batch = self.processor.collate([{"question": each} for each in input_strings])
        rows = torch.tensor([each["row"] for each in docs]).to(self.passages.device)
        prompt = [batch[name].to(rows.device) for name in ("prompt_ids", "prompt_mask")]
        contexts = self.processor.contexts(self.passages, rows, *prompt)
        ids, mask = contexts.ids.cpu(), contexts.mask.cpu()
        return (ids, mask) if return_tensors == "pt" else (ids.numpy(), mask.numpy())


def check_parts(index: object, passages: object, processor: object) -> None:
    """Raise ValueError unless index, passages and, if given, processor are fastrag's."""
    parts: list[tuple[str, object, type]] = [
        ("index", index, Index),
        ("passages", passages, PassageStore),
    ]
    if processor is not None:
        parts.append(("processor", processor, RagProcessor))
    for name, given, kind in parts:
        if not isinstance(given, kind):
            raise ValueError(
                f"{name}: expected a fastrag {kind.__name__}, got {type(given).__name__}"
            )


class _SearchedIndex(HFIndex):
    """An index of fastrag with the interface of transformers' own indexes."""

    def __init__(self, index: Index, passages: PassageStore) -> None:
        self.index, self.passages = index, passages

    def is_initialized(self) -> bool:
        return True

    def init_index(self) -> None:
        """Do nothing: the index exists."""

    def get_top_docs(
        self, question_hidden_states: np.ndarray[Any, Any], n_docs: int = 5
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if n_docs > self.index.n_live:
            raise ValueError(
                f"n_docs: expected at most the {self.index.n_live} passages of the index, got "
                f"{n_docs}"
            )
        query_emb = torch.from_numpy(np.ascontiguousarray(question_hidden_states))
        hits = self.index.search(query_emb, n_docs, vectors=True)
        return hits.rows.numpy(), hits.vectors.numpy()  # type: ignore[union-attr]

    def get_doc_dicts(self, doc_ids: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        return [self._texts(rows) for rows in doc_ids.tolist()]

    def _texts(self, rows: list[int]) -> dict[str, Any]:
        passages = self.passages
        return {
            "title": [passages.title(row) if row >= 0 else "" for row in rows],
            "text": [passages.text(row) if row >= 0 else "" for row in rows],
            "row": rows,
        }
