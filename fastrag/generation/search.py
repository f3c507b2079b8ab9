"""Search: the questions with their contexts, read and answered part by part, for all decoders.

A decoder takes a `Search` and returns a `RagGeneration`:

    for reading in search.readings():                   # some of the B*K contexts
        answers, logp = search.generate(reading)        # [n, T], and log p of their tokens
        ...
    loss = search.loss()                                # of the labels, None without labels

Each context is read once: labels and answers continue from the same state, and what predicts the
tokens of an answer is kept while the answer is generated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from fastrag import functional
from fastrag.generation.settings import refuse, search_config
from fastrag.ops.mixture_logp import chosen_logit
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter
    from fastrag.nn.heads import LMHead, Predicting
    from fastrag.nn.loss import RagLoss
    from fastrag.nn.prefix_cache import PrefixCache

# Settings under which the search cannot continue from a state that has read the contexts.
_OWN_CACHE = ("use_cache", "cache_implementation", "cache_config")
_WITH_PREFIX_CACHE: dict[str, Any] = {**dict.fromkeys(_OWN_CACHE), "use_cache": True}
# Arguments of transformers' generate with one row per question.
_NEGATIVE_PROMPT = ("negative_prompt_ids", "negative_prompt_attention_mask")
# Contexts that are generated together on a CPU, of similar length, because padding costs as much
# time as text there; but a step of few rows takes nearly as long as one of many, which read the
# generator's weights once too. A GPU takes all contexts at once.
_CONTEXTS_ON_CPU = 64


class Reading(NamedTuple):
    """Contexts that are generated from together.

    Attributes:
        contexts: their indices, `[n]`; context b*K + k is passage k of question b.
        ids: `[n, L]`, padded as the adapter's kind wants it.
        mask: `[n, L]`, 1 at tokens.
        state: the state of the contexts, of `adapter.read`; empty if it was not needed.
    """

    contexts: Tensor
    ids: Tensor
    mask: Tensor
    state: dict[str, Any]


class Search:
    """Search for answers to B questions from K contexts each, with transformers' `generate`.

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
        prefix_cache: keeps what the generator has read of the contexts before their questions.
        prefix_len: length of that part of each context, `[B*K]` int64; None: there is none.
        logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer: as in transformers'
            `generate`. With one of them, all contexts are generated at once and in order: context
            b*K + k is passage k of question b. `prefix_allowed_tokens_fn` gets b as its batch id.
        generate_kwargs: other arguments of transformers' `generate`, and fields of its
            `GenerationConfig`. `negative_prompt_ids` has one row per question.

    Raises:
        ValueError: shapes disagree, a count below 1, a setting of another search or one that
            transformers does not know, labels without a loss, contexts that leave the generator no
            position to answer in.

    Example:
        >>> search = Search(adapter, ids, mask, doc_scores, rows)           # doctest: +SKIP
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
        prefix_cache: PrefixCache | None = None,
        prefix_len: Tensor | None = None,
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
        if prefix_cache is not None:
            prefix_cache.check(adapter, has_prefix=prefix_len is not None)
        self.adapter = adapter
        self.context_ids = context_ids
        self.context_mask = context_mask
        self.doc_scores = doc_scores
        self.rows = rows
        self.labels = labels
        self.loss_fn = loss_fn
        self.prefix_cache = prefix_cache
        self.prefix_len = prefix_len
        self.streamer = streamer
        self._logits_processor = _listed("logits_processor", logits_processor)
        self._stopping_criteria = _listed("stopping_criteria", stopping_criteria)
        self._prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        callables = (logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer)
        self._in_order = any(given is not None for given in callables)
        self._report = on_progress or (lambda share: None)
        self._label_states: list[tuple[Tensor, Tensor]] = []
        tokenizer = generate_kwargs.pop("tokenizer", None)
        self.handed_on = {
            name: generate_kwargs.pop(name)
            for name in ("synced_gpus", *_NEGATIVE_PROMPT)
            if name in generate_kwargs
        }
        config = generate_kwargs.get("generation_config")
        self.own_cache = {
            name: value
            for name in _OWN_CACHE
            if (value := generate_kwargs.get(name, getattr(config, name, None))) is not None
        }
        if prefix_cache is not None:
            refuse(self.own_cache, _WITH_PREFIX_CACHE, "because there is a prefix_cache")
        self.config, self.n_return = search_config(
            adapter, context_ids.shape[1], max_new_tokens, pad_id, eos_id, generate_kwargs
        )
        self.pad_id: int = self.config.pad_token_id
        if stop_strings := self.config.stop_strings:
            if tokenizer is None:
                raise ValueError(
                    "tokenizer: expected the generator's tokenizer for stop_strings, got None"
                )
            # A criterion like any other, so that scores end where it stops an answer.
            self.config.stop_strings = None
            self.handed_on["tokenizer"] = tokenizer  # for those of the generator's own config
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

    @property
    def log_prior(self) -> Tensor:
        """log p(z|x) of the contexts, `[B, K]`."""
        return self.prior_scores.log_softmax(dim=1)

    def readings(self, *, tied: bool = False, wanted: bool = False) -> Iterator[Reading]:
        """Yield the contexts in parts that are generated together, and read their labels' states.

        Args:
            tied: keep the K contexts of a question together and in order.
            wanted: read the state of the contexts even if there are no labels.
        """
        for contexts in self._parts(self.n_docs if tied else 1):
            ids, mask = self.context_ids[contexts], self.context_mask[contexts]
            ids, mask = _trimmed(ids, mask, self.adapter)
            state: dict[str, Any] = {}
            if self.prefix_cache is not None and self.prefix_len is not None:
                prefix_len = self.prefix_len[contexts]
                state = self.prefix_cache.read(self.adapter, ids, mask, prefix_len)
            elif not self.own_cache and (wanted or self.labels is not None):
                state = self.adapter.read(ids, mask)
            if self.labels is not None:
                labels = self.labels[contexts // self.n_docs]
                hidden = self.adapter.hidden(ids, mask, labels, state=state)
                self._label_states.append((contexts, hidden))
                self._report(len(contexts) / len(self.context_ids) / 2)
            yield Reading(contexts, ids, mask, state)

    def _parts(self, unit: int) -> list[Tensor]:
        """Return the indices of the contexts that are generated together, by length on a CPU."""
        contexts = torch.arange(len(self.context_ids), device=self.context_ids.device)
        if contexts.device.type != "cpu" or self._in_order:
            return [contexts]
        lengths = self.context_mask.sum(dim=1).view(-1, unit).amax(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        parts = order.split(max(1, _CONTEXTS_ON_CPU // unit))
        return [contexts.view(-1, unit)[part].flatten() for part in parts]

    def generate(self, reading: Reading, n_each: int = 1) -> tuple[Tensor, Tensor]:
        """Generate answers from each context by itself, with the generator's own logits.

        Args:
            reading: one of `readings`.
            n_each: answers from each context.

        Returns:
            The answers `[n * n_each, T]` int64, those of a context next to each other, -100 after
            their end; and log p(y_t|x,z,y_<t) of their tokens by the unchanged distributions,
            `[n * n_each, T]`, 0 after the end.
        """
        contexts, ids, mask, state = reading
        settings: dict[str, Any] = {"num_return_sequences": n_each}
        if state:
            settings |= {"use_cache": True, "cache_implementation": None}
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= self.adapter.branch(state, max(n_each, self.config.num_beams))
        for name in self.handed_on.keys() & {*_NEGATIVE_PROMPT}:
            inputs[name] = self.handed_on[name][contexts // self.n_docs]
        kept: list[Predicting] = []
        with self.adapter.predicting() as seen:

            def keep() -> None:
                if seen:
                    # Later inputs since the last token are those of a processor, as of guidance.
                    kept.append(seen[0])
                    seen.clear()

            answers, rows = self.run(self.adapter.model, reading, inputs, settings, keep)
        if len(kept) < answers.shape[1]:  # the model did not run once for each token
            ids, mask = (each.repeat_interleave(n_each, dim=0) for each in (ids, mask))
            hidden = self.adapter.hidden(ids, mask, answers)
            return answers, label_logp(self.adapter.head(), hidden, answers).squeeze(1)
        hidden, log_z = (chosen(part, rows) for part in zip(*kept, strict=True))
        return answers, chosen_logp(self.adapter.head(), hidden, log_z, answers).squeeze(1)

    def run(
        self,
        model: Any,
        reading: Reading,
        inputs: dict[str, Any],
        settings: dict[str, Any],
        on_step: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Run transformers' `generate`.

        Args:
            model: what has the method, its rows in the order of the questions.
            reading: the contexts, which tell the share of the work.
            inputs: the model's inputs, `input_ids` among them.
            settings: fields of the config for this run.
            on_step: called after each call of the model.

        Returns:
            The answers `[n, T]` int64, -100 after their end, and the row of the model's call that
            chose each of their tokens, `[n, T]`.
        """
        ids = inputs["input_ids"]
        encoded = getattr(model.config, "is_encoder_decoder", False)
        n_prompt = 1 if encoded else ids.shape[1]
        config = copy.copy(self.config)
        config.update(return_dict_in_generate=True, **settings)
        n_rows = max(config.num_beams, config.num_return_sequences)  # for each row of the inputs
        n_questions = len(reading.contexts) // self.n_docs
        processors = self._processors(len(ids) * n_rows // max(1, n_questions))
        if no_end := _no_end(config, model.generation_config, n_prompt):
            config.update(min_length=0, min_new_tokens=None)
            processors.insert(0, no_end)
        share = len(reading.contexts) / len(self.context_ids)
        share *= 1.0 if self.labels is None else 0.5

        def step() -> None:
            on_step()
            self._report(share / config.max_new_tokens)

        stopping = _Steps(self._stopping_criteria, step)
        handed_on = {n: v for n, v in self.handed_on.items() if n not in _NEGATIVE_PROMPT}
        if self.streamer is not None:
            handed_on["streamer"] = self.streamer
        out = model.generate(
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([stopping]),
            **handed_on,
            **inputs,
        )
        self._report(share * max(0.0, 1 - stopping.n_steps / config.max_new_tokens))
        tokens = out.sequences[:, n_prompt:]
        beams = getattr(out, "beam_indices", None)
        if beams is not None:
            return tokens.masked_fill(beams < 0, IGNORE_INDEX), beams.clamp(min=0)
        answers = _until_end(tokens, config.eos_token_id or [], stopping.stopped_at)
        return answers, torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)

    def _processors(self, rows_per_question: int) -> LogitsProcessorList:
        """Return the caller's logits processors, to be called with so many rows per question."""
        processors = LogitsProcessorList(self._logits_processor)
        if self._prefix_allowed_tokens_fn is not None:
            constraint = PrefixConstrainedLogitsProcessor(
                self._prefix_allowed_tokens_fn, num_beams=rows_per_question
            )
            processors.insert(0, constraint)
        return processors

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


def chosen(states: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return what chose the tokens of answers, `[n, K, T, ...]`.

    Args:
        states: that of each step, `[rows, K, ...]`.
        rows: the row that chose each token, `[n, T]`.
    """
    steps = zip(states, rows.unbind(dim=1), strict=False)  # the last steps may serve no answer
    return torch.stack([state[row] for state, row in steps], dim=2)


def chosen_logp(head: LMHead, hidden: Tensor, log_z: Tensor, tokens: Tensor) -> Tensor:
    """Return log p of tokens `[n, T]`, `[n, K, T]`; 0 at -100.

    Args:
        head: the head of the generator.
        hidden: what predicts the tokens, `[n, K, T, H]`.
        log_z: log sum_v exp(z_v) of its logits z, `[n, K, T]`.
        tokens: `[n, T]`, -100 after the end.
    """
    missing = tokens == IGNORE_INDEX
    logit = chosen_logit(hidden, tokens=tokens.masked_fill(missing, 0), **vars(head))
    return (logit - log_z).masked_fill(missing.unsqueeze(1), 0.0)


def label_logp(head: LMHead, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return log p of tokens `[n, T]` from the states `[n, K, T, H]`, `[n, K, T]`; 0 at -100."""
    return functional.token_logp(
        hidden,
        head.weight,
        tokens,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE_INDEX,
    )


def each_of(indices: Tensor, n: int) -> Tensor:
    """Return the indices of n rows for each index, which are next to each other."""
    each = torch.arange(n, device=indices.device)
    return (indices.unsqueeze(1) * n + each).flatten()


class _NoEnd(LogitsProcessor):
    """Let no answer end before a length, in place.

    The processors of transformers for `min_length` and `min_new_tokens` copy the scores of the
    whole vocabulary twice each, and both run if `min_new_tokens` is given.

    Args:
        end_ids: token ids that end an answer.
        min_length: tokens of prompt and answer before which it must not end.
    """

    def __init__(self, end_ids: list[int], min_length: int) -> None:
        self.end_ids = end_ids
        self.min_length = min_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.min_length:
            scores[:, self.end_ids] = -torch.inf
        return scores


def _no_end(config: GenerationConfig, own: GenerationConfig | None, n_prompt: int) -> _NoEnd | None:
    """Return what replaces the shortest length of `config`, if it has one.

    None if an end would be forced where it is masked: transformers masks the end first, and runs
    other processors than its own after it has forced a token.
    """
    least = config.min_length or 0
    if config.min_new_tokens is not None:
        least = n_prompt + config.min_new_tokens
    ends = config.eos_token_id or []
    first, last = (
        {getattr(each, f"forced_{name}_token_id", None) for each in (config, own)} - {None}
        for name in ("bos", "eos")
    )
    forced = first & {*ends} or (last and least >= n_prompt + config.max_new_tokens)
    return None if forced or not ends or least <= n_prompt else _NoEnd(ends, least)


class _Steps(StoppingCriteria):
    """Count the tokens, and keep where the caller's criteria stop an answer that is no beam.

    Args:
        criteria: the caller's stopping criteria.
        on_step: called after each token.
    """

    def __init__(self, criteria: list[Any], on_step: Callable[[], None]) -> None:
        self.criteria = StoppingCriteriaList(criteria)
        self.on_step = on_step
        self.n_steps = 0
        self.stopped_at: Tensor | None = None  # number of tokens of each row, [n]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.n_steps += 1
        self.on_step()
        if not self.criteria:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        stop = self.criteria(input_ids, scores, **kwargs)
        now = torch.where(stop, self.n_steps, torch.iinfo(torch.int64).max)
        self.stopped_at = now if self.stopped_at is None else now.minimum(self.stopped_at)
        return stop


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
