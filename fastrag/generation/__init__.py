"""Decoding: one answer per question, marginal over the retrieved passages."""

from __future__ import annotations

from fastrag.generation.sequence import rag_sequence_generate

__all__ = ["rag_sequence_generate"]
