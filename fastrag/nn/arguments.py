"""Checks and defaults of RagModel's arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from fastrag.data.processor import RagProcessor
from fastrag.messages import shown
from fastrag.nn.heads import base_model
from fastrag.ops import checks

if TYPE_CHECKING:
    from fastrag.nn.loss import RagLoss
    from fastrag.nn.reader import Reader
    from fastrag.nn.retriever import Retriever


def check_numbers(
    n_docs: int, tau: float, explore: int, explore_pool: int | None, explore_tau: float
) -> None:
    """Raise ValueError for a number out of range."""
    check_count("n_docs", n_docs)
    if not (_is_number(tau) and tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau: expected a finite number > 0, got {shown(tau)}")
    if not (_is_whole(explore) and 0 <= explore <= n_docs):
        raise ValueError(
            f"explore: expected 0 <= integer <= n_docs = {n_docs}, got {shown(explore)}"
        )
    if explore_pool is not None and not (_is_whole(explore_pool) and explore_pool >= n_docs):
        raise ValueError(
            f"explore_pool: expected an integer >= n_docs = {n_docs} or None, "
            f"got {shown(explore_pool)}"
        )
    if not (_is_number(explore_tau) and explore_tau > 0 and math.isfinite(explore_tau)):
        raise ValueError(f"explore_tau: expected a finite number > 0, got {shown(explore_tau)}")


def check_count(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not (_is_whole(value) and value >= 1):
        raise ValueError(f"{name}: expected an integer >= 1, got {shown(value)}")


def check_answers(labels: Tensor, n_questions: int | None = None) -> None:
    """Raise ValueError unless `labels` are `[B, T]` int64 with T of at least 1."""
    checks.check_tensor("labels", labels)
    fits = labels.dim() == 2 and labels.shape[1] > 0 and labels.dtype == torch.int64
    if not fits or n_questions not in (None, labels.shape[0]):
        wanted = "" if n_questions is None else f"B = {n_questions} and "
        raise ValueError(
            f"labels: expected int64 [B, T] with {wanted}T of at least 1, got {checks.show(labels)}"
        )


def check_pruning(loss_fn: RagLoss, prune: float | None, unbiased: bool) -> None:
    """Raise ValueError for a threshold out of range, or a loss whose contexts cannot be pruned."""
    if prune is None:
        if unbiased:
            raise ValueError("prune_unbiased: expected False without prune, got True")
        return
    if not (_is_number(prune) and 0 <= prune < 1):
        raise ValueError(f"prune: expected 0 <= number < 1 or None, got {shown(prune)}")
    if loss_fn.generator_loss == "none":
        raise ValueError(
            f"prune: expected None with the objective {loss_fn.objective}, which trains no "
            f"generator, got {prune}"
        )
    if loss_fn.marginal == "token" and loss_fn.label_smoothing:
        raise ValueError(
            f"prune: expected None where the Token marginal is smoothed, because smoothing needs "
            f"the distributions of all contexts, got {prune} with label_smoothing = "
            f"{loss_fn.label_smoothing}"
        )


def check_posterior(loss_fn: RagLoss, posterior_encoder: object) -> None:
    """Raise ValueError for a posterior encoder whose scores the objective does not use."""
    term = loss_fn.retriever_term
    if posterior_encoder is not None and (term is None or not term.draws):
        raise ValueError(
            f"posterior_encoder: expected None with the objective {loss_fn.objective}, got "
            f"{type(posterior_encoder).__name__}"
        )


def checked_weight(name: str, value: float) -> float:
    """Return the weight of a term of the loss, a number >= 0."""
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name}: expected a number >= 0, got {shown(value)}")
    return value


def check_processor(processor: object, reader: Reader, retriever: Retriever) -> None:
    """Raise ValueError unless a processor fits the generator, the encoders and the passages."""
    if not isinstance(processor, RagProcessor):
        raise ValueError(f"processor: expected a RagProcessor, got {type(processor).__name__}")
    if processor.kind != reader.kind:
        raise ValueError(
            f"processor: expected one of kind {reader.kind!r} as the generator is, got "
            f"{processor.kind!r}"
        )
    n_vocab, largest = reader.adapter.n_vocab, processor.largest_id
    if largest >= n_vocab:
        raise ValueError(
            f"processor: expected a generator_tokenizer of the generator's vocabulary, ids in "
            f"[0, {n_vocab}), got one with id {largest}"
        )
    positions = _positions(reader.generator)
    if positions is not None and processor.max_context > positions:
        raise ValueError(
            f"max_context: expected at most the generator's {positions} positions, got "
            f"{processor.max_context}"
        )
    for role in ("question", "passage"):
        encoder, name = getattr(retriever, f"{role}_encoder"), f"{role}_prefix"
        own, prefix = getattr(encoder, "prefix", None), getattr(processor, name)
        if own is not None and own != prefix:
            raise ValueError(
                f"processor: expected the encoder's {name} {shown(own)}, got {shown(prefix)}; "
                f"RagProcessor.for_encoders takes both prefixes from the encoders"
            )
    processor.check(retriever.passages)


def _positions(generator: nn.Module) -> int | None:
    """Return how many positions a generator has for its context; None: no limit is known."""
    config = getattr(base_model(generator), "config", None)
    config = getattr(config, "encoder", None) or config  # EncoderDecoder: the encoder reads it
    return getattr(config, "max_position_embeddings", None)


def explain_failure(name: str, module: nn.Module, inputs: Tensor, error: RuntimeError) -> None:
    """Raise ValueError if a module failed because of where its weights are.

    Only a step that fails pays for it.
    """
    for parameter in module.parameters():
        if parameter.device != inputs.device:
            raise ValueError(
                f"{name}: expected weights on '{inputs.device}', where its token ids are, got "
                f"'{parameter.device}'"
            )
    if is_sharded(module) and "DTensor" in str(error):
        raise ValueError(
            f"{name}: expected whole weights, got the shards of fully_shard; they are gathered in "
            "RagModel.forward, and in other methods after "
            "torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate')"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP has distributed a weight of the module and not gathered it."""
    # By name, because importing torch.distributed.tensor takes long.
    return any(type(parameter).__name__ == "DTensor" for parameter in module.parameters())


def require_finite(vectors: Tensor, message: str, rows: Tensor | None = None) -> None:
    """Raise ValueError for NaN or inf, naming the row; only on the CPU, where it costs no wait."""
    if vectors.device.type != "cpu":
        return
    finite = vectors.detach().isfinite().all(dim=-1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(f"{message} {first if rows is None else int(rows[first])}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_whole(value) or isinstance(value, float)
