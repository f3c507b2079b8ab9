"""Decoding: one answer per question, by the marginal that its contexts are combined with.

    model.generate(**batch)                         # follows the model's `marginal`
    model.generate(**batch, marginal="sequence")

A decoder is a function of a `GreedySearch` (module `greedy`), which holds the questions with their
contexts and runs transformers' `generate` on them. To add one, enter it into `DECODERS`:

    def nearest(search: GreedySearch) -> RagGeneration: ...

    DECODERS["nearest"] = nearest
    model.generate(**batch, marginal="nearest")
"""

from __future__ import annotations

from collections.abc import Callable

from fastrag.generation.greedy import GreedySearch
from fastrag.generation.sequence import rag_sequence
from fastrag.generation.token import MarginalLogits, rag_token
from fastrag.nn.outputs import RagGeneration

__all__ = ["DECODERS", "GreedySearch", "MarginalLogits", "rag_sequence", "rag_token"]

DECODERS: dict[str, Callable[[GreedySearch], RagGeneration]] = {
    "token": rag_token,
    "sequence": rag_sequence,
}
