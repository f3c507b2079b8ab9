"""PrefixCache: what a causal generator has read of a passage, kept from one question to the next.

    model.prefix_cache = PrefixCache(max_bytes=2 << 30)
    model.generate(**batch)        # reads each passage once, and each question

In a template with the passage first, the keys and values of the tokens before the question depend
on no question, because a causal generator looks at earlier tokens only. An encoder looks at all of
them, so a seq2seq generator has no prefix to keep.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from fastrag.messages import shown
from fastrag.nn.caches import cache_of_states, token_states
from fastrag.nn.generators import CausalAdapter, close_to, evaluating
from fastrag.nn.heads import architecture, base_model
from fastrag.nn.weights import weights_identity
from fastrag.ops import checks

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter
    from fastrag.nn.model import RagModel

# Rotary embeddings whose frequencies depend on the longest text of the batch.
_BY_LENGTH = ("dynamic", "longrope")


class PrefixCache:
    """Keep the keys and values of context prefixes between questions, as vLLM's prefix caching.

    A prefix is found by its token ids. When `max_bytes` are exceeded, those not used for longest
    are dropped. All are dropped when the generator, its weights, its PEFT adapters or the autocast
    dtype have changed since they were read: places and version counters of the weights are
    compared, and for writes through `.data`, which torch does not count, some numbers of each.

    Args:
        max_bytes: memory of the generator's device that the kept states may take. A batch takes
            that of its own prefixes in addition.

    Attributes:
        hits: contexts whose prefix had been read.
        misses: prefixes that were read.
        n_bytes: memory taken at present.

    Raises:
        ValueError: `max_bytes` below 1.

    Example:
        >>> model.prefix_cache = PrefixCache(2 << 30)                       # doctest: +SKIP
        >>> for batch in batches:                                           # doctest: +SKIP
        ...     model.generate(**batch)
        >>> model.prefix_cache.hits, model.prefix_cache.misses              # doctest: +SKIP
        (4210, 790)
    """

    def __init__(self, max_bytes: int) -> None:
        if checks.whole("max_bytes", max_bytes) < 1:
            raise ValueError(f"max_bytes: expected at least 1, got {shown(max_bytes)}")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.n_bytes = 0
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()  # [tokens, F], last used last
        self._shapes: list[tuple[int, int]] = []
        self._read_with: Any = None  # what identifies the weights of the present states
        self._fit: weakref.ref[Any] | None = None  # the adapter that was last found to fit

    def __len__(self) -> int:
        """Return the number of prefixes that are kept."""
        return len(self._states)

    def clear(self) -> None:
        """Drop all states; the counters of hits and misses go on."""
        self._states.clear()
        self.n_bytes = 0

    def check(self, adapter: GeneratorAdapter, *, has_prefix: bool) -> None:
        """Check that states of a prefix can be reused.

        Args:
            adapter: adapter of the generator.
            has_prefix: whether contexts have a part before the question.

        Raises:
            ValueError: a seq2seq generator, a template with the question first, or a generator
                whose states depend on more than the tokens before.
        """
        if adapter.kind != "causal":
            raise ValueError(
                f"prefix_cache: expected a causal generator, whose states of a passage do not "
                f"depend on the question after it, got {adapter.kind}"
            )
        if not has_prefix:
            raise ValueError(
                "prefix_cache: expected a template with the passage before the question, got one "
                "with the question first"
            )
        if self._fit is None or self._fit() is not adapter:
            if not _reproduces(adapter):
                raise ValueError(
                    f"prefix_cache: expected a generator whose keys and values depend on the "
                    f"tokens before them alone, got {architecture(adapter.model)}"
                )
            self._fit = weakref.ref(adapter)

    @torch.no_grad()
    def read(
        self, adapter: Any, context_ids: Tensor, context_mask: Tensor, prefix_len: Tensor
    ) -> dict[str, Any]:
        """Return what `adapter.read` returns, reading again only what is not kept.

        Args:
            adapter: `CausalAdapter` of a generator in eval mode.
            context_ids: `[n, L]` int64, left-padded.
            context_mask: `[n, L]`, 1 at tokens.
            prefix_len: number of tokens of each context before its question, `[n]` int64.

        Raises:
            ValueError: the generator is in training mode, where dropout changes its states.
        """
        if adapter.model.training:
            raise ValueError("generator: expected eval mode with a prefix_cache, got training mode")
        read_with = weights_identity(adapter.model, context_ids.device)
        if read_with != self._read_with:
            self.clear()
            self._read_with = read_with
        # All rows continue in one column: after it come the longest question and what follows it,
        # and, of other contexts, the end of the prefix.
        lengths, width = context_mask.sum(dim=1), context_ids.shape[1]
        prefix_len = prefix_len.minimum(lengths - 1)
        column = width - int((lengths - prefix_len).max())
        if column <= 0:
            return adapter.read(context_ids, context_mask)
        ids, starts = context_ids.cpu(), (width - lengths).tolist()
        spans = [slice(a, a + n) for a, n in zip(starts, prefix_len.tolist(), strict=True)]
        prefixes = [row[span] for row, span in zip(ids, spans, strict=True)]
        keys = [prefix.numpy().tobytes() for prefix in prefixes]
        missing = {key: p for key, p in zip(keys, prefixes, strict=True) if key not in self._states}
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        read = self._read_prefixes(adapter, missing, context_ids.device)
        found = {key: read[key] if key in read else self._states[key] for key in keys}
        some = next(iter(found.values()))
        states = some.new_zeros(len(keys), column, some.shape[1])
        kept = [found[key][: max(0, column - a)] for key, a in zip(keys, starts, strict=True)]
        states[context_mask[:, :column].bool()] = torch.cat(kept)
        self._keep(found)
        state = {str(adapter.cache_name): cache_of_states(states, self._shapes)}
        if column == width - 1:
            return state
        return adapter.resume(context_ids[:, :-1], context_mask[:, :-1], state, column)

    def _read_prefixes(
        self, adapter: CausalAdapter, prefixes: dict[bytes, Tensor], device: torch.device
    ) -> dict[bytes, Tensor]:
        """Return the states of prefixes, each `[tokens, F]`."""
        if not prefixes:
            return {}
        width = max(1, *map(len, prefixes.values()))
        ids = torch.zeros(len(prefixes), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prefix in enumerate(prefixes.values()):
            ids[row, width - len(prefix) :] = prefix
            mask[row, width - len(prefix) :] = 1
        # Without the config, no layer forgets what is outside its window.
        state = {str(adapter.cache_name): DynamicCache()}
        [cache] = adapter.resume(ids.to(device), mask.to(device), state, 0).values()
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError("prefix_cache: expected layers of keys and values")
        states, self._shapes = token_states(cache)
        return {
            key: states[row, width - len(prefix) :].clone()
            for row, (key, prefix) in enumerate(prefixes.items())
        }

    def _keep(self, found: dict[bytes, Tensor]) -> None:
        """Keep states, and drop those not used for longest that exceed `max_bytes`."""
        for key, states in found.items():
            if key not in self._states:
                self._states[key] = states
                self.n_bytes += _size(key, states)
            self._states.move_to_end(key)
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= _size(*self._states.popitem(last=False))


def keep_prefixes(model: RagModel, mebibytes: int | None) -> None:
    """Give a model a prefix cache of so many MiB; None: leave it as it is.

    Raises:
        ValueError: states of a prefix cannot be reused; see `PrefixCache.check`.
    """
    if mebibytes is not None:
        model.prefix_cache = PrefixCache(mebibytes << 20)
        has_prefix = model.processor.bound.slots[0] == "passage"
        model.prefix_cache.check(model.adapter, has_prefix=has_prefix)


def _size(key: bytes, states: Tensor) -> int:
    return len(key) + states.nbytes


def _reproduces(adapter: Any) -> bool:
    """Whether contexts have the same states if their prefixes are read by themselves."""
    base = base_model(adapter.model)
    rope = getattr(base.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {*_BY_LENGTH} or adapter.cache_name is None:
        return False
    embedding = base.get_input_embeddings()
    vocab = min(embedding.weight.shape[0], adapter.n_vocab)
    ids = torch.arange(21, device=embedding.weight.device).view(3, 7) % vocab
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    with evaluating(adapter.model):
        if not adapter.read(ids, mask):
            return False
        whole = adapter.hidden(ids, mask, ids[:, :3])
        try:
            state = PrefixCache(1).read(adapter, ids, mask, ids.new_tensor([2, 3, 5]))
            return close_to(adapter.hidden(ids, mask, ids[:, :3], state=state), whole)
        except Exception:  # models raise many kinds here, as those whose layers share a cache
            return False
