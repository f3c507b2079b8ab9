"""Interoperability with Hugging Face's RAG classes: patch them, convert them, read their indexes.

    patch_hf_rag(model)                     # their model, our loss and, if given, our index
    RagModel.from_hf(model), model.to_hf()  # their model as ours, and back
    read_hf_index(folder, processor)        # their index as ours
    read_dpr(tsv, embeddings, processor)    # DPR's passages and vectors as ours

transformers is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrag.hf.corpora import passages_of, read_dpr, read_hf_index
    from fastrag.hf.patch import patch_hf_rag, unpatch_hf_rag
    from fastrag.hf.retriever import IndexRetriever, rag_processor

_HOMES = {
    "IndexRetriever": "retriever",
    "passages_of": "corpora",
    "patch_hf_rag": "patch",
    "rag_processor": "retriever",
    "read_dpr": "corpora",
    "read_hf_index": "corpora",
    "unpatch_hf_rag": "patch",
}

__all__ = [
    "IndexRetriever",
    "passages_of",
    "patch_hf_rag",
    "rag_processor",
    "read_dpr",
    "read_hf_index",
    "unpatch_hf_rag",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
