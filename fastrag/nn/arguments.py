"""Checks and defaults of RagModel's arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastrag.nn.heads import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.data.templates import BoundTemplate

DEFAULT_CONTEXT = 512


def check_numbers(
    n_docs: int, tau: float, explore: int, explore_pool: int | None, explore_tau: float
) -> None:
    """Raise ValueError for a number out of range."""
    if n_docs < 1:
        raise ValueError(f"n_docs: expected an integer >= 1, got {n_docs}")
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau: expected a finite number > 0, got {tau}")
    if not 0 <= explore <= n_docs:
        raise ValueError(f"explore: expected 0 <= integer <= n_docs = {n_docs}, got {explore}")
    if explore_pool is not None and explore_pool < n_docs:
        raise ValueError(f"explore_pool: expected at least n_docs = {n_docs}, got {explore_pool}")
    if not explore_tau > 0:
        raise ValueError(f"explore_tau: expected a number > 0, got {explore_tau}")


def bind_template(
    template: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    kind: Any,
) -> BoundTemplate:
    """Return `template` (a Template, BoundTemplate or None: the default), bound to `tokenizer`."""
    if hasattr(template, "literals"):
        if template.kind != kind:
            raise ValueError(f"template: expected one bound as {kind!r}, got {template.kind!r}")
        return template
    if tokenizer is None:
        raise ValueError("generator_tokenizer: expected a tokenizer to bind the template, got None")
    from fastrag.data.templates import Template

    return (template or Template.default(kind)).bind(tokenizer, kind)


def context_limit(generator: nn.Module, kind: str, max_context: int | None) -> int:
    """Return the generator's window, held against the positions that it has."""
    config = base_model(generator).config
    config = getattr(config, "encoder", None) or config  # EncoderDecoder: the encoder reads it
    positions = getattr(config, "max_position_embeddings", None)
    if max_context is None:
        if positions is None:
            return DEFAULT_CONTEXT
        answer = min(64, positions // 4) if kind == "causal" else 0
        return min(DEFAULT_CONTEXT, positions - answer)
    if positions is not None and max_context > positions:
        raise ValueError(
            f"max_context: expected at most the generator's {positions} positions, got "
            f"{max_context}"
        )
    return max_context


def require_finite(vectors: Tensor, message: str, rows: Tensor | None = None) -> None:
    """Raise for NaN or inf, naming the row; on the CPU alone, where looking costs no wait."""
    if vectors.device.type != "cpu":
        return
    finite = vectors.detach().isfinite().all(dim=-1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(f"{message} {first if rows is None else int(rows[first])}")
