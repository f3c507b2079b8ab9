"""Caches of transformers' models: found, branched, rows of them selected, taken apart by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")  # transformers' name from 5.24 on, and before


def cache_of(outputs: Any) -> dict[str, Any]:
    """Return the cache among a model's outputs under its name, if there is one."""
    # Only the first, because an output with the new name also answers to the old one.
    found = [name for name in CACHE_NAMES if name in outputs.keys()][:1]  # noqa: SIM118
    return {name: outputs[name] for name in found}


def branched(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with caches that grow independently."""
    return {name: _branch(value) if name in CACHE_NAMES else value for name, value in state.items()}


def _branch(cache: Any) -> Any:
    """Return a cache that grows independently and shares the present tensors if possible.

    The layers named here replace their tensors when they grow; others may write into them.
    """
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _branch(cache.self_attention_cache), _branch(cache.cross_attention_cache)
        )
    branch = copy.copy(cache)
    branch.layers = [
        copy.copy(layer)
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return branch


def selected(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a model's inputs for other rows; a cache is changed."""
    chosen = {}
    for name, value in inputs.items():
        if name in CACHE_NAMES:
            value.reorder_cache(rows)
        elif isinstance(value, Tensor):
            value = value[rows]
        elif isinstance(value, ModelOutput):
            value = type(value)(
                **{key: each[rows] for key, each in value.items() if isinstance(each, Tensor)}
            )
        chosen[name] = value
    return chosen


def reorder_answers(inputs: dict[str, Any], rows: Tensor) -> None:
    """Reorder the answers so far between rows with the same context."""
    if "answer" in inputs:
        inputs["answer"] = inputs["answer"][rows]
    for name in CACHE_NAMES:
        cache = inputs.get(name)
        if cache is not None:
            getattr(cache, "self_attention_cache", cache).reorder_cache(rows)


def repeat_contexts(cache: Any, n: int) -> None:
    """Repeat each row n times for beams, which `reorder_cache` then permutes among themselves."""
    cache.batch_repeat_interleave(n)
    if isinstance(cache, EncoderDecoderCache):
        layers = cache.cross_attention_cache.layers
        layers[:] = [
            _Unordered.of(layer) if type(layer) is DynamicLayer else layer for layer in layers
        ]


class _Unordered(DynamicLayer):
    """Keys and values of contexts, equal for all beams of one: a permutation changes nothing."""

    @classmethod
    def of(cls, layer: DynamicLayer) -> _Unordered:
        unordered = cls()
        unordered.__dict__.update(vars(layer))
        return unordered

    def reorder_cache(self, beam_idx: Tensor) -> None:
        return


def token_states(cache: DynamicCache) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the keys and values of all layers by token.

    Args:
        cache: keys and values of n rows and L columns.

    Returns:
        `[n, L, F]`, and heads and width of the keys and the values of each layer, in turn.
    """
    each = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in each]
    return torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in each], dim=2), shapes


def cache_of_states(states: Tensor, shapes: Sequence[tuple[int, int]]) -> DynamicCache:
    """Return the cache of `token_states`."""
    parts = states.split([heads * width for heads, width in shapes], dim=2)
    each = [
        part.unflatten(2, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)
    ]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(each[::2], each[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache
