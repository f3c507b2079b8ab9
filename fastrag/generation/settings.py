"""Settings of a search: the caller's, checked, and neutral defaults for all others.

Only the caller chooses how to search (beams, sampling), because a model's `generation_config` was
made for its use without passages. Its settings of tokens (ends, penalties, suppressed ids) apply.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin

from fastrag.messages import shown
from fastrag.nn.heads import base_model
from fastrag.nn.model import RagModel

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter

_MAX_NEW_TOKENS = 32

# Defaults passed to transformers, which warns of any other value that a search does not read.
_SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
_SEARCH: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}

# Settings that a caller may only repeat, with the reason.
_FIXED: dict[str, dict[str, Any]] = {
    "because answers are searched for greedily, with beams or by sampling": {
        "prompt_lookup_num_tokens": None,
        "penalty_alpha": None,
        "dola_layers": None,
        "constraints": None,
        "force_words_ids": None,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "assistant_early_exit": None,
        "use_mtp": None,
        "assistant_model": None,
        "assistant_tokenizer": None,
        "custom_generate": None,
    },
    "because an answer follows its context": {"token_healing": False},
    "because generate returns a RagGeneration": {
        "return_dict_in_generate": False,
        "output_scores": False,
        "output_logits": False,
        "output_attentions": False,
        "output_hidden_states": False,
    },
    "because max_new_tokens limits an answer": {"max_length": None},
}


def search_config(
    adapter: GeneratorAdapter,
    context_width: int,
    max_new_tokens: int | None,
    pad_id: int,
    eos_id: int | None,
    settings: dict[str, Any],
) -> tuple[GenerationConfig, int]:
    """Return the config of a search with the caller's settings, and the answers to a question.

    The config is the given `generation_config`, else the generator's own, with `settings` over it.
    It asks for one answer, because the decoder chooses how many each context proposes.

    Args:
        adapter: adapter of the generator.
        context_width: L, the width of the contexts.
        max_new_tokens: longest answer; None: that of `generation_config`, else 32.
        pad_id: token id that fills answers, unless the caller names another one.
        eos_id: token id that ends an answer in addition to the generator's own, unless the caller
            names the ends.
        settings: fields of `GenerationConfig`, and `generation_config` itself.

    Raises:
        ValueError: a setting that is unknown, of another search, or out of its range.
    """
    own = base_model(adapter.model).generation_config
    given = settings.pop("generation_config", None)
    if not isinstance(given, (GenerationConfig, type(None))):
        raise ValueError(
            f"generation_config: expected a GenerationConfig, got {type(given).__name__}"
        )
    chosen = {**({} if given is None else vars(given)), **settings}
    for reason, values in _FIXED.items():
        refuse(chosen, values, reason)
    for name in ("num_beams", "num_return_sequences"):
        count = chosen.get(name)
        if count is not None and not (isinstance(count, int) and count >= 1):
            raise ValueError(f"{name}: expected an integer >= 1, got {shown(count)}")
    top_p = chosen.get("top_p")
    if top_p is not None and not 0.0 < top_p <= 1.0:  # transformers ignores one above 1
        raise ValueError(f"top_p: expected a number in (0, 1], got {shown(top_p)}")
    if not chosen.get("do_sample"):
        refuse(chosen, _SAMPLING, "because do_sample is False")
    if chosen.get("num_beams") in (None, 1):
        refuse(chosen, _BEAMS, "because num_beams is 1")
    if max_new_tokens is None:
        max_new_tokens = _MAX_NEW_TOKENS if given is None else given.max_new_tokens
        max_new_tokens = max_new_tokens or _MAX_NEW_TOKENS
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens}")
    room = adapter.room(context_width)
    if room is not None and room < 1:
        raise ValueError(
            f"context_ids: expected a context that leaves the generator a position to answer in, "
            f"got {context_width} tokens, {1 - room} too many"
        )
    is_seq2seq = adapter.kind == "seq2seq"
    start = int(adapter.start(torch.zeros(1, 1, dtype=torch.int64))) if is_seq2seq else None
    refuse(chosen, {"decoder_start_token_id": start}, "because answers are trained to follow it")
    own_pad, end = chosen.get("pad_token_id"), chosen.get("eos_token_id")
    ends = _as_list(own.eos_token_id) + _as_list(eos_id) if end is None else _as_list(end)
    config = copy.deepcopy(own if given is None else given)
    fixed = {name: value for values in _FIXED.values() for name, value in values.items()}
    search = {**_SAMPLING, **_BEAMS, **_SEARCH}
    search |= {name: chosen[name] for name in search if chosen.get(name) is not None}
    n_return = search.pop("num_return_sequences")
    config.update(**fixed, **search, num_return_sequences=1)
    rest = {
        name: value
        for name, value in settings.items()
        if name not in {*fixed, *search, "num_return_sequences"}
    }
    if unknown := config.update(**rest):
        raise ValueError(_unknown(sorted(unknown)))
    config.update(
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
        pad_token_id=pad_id if own_pad is None else own_pad,
        eos_token_id=sorted(set(ends)) or None,
    )
    return config, n_return


def refuse(chosen: Mapping[str, Any], values: Mapping[str, Any], reason: str) -> None:
    """Raise ValueError for a setting that is neither None nor the value in `values`."""
    for name, value in values.items():
        if chosen.get(name) not in (None, value):
            raise ValueError(f"{name}: expected {value}, {reason}, got {shown(chosen[name])}")


def _unknown(names: list[str]) -> str:
    """Return the message for unknown arguments, with the nearest known name of each."""
    known = {
        *vars(GenerationConfig()),
        *inspect.signature(GenerationMixin.generate).parameters,
        *inspect.signature(RagModel.generate).parameters,
    } - {"self", "kwargs", "generate_kwargs"}
    near = [near for name in names for near in difflib.get_close_matches(name, known, n=1)]
    return (
        f"generate_kwargs: expected arguments of transformers' generate or fields of its "
        f"GenerationConfig, got {shown(names)}"
        + (f"; did you mean {', '.join(near)}?" if near else "")
    )


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(each) for each in ids]
