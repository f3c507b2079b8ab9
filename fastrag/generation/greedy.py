"""Greedy search of a generator over the contexts of several questions, shared by all decoders.

A decoder takes a `GreedySearch` and returns a `RagGeneration`:

    for contexts in search.parts():                     # indices into the B*K contexts
        answers, hidden = search.generate(contexts)     # [n, T], and the states that predict them
        ...
    loss = search.loss()                                # of the labels, None without labels

Each context is read once: the states that predict the tokens of an answer are kept while the answer
is generated, and the states that predict the labels continue from the same reading.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from fastrag.messages import shown
from fastrag.nn.heads import base_model
from fastrag.nn.model import RagModel
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter
    from fastrag.nn.loss import RagLoss

# Settings that make transformers search greedily, whatever the model's own generation config has.
# Those that greedy search does not read have their neutral value: transformers warns of any other.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "early_stopping": False,
    "length_penalty": 1.0,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "assistant_model": None,
    "assistant_tokenizer": None,
    "custom_generate": None,
}
_PLAIN_OUTPUT: dict[str, Any] = {
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# Settings that a caller may only repeat, with the reason.
_FIXED: dict[str, dict[str, Any]] = {
    "because the search is greedy": _GREEDY,
    "because generate returns a RagGeneration": _PLAIN_OUTPUT,
    "because max_new_tokens limits an answer": {"max_length": None},
}
# Settings under which the search cannot continue from a state that has read the contexts.
_OWN_CACHE = ("use_cache", "cache_implementation", "cache_config")
# Arguments of transformers' generate with one row per question.
_NEGATIVE_PROMPT = ("negative_prompt_ids", "negative_prompt_attention_mask")
_MAX_NEW_TOKENS = 32
# Contexts that are generated together on a CPU: enough to keep it busy, and of similar length,
# because padding costs as much time as text there. A GPU takes all contexts at once.
_CONTEXTS_ON_CPU = 16


class GreedySearch:
    """Generate greedy answers to B questions from K contexts each, with transformers' `generate`.

    Args:
        adapter: adapter of the generator, whose model should be in eval mode.
        context_ids: `[B*K, L]` int64, the K contexts of a question next to each other, padded on
            the side of the adapter's kind.
        context_mask: `[B*K, L]`, 1 at tokens.
        doc_scores: `[B, K]`, -inf at missing passages.
        rows: `[B, K]` int64, -1 at missing passages.
        max_new_tokens: longest answer, shorter where the generator's positions end. None: that of
            `generation_config`, else 32.
        pad_id: token id that fills answers after their end.
        eos_id: token id that ends an answer in addition to the generator's own; not used if
            `eos_token_id` or `generation_config` names the token that ends an answer.
        labels: `[B, T]` int64, padded with -100: compute their loss from the same reading of the
            contexts.
        loss_fn: the loss of the labels, required with them.
        on_progress: called with the share of the work that was done since the last call.
        logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer: as in transformers'
            `generate`. With one of them, all contexts are generated at once and in order: context
            b*K + k is passage k of question b. `prefix_allowed_tokens_fn` gets b as its batch id.
        generate_kwargs: other arguments of transformers' `generate`, and fields of its
            `GenerationConfig`. `negative_prompt_ids` has one row per question.

    Raises:
        ValueError: shapes disagree, `max_new_tokens` < 1, a setting of another search or one that
            transformers does not know, labels without a loss, contexts that leave the generator no
            position to answer in.

    Example:
        >>> search = GreedySearch(adapter, ids, mask, doc_scores, rows)     # doctest: +SKIP
        >>> rag_token(search).sequences                                     # doctest: +SKIP
    """

    def __init__(
        self,
        adapter: GeneratorAdapter,
        context_ids: Tensor,
        context_mask: Tensor,
        doc_scores: Tensor,
        rows: Tensor,
        *,
        max_new_tokens: int | None = None,
        pad_id: int = 0,
        eos_id: int | None = None,
        labels: Tensor | None = None,
        loss_fn: RagLoss | None = None,
        on_progress: Callable[[float], None] | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        streamer: BaseStreamer | None = None,
        **generate_kwargs: Any,
    ) -> None:
        if context_ids.shape[0] != doc_scores.numel():
            raise ValueError(
                f"context_ids: expected [B*K, L] with B*K = {doc_scores.numel()} as in doc_scores, "
                f"got {list(context_ids.shape)}"
            )
        if labels is not None and loss_fn is None:
            raise ValueError("loss_fn: expected a RagLoss for the labels, got None")
        self.adapter = adapter
        self.context_ids = context_ids
        self.context_mask = context_mask
        self.doc_scores = doc_scores
        self.rows = rows
        self.labels = labels
        self.loss_fn = loss_fn
        self.streamer = streamer
        self._logits_processor = _listed("logits_processor", logits_processor)
        self._stopping_criteria = _listed("stopping_criteria", stopping_criteria)
        self._prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        callables = (logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer)
        self._in_order = any(given is not None for given in callables)
        self._report = on_progress or (lambda share: None)
        self._label_states: list[tuple[Tensor, Tensor]] = []
        tokenizer = generate_kwargs.pop("tokenizer", None)
        config = generate_kwargs.get("generation_config")
        self._continues = not any(
            name in generate_kwargs or getattr(config, name, None) is not None
            for name in _OWN_CACHE
        )
        self._handed_on = {
            name: generate_kwargs.pop(name)
            for name in ("synced_gpus", *_NEGATIVE_PROMPT)
            if name in generate_kwargs
        }
        self._config = _greedy_config(
            adapter, context_ids.shape[1], max_new_tokens, pad_id, eos_id, generate_kwargs
        )
        self.pad_id: int = self._config.pad_token_id
        if stop_strings := self._config.stop_strings:
            if tokenizer is None:
                raise ValueError(
                    "tokenizer: expected the generator's tokenizer for stop_strings, got None"
                )
            # A criterion like any other, so that scores end where it stops an answer.
            self._config.stop_strings = None
            self._handed_on["tokenizer"] = tokenizer  # for those of the generator's own config
            self._stopping_criteria.append(StopStringCriteria(tokenizer, stop_strings))

    @property
    def n_docs(self) -> int:
        """K, contexts per question."""
        return self.doc_scores.shape[1]

    @property
    def prior_scores(self) -> Tensor:
        """`doc_scores`, but the first context (no passage) has all mass if no passage was found."""
        none_found = ~self.doc_scores.isfinite().any(dim=1)
        fallback = torch.full_like(self.doc_scores, -torch.inf)
        fallback[:, 0] = 0.0
        return torch.where(none_found[:, None], fallback, self.doc_scores)

    def parts(self, *, tied: bool = False) -> list[Tensor]:
        """Return the contexts in parts that are generated together, as indices `[n]`.

        Args:
            tied: keep the K contexts of a question together and in order.
        """
        contexts = torch.arange(len(self.context_ids), device=self.context_ids.device)
        if contexts.device.type != "cpu" or self._in_order:
            return [contexts]
        unit = self.n_docs if tied else 1
        lengths = self.context_mask.sum(dim=1).view(-1, unit).amax(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        parts = order.split(max(1, _CONTEXTS_ON_CPU // unit))
        return [contexts.view(-1, unit)[part].flatten() for part in parts]

    def processors(self, rows_per_question: int) -> LogitsProcessorList:
        """Return the caller's logits processors for calls with this many rows per question."""
        processors = LogitsProcessorList(self._logits_processor)
        if self._prefix_allowed_tokens_fn is not None:
            constraint = PrefixConstrainedLogitsProcessor(
                self._prefix_allowed_tokens_fn, num_beams=rows_per_question
            )
            processors.insert(0, constraint)
        return processors

    def generate(
        self, contexts: Tensor, *, tied: bool = False, processors: Sequence[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Generate an answer from each context of a part, and read the states of its labels.

        Args:
            contexts: indices `[n]`, one of `parts`.
            tied: the K contexts of a question have the same answer, so that stopping criteria and
                streamer see only the first of them.
            processors: logits processors in place of the caller's.

        Returns:
            The answers `[n, T]` int64, -100 after their end, and the states `[n, 1, T, H]` that
            predict them.
        """
        ids, mask = _trimmed(self.context_ids[contexts], self.context_mask[contexts], self.adapter)
        questions = contexts // self.n_docs
        share = len(contexts) / len(self.context_ids)
        state: dict[str, Any] = {}
        if self.labels is not None:
            if self._continues:
                state = self.adapter.read(ids, mask)
            hidden = self.adapter.hidden(ids, mask, self.labels[questions], state=state)
            self._label_states.append((contexts, hidden))
            self._report(share / 2)
            share /= 2
        handed_on: dict[str, Any] = {
            name: value[questions] if name in _NEGATIVE_PROMPT else value
            for name, value in self._handed_on.items()
        }
        config = self._config
        if state:
            config = copy.copy(config)
            config.update(use_cache=True, cache_implementation=None)
        unit = self.n_docs if tied else 1
        if self.streamer is not None:
            handed_on["streamer"] = _EveryNth(self.streamer, unit)
        with self.adapter.predicting() as seen:
            steps = _Steps(
                seen,
                self._stopping_criteria,
                unit,
                lambda: self._report(share / config.max_new_tokens),
            )
            out = self.adapter.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(
                    self.processors(self.n_docs) if processors is None else processors
                ),
                stopping_criteria=StoppingCriteriaList([steps]),
                **handed_on,
                **state,
            )
        self._report(share * max(0.0, 1 - steps.n_steps / config.max_new_tokens))
        start = 1 if self.adapter.kind == "seq2seq" else ids.shape[1]
        answers = _until_end(out[:, start:], config.eos_token_id or [], steps.stopped_at)
        if len(steps.kept) < answers.shape[1]:  # the model did not run once for each token
            return answers, self.adapter.hidden(ids, mask, answers)
        return answers, torch.cat(steps.kept[: answers.shape[1]], dim=1).unsqueeze(1)

    def loss(self) -> Tensor | None:
        """Return the loss of the labels once all parts are generated; None without labels."""
        if self.labels is None or self.loss_fn is None:
            return None
        contexts, states = zip(*self._label_states, strict=True)
        hidden = in_order(contexts, states)  # [B*K, 1, T, H]
        return self.loss_fn(
            hidden.view(*self.doc_scores.shape, *hidden.shape[2:]),
            self.adapter.head(),
            self.labels,
            self.doc_scores,
        ).loss


def in_order(indices: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Join parts `[n, ...]` whose rows have the given indices, in the order of the indices."""
    return torch.cat(list(parts))[torch.cat(list(indices)).argsort()]


def join_answers(indices: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """Join answers `[n, T]` of different widths as `in_order` does, padded with -100."""
    width = max(part.shape[1] for part in answers)
    padded = [pad(part, (0, width - part.shape[1]), value=IGNORE_INDEX) for part in answers]
    return in_order(indices, padded)


class _Steps(StoppingCriteria):
    """Keep the states that predict each generated token, and where the caller's criteria stop.

    Args:
        seen: inputs of the output projection in the order of the model's calls; emptied.
        criteria: the caller's stopping criteria.
        unit: rows that stop together; the criteria see the first of them.
        on_step: called after each token.
    """

    def __init__(
        self, seen: list[Tensor], criteria: list[Any], unit: int, on_step: Callable[[], None]
    ) -> None:
        self.seen = seen
        self.criteria = StoppingCriteriaList(criteria)
        self.unit = unit
        self.on_step = on_step
        self.n_steps = 0
        self.kept: list[Tensor] = []
        self.stopped_at: Tensor | None = None  # number of tokens of each row, [n]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.n_steps += 1
        if self.seen:
            # Later inputs since the last token are those of a processor, for example of guidance.
            self.kept.append(self.seen[0])
            self.seen.clear()
        self.on_step()
        if not self.criteria:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        stop = self.criteria(input_ids[:: self.unit], scores, **kwargs)
        stop = stop.repeat_interleave(self.unit)
        now = torch.where(stop, self.n_steps, torch.iinfo(torch.int64).max)
        self.stopped_at = now if self.stopped_at is None else now.minimum(self.stopped_at)
        return stop


class _EveryNth(BaseStreamer):
    """Hand on the first of every n rows to a streamer."""

    def __init__(self, streamer: BaseStreamer, n: int) -> None:
        self.streamer = streamer
        self.n = n

    def put(self, value: Tensor) -> None:
        self.streamer.put(value[:: self.n])

    def end(self) -> None:
        self.streamer.end()


def _listed(name: str, given: Sequence[Any] | None) -> list[Any]:
    if not isinstance(given, (list, tuple, type(None))):
        raise ValueError(f"{name}: expected a list, got {type(given).__name__}")
    return list(given or ())


def _trimmed(ids: Tensor, mask: Tensor, adapter: GeneratorAdapter) -> tuple[Tensor, Tensor]:
    """Remove columns that are padding in every row; on a GPU, where looking costs a wait, none."""
    if mask.device.type != "cpu":
        return ids, mask
    width = int(mask.sum(dim=1).max())
    kept = slice(0, width) if adapter.kind == "seq2seq" else slice(ids.shape[1] - width, None)
    return ids[:, kept], mask[:, kept]


def _greedy_config(
    adapter: GeneratorAdapter,
    context_width: int,
    max_new_tokens: int | None,
    pad_id: int,
    eos_id: int | None,
    settings: dict[str, Any],
) -> GenerationConfig:
    """Return the config of a greedy search with the caller's settings.

    It is the given `generation_config`, else the generator's own, changed by `settings`. Only the
    caller's own choices are refused if they contradict a greedy search.
    """
    own = base_model(adapter.model).generation_config
    given = settings.pop("generation_config", None)
    if not isinstance(given, (GenerationConfig, type(None))):
        raise ValueError(
            f"generation_config: expected a GenerationConfig, got {type(given).__name__}"
        )
    chosen = {**({} if given is None else vars(given)), **settings}
    for reason, values in _FIXED.items():
        for name, value in values.items():
            if chosen.get(name) not in (None, value):
                raise ValueError(f"{name}: expected {value}, {reason}, got {shown(chosen[name])}")
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
    own_pad, end = chosen.get("pad_token_id"), chosen.get("eos_token_id")
    ends = _as_list(own.eos_token_id) + _as_list(eos_id) if end is None else _as_list(end)
    config = copy.deepcopy(own if given is None else given)
    fixed = {name: value for values in _FIXED.values() for name, value in values.items()}
    config.update(**fixed)
    if unknown := config.update(**{n: v for n, v in settings.items() if n not in fixed}):
        raise ValueError(_unknown(sorted(unknown)))
    config.update(
        max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
        pad_token_id=pad_id if own_pad is None else own_pad,
        eos_token_id=sorted(set(ends)) or None,
    )
    return config


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


def _until_end(tokens: Tensor, end_ids: list[int], stopped_at: Tensor | None) -> Tensor:
    """Keep each row to its first end token, included, or to where it was stopped; -100 after it.

    Args:
        tokens: `[n, T]`.
        end_ids: token ids that end an answer.
        stopped_at: numbers of tokens `[n]` after which the caller's criteria stopped a row.
    """
    is_end = torch.isin(tokens, tokens.new_tensor(end_ids))
    after = (is_end.long().cumsum(dim=1) - is_end.long()) > 0
    if stopped_at is not None:
        after |= torch.arange(tokens.shape[1], device=tokens.device) >= stopped_at[:, None]
    return tokens.masked_fill(after, IGNORE_INDEX)
