"""Modules: RagLoss, TextEncoder, generator adapters, Retriever, Reader, RagModel.

Names load on first use, so that `fastrag.nn.loss` needs torch alone; the rest needs transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrag.nn.encoders import TextEncoder
    from fastrag.nn.generators import CausalAdapter, Seq2SeqAdapter, adapt_generator
    from fastrag.nn.heads import LMHead
    from fastrag.nn.likelihoods import LikelihoodCache
    from fastrag.nn.loss import RagLoss, RagLossOutput
    from fastrag.nn.model import RagModel
    from fastrag.nn.outputs import RagGeneration, RagOutput
    from fastrag.nn.prefix_cache import PrefixCache
    from fastrag.nn.reader import Adapter, Reader
    from fastrag.nn.retrieved import Retrieved
    from fastrag.nn.retriever import Retriever
    from fastrag.nn.sentence_encoder import SentenceEncoder

_HOMES = {
    "TextEncoder": "encoders",
    "CausalAdapter": "generators",
    "Seq2SeqAdapter": "generators",
    "adapt_generator": "generators",
    "LMHead": "heads",
    "LikelihoodCache": "likelihoods",
    "RagLoss": "loss",
    "RagLossOutput": "loss",
    "RagModel": "model",
    "RagGeneration": "outputs",
    "RagOutput": "outputs",
    "PrefixCache": "prefix_cache",
    "Adapter": "reader",
    "Reader": "reader",
    "Retrieved": "retrieved",
    "Retriever": "retriever",
    "SentenceEncoder": "sentence_encoder",
}

__all__ = [
    "Adapter",
    "CausalAdapter",
    "LMHead",
    "LikelihoodCache",
    "PrefixCache",
    "RagGeneration",
    "RagLoss",
    "RagLossOutput",
    "RagModel",
    "RagOutput",
    "Reader",
    "Retrieved",
    "Retriever",
    "SentenceEncoder",
    "Seq2SeqAdapter",
    "TextEncoder",
    "adapt_generator",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
