"""Decoding: answers to questions, by the marginal that their contexts are combined with.

    model.generate(**batch)                         # follows the model's `marginal`
    model.generate(**batch, marginal="sequence-thorough", num_beams=4)

A decoder is a function of a `Search`, which holds the questions with their contexts and runs
transformers' `generate` on them. To add one, enter it into `DECODERS`:

    def nearest(search: Search) -> RagGeneration: ...

    DECODERS["nearest"] = nearest
    model.generate(**batch, marginal="nearest")
"""

from __future__ import annotations

from collections.abc import Callable

from fastrag.generation.search import Reading, Search
from fastrag.generation.sequence import rag_sequence, rag_sequence_thorough
from fastrag.generation.token import MarginalModel, rag_token
from fastrag.nn.outputs import RagGeneration

__all__ = [
    "DECODERS",
    "MarginalModel",
    "Reading",
    "Search",
    "rag_sequence",
    "rag_sequence_thorough",
    "rag_token",
]

DECODERS: dict[str, Callable[[Search], RagGeneration]] = {
    "token": rag_token,
    "sequence": rag_sequence,
    "sequence-thorough": rag_sequence_thorough,
}
