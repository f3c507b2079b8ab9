"""Adapters: the hidden states of a generator at the answer positions, for any Hugging Face model.

    hidden = adapter.hidden(context_ids, context_mask, labels)     # [B, K, T, H], before the head
    head = adapter.head()                                          # LMHead, with gradients
    state = adapter.read(context_ids, context_mask)                # contexts that are read once:
    hidden = adapter.hidden(context_ids, context_mask, labels, state=state)     # for labels,
    model.generate(context_ids, attention_mask=context_mask, **adapter.branch(state))   # answers,
    step = adapter.first(context_ids, context_mask, state)         # or answers token by token
    step = adapter.next(step, tokens)

Seq2seq: the encoder reads the context `[B*K, L]` once, the decoder reads the labels shifted right.
Causal: context (left-padded) and answer (right-padded) are one sequence with explicit positions;
the state that predicts label t is one column before it.

An adapter checks itself when it is made: hidden states and head must reproduce the model's own
logits on two tokens, plain and with the head's input scaled up until a softcap would show.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from fastrag.nn.arguments import check_answers
from fastrag.nn.caches import (
    CACHE_NAMES,
    branched,
    cache_of,
    reorder_answers,
    repeat_contexts,
    selected,
)
from fastrag.nn.heads import (
    LiveHead,
    LMHead,
    Predicting,
    architecture,
    base_model,
    declared_heads,
)
from fastrag.ops.positions import IGNORE_INDEX, check_label_values

_PROBE_LOGIT = 64.0  # size of the largest logit in the second self-check: above every softcap known
# Contexts that an encoder reads together on a CPU: enough to keep it busy, and of similar length,
# because padding costs as much time as text there.
_CONTEXTS_ON_CPU = 8
_WHOLE = ("context_ids", "context_mask", "answer")  # inputs of a run without a cache


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the ``with`` block in eval mode without gradients; give every module its own mode back.

    The mode is kept per submodule, because a user may hold parts of a training model in eval.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Step(NamedTuple):
    """A generator that has read contexts and the beginnings of their answers.

    Attributes:
        hidden: states that predict the next tokens, before the head, `[rows, H]`.
        inputs: the inputs of the model with its cache, which `GeneratorAdapter.next` uses up.
    """

    hidden: Tensor
    inputs: dict[str, Any]


class GeneratorAdapter:
    """Base class of the two adapters; `adapt_generator` makes the right one.

    Args:
        model: a transformers model with a language-model head, or a PEFT model around one.

    Raises:
        ValueError: the model's own logits are not reproduced (the architecture is named).
    """

    kind: str

    def __init__(self, model: Any) -> None:
        self.model = model
        self._live_head = self._checked_head(declared_heads(model))

    @property
    def n_vocab(self) -> int:
        """V, the size of the vocabulary that the head scores."""
        return self._live_head.n_vocab

    def room(self, context_width: int) -> int | None:
        """Return how many answer tokens the model's positions leave after a context; None: any.

        Args:
            context_width: L, the padded length of the context.
        """
        return None

    def head(self) -> LMHead:
        """Return the head as it is now, with gradients to its parameters."""
        return self._live_head()

    def hidden(
        self,
        context_ids: Tensor,
        context_mask: Tensor,
        labels: Tensor,
        *,
        state: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the hidden states that predict each label, before the head.

        Args:
            context_ids: `[B*K, L]` int64, the K contexts of a question next to each other;
                left-padded for a causal model, right-padded for seq2seq.
            context_mask: `[B*K, L]`, 1 at tokens.
            labels: `[B, T]` int64, padded on the right with -100.
            state: what `read` returned for these contexts, which are then not read again; it is
                left as it is.

        Returns:
            hidden `[B, K, T, H]`, differentiable; may be a view.

        Raises:
            ValueError: shapes or dtypes disagree, the number of contexts is not a multiple of the
                number of questions, contexts and labels exceed the model's positions, or (on the
                CPU; elsewhere the loss becomes NaN) a label is outside the vocabulary.
        """
        n_questions = labels.shape[0]
        if n_questions == 0 or context_ids.shape[0] % n_questions:
            raise ValueError(
                f"context_ids: expected [B*K, L] with B = {n_questions} as in labels, got "
                f"{list(context_ids.shape)}"
            )
        check_answers(labels)
        counted, n_vocab = labels != IGNORE_INDEX, self._live_head.n_vocab
        if torch.compiler.is_compiling():  # reading values breaks the graph; the loss checks too
            outside = counted & ((labels < 0) | (labels >= n_vocab))
        else:
            outside = check_label_values(labels, counted, n_vocab)
        labels = labels.masked_fill(outside, 0)  # the embedding has no such rows
        inputs = self.inputs(context_ids, context_mask, labels)
        if state:
            inputs = self._continued(inputs, context_ids.shape[1], state)
        states = self._captured(self._live_head, inputs)[:, -labels.shape[1] :]
        return states.unflatten(0, (n_questions, -1))

    def read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Read contexts once; `hidden`, `first` and the model's `generate` continue from the state.

        Args:
            context_ids: `[B*K, L]` int64, padded as for `hidden`.
            context_mask: `[B*K, L]`, 1 at tokens.

        Returns:
            The state after the contexts, as keyword arguments of the model; an empty dict if the
            model cannot continue from one.
        """
        read = self._read if self._continues else self._encoded
        return read(context_ids, context_mask)

    def branch(self, state: Mapping[str, Any], n_beams: int = 1) -> dict[str, Any]:
        """Return keyword arguments of the model's `generate`, which leaves `state` as it is.

        Args:
            state: what `read` returned.
            n_beams: rows that `generate` makes of each context.
        """
        branch = branched(state)
        for name in CACHE_NAMES:
            if n_beams > 1 and name in branch:
                repeat_contexts(branch[name], n_beams)
        return branch

    def select(self, state: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """Return the state of the contexts `rows` `[n]`, in which a context may be repeated."""
        return selected(branched(state), rows)

    def start(self, context_ids: Tensor) -> Tensor:
        """Return the token that each context's answer follows, `[rows, 1]`."""
        raise NotImplementedError

    def capturing(self) -> AbstractContextManager[list[Tensor]]:
        """Record the states `[rows, tokens, H]` that enter the head at each call of the model.

        While the ``with`` block runs, the model makes the logits of one position only.
        """
        return self._live_head.capture()

    def first(
        self,
        context_ids: Tensor,
        context_mask: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        cached: bool = True,
    ) -> Step:
        """Read contexts up to the first token of their answers.

        Args:
            context_ids: `[rows, L]` int64, padded as for `hidden`.
            context_mask: `[rows, L]`, 1 at tokens.
            state: what `read` returned for these contexts, which are then not read again; it is
                left as it is.
            cached: False reads contexts and answers again for each token.

        Returns:
            `Step`.
        """
        state = state or {}
        if cached and self._continues:
            return self._run(self._first_inputs(context_ids, context_mask, branched(state)))
        whole = {"context_ids": context_ids, "context_mask": context_mask}
        encoded = state or self._encoded(context_ids, context_mask)
        return self._run_whole({**whole, **encoded, "answer": context_ids[:, :0]})

    def next(self, step: Step, tokens: Tensor, rows: Tensor | None = None) -> Step:
        """Go on by one token.

        Args:
            step: the step before, which is used up.
            tokens: the tokens after it, `[n]` int64.
            rows: row of `step` that each token continues, `[n]`; None: its own. Where n is the
                number of rows of `step`, both rows have the same context.

        Returns:
            `Step` of n rows.
        """
        inputs = step.inputs
        if rows is not None and len(rows) == len(step.hidden):
            reorder_answers(inputs, rows)
        elif rows is not None:
            inputs = selected(inputs, rows)
        if "answer" in inputs:
            answer = torch.cat([inputs["answer"], tokens[:, None]], dim=1)
            return self._run_whole({**inputs, "answer": answer})
        return self._run(self._next_inputs(inputs, tokens[:, None]))

    def predicting(self) -> AbstractContextManager[list[Predicting]]:
        """Record what predicts the next token at each call of the model.

        While the ``with`` block runs, the model makes logits of each row's last token only.
        """
        return self._live_head.capture_last()

    def _encoded(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Return the part of the state that needs no cache."""
        raise NotImplementedError

    def _read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Return the state after the contexts, caches included."""
        raise NotImplementedError

    def _first_inputs(
        self, context_ids: Tensor, context_mask: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the keyword arguments of the model that predict the first token."""
        raise NotImplementedError

    def _next_inputs(self, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """Return the keyword arguments that go on from `inputs` by tokens `[rows, 1]`."""
        raise NotImplementedError

    def _continued(
        self, inputs: dict[str, Any], context_width: int, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return `inputs` without the contexts, continuing from the state after them."""
        raise NotImplementedError

    def inputs(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the model's keyword arguments for which its last T states predict the labels.

        Args:
            context_ids: `[B*K, L]` int64, padded as for `hidden`.
            context_mask: `[B*K, L]`, 1 at tokens.
            labels: `[B, T]` int64, padded on the right with -100.

        Raises:
            ValueError: contexts and labels exceed the model's positions.
        """
        raise NotImplementedError

    def _run(self, inputs: dict[str, Any]) -> Step:
        """Run the model with its cache, and predict the token after the last one."""
        with self._live_head.capture(n_rows=0) as seen:
            outputs = self.model(**inputs)
        return Step(seen[0][:, -1], {**inputs, **cache_of(outputs)})

    def _run_whole(self, inputs: dict[str, Any]) -> Step:
        """Run the model without a cache on contexts and answers, `[rows, t]`."""
        context = (inputs["context_ids"], inputs["context_mask"])
        state = {name: inputs[name] for name in inputs.keys() - {*_WHOLE}}
        labels = torch.nn.functional.pad(inputs["answer"], (0, 1))  # of any value
        return Step(self.hidden(*context, labels, state=state)[:, 0, -1], inputs)

    @functools.cached_property
    def _continues(self) -> bool:
        """Whether the model gives the same states when it continues from its cache.

        Models without a cache do not, nor do recurrent ones that then take one token at a time, nor
        those whose cache cannot be reordered.
        """
        embedding = base_model(self.model).get_input_embeddings()
        vocab = min(embedding.weight.shape[0], self.n_vocab)
        ids = torch.arange(8, device=embedding.weight.device).view(2, 4) % vocab
        mask = torch.ones_like(ids)
        mask[0, 0 if self.kind == "causal" else -1] = 0
        labels = ids[:, :3].flip(0)
        several = labels.new_tensor([1, 0, 1])  # contexts of answers, the first and last alike
        with evaluating(self.model):
            whole = self.hidden(ids, mask, labels)
            try:
                state = self._read(ids, mask)
                after = self.hidden(ids, mask, labels, state=state)
                step = self._run(self._first_inputs(ids, mask, branched(state)))
                step = self.next(step, labels[several, 0], several)
                step = self.next(step, labels[several, 1], several.new_tensor([2, 1, 0]))
                return (
                    bool(state)
                    and close_to(after, whole)
                    and close_to(step.hidden, whole[several, 0, 2])
                )
            except Exception:  # models raise many kinds here, and still run in one piece
                return False

    def _captured(self, live_head: LiveHead, inputs: dict[str, Any]) -> Tensor:
        """Run the model and return what entered its output projection."""
        with live_head.capture() as seen:
            self.model(**inputs)
        if len(seen) != 1 or seen[0].dim() != 3:
            raise ValueError(
                f"generator: expected {architecture(self.model)} to apply its output projection "
                f"once to [rows, tokens, H], got {[list(s.shape) for s in seen]}"
            )
        return seen[0]

    def _checked_head(self, heads: list[LiveHead]) -> LiveHead:
        """Return the first head that reproduces the model's logits; raise if none does."""
        device = heads[0]().weight.device
        # The decoder of an EncoderDecoderModel may have a smaller vocabulary than its encoder.
        embedding = base_model(self.model).get_input_embeddings()
        vocab = min(embedding.weight.shape[0], heads[0].n_vocab)
        context = torch.tensor([[vocab // 2, vocab // 3]], device=device)
        labels = torch.tensor([[vocab // 4, vocab // 5]], device=device)
        other = torch.tensor([[vocab // 6, vocab // 5]], device=device)
        with evaluating(self.model):
            inputs = self.inputs(context, torch.ones_like(context), labels)
            hidden = self._captured(heads[0], inputs)
            changed = self.inputs(context, torch.ones_like(context), other)
            if not close_to(hidden[:, -2], self._captured(heads[0], changed)[:, -2]):
                raise ValueError(
                    f"generator: expected a causal decoder, got {architecture(self.model)}, whose "
                    f"state at a position depends on later tokens"
                )
            own = self.model(**inputs).logits
            largest = heads[0]().logits(hidden).float().abs().max().clamp(min=1e-6)
            loud = hidden * (_PROBE_LOGIT / (heads[0].logit_scale * largest)).to(hidden.dtype)
            with heads[0].capture(replace=loud):
                own_loud = self.model(**inputs).logits
            for live in heads:
                head = live()
                if close_to(head.logits(hidden), own) and close_to(head.logits(loud), own_loud):
                    return live
        tried = [f"logit_scale={h.logit_scale:g}, softcap={h.softcap}" for h in heads]
        raise ValueError(
            f"generator: expected logits = softcap*tanh(logit_scale*(hidden W^T + bias)/softcap), "
            f"but {architecture(self.model)} gives other logits on two tokens (tried {tried})"
        )


class Seq2SeqAdapter(GeneratorAdapter):
    """Encoder-decoder models: BART, mBART, Pegasus, Marian, T5, EncoderDecoderModel, and so on."""

    kind = "seq2seq"

    def _encoded(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        encoder = base_model(self.model).get_encoder()
        n, width = context_mask.shape
        if context_mask.device.type != "cpu" or n <= _CONTEXTS_ON_CPU:
            outputs = encoder(input_ids=context_ids, attention_mask=context_mask, return_dict=True)
            return {"encoder_outputs": outputs}
        lengths = context_mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        states = []
        for rows in order.split(_CONTEXTS_ON_CPU):
            longest = int(lengths[rows[0]])
            ids, mask = (each[rows, :longest] for each in (context_ids, context_mask))
            state = encoder(input_ids=ids, attention_mask=mask, return_dict=True)[0]
            states.append(nn.functional.pad(state, (0, 0, 0, width - longest)))
        return {"encoder_outputs": BaseModelOutput(torch.cat(states)[order.argsort()])}

    def _read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Read contexts, and keep what the decoder makes of them: keys and values."""
        state = self._encoded(context_ids, context_mask)
        with self._live_head.capture():
            outputs = self.model(**self._first_inputs(context_ids, context_mask, state))
        config = base_model(self.model).config.get_text_config(decoder=True)
        for name, cache in cache_of(outputs).items():
            state[name] = EncoderDecoderCache(
                DynamicCache(config=config), cache.cross_attention_cache
            )
        return state

    def _first_inputs(
        self, context_ids: Tensor, context_mask: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "attention_mask": context_mask,
            "decoder_input_ids": self.start(context_ids),
            "use_cache": True,
            "return_dict": True,
            **(state or self._encoded(context_ids, context_mask)),
        }

    def _next_inputs(self, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        return {**inputs, "decoder_input_ids": tokens}

    def _continued(
        self, inputs: dict[str, Any], context_width: int, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        news = {name: value for name, value in inputs.items() if name != "input_ids"}
        return {**news, **branched(state), "use_cache": len(state) > 1}

    def inputs(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        pad = getattr(base_model(self.model).config, "pad_token_id", None) or 0
        known = labels.masked_fill(labels == IGNORE_INDEX, pad)
        decoder_ids = torch.cat([self.start(known), known[:, :-1]], dim=1)
        n_docs = context_ids.shape[0] // labels.shape[0]
        return {
            "input_ids": context_ids,
            "attention_mask": context_mask,
            "decoder_input_ids": decoder_ids.repeat_interleave(n_docs, dim=0),
            "use_cache": False,
            "return_dict": True,
        }

    def start(self, context_ids: Tensor) -> Tensor:
        base = base_model(self.model)
        start = getattr(base.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(base.generation_config, "decoder_start_token_id", None)
        if start is None:
            raise ValueError(
                f"generator: expected config.decoder_start_token_id on {architecture(self.model)}, "
                f"got None"
            )
        return context_ids.new_full((len(context_ids), 1), start)


class CausalAdapter(GeneratorAdapter):
    """Decoder-only models: GPT-2, Llama, Qwen, Gemma, Granite, Cohere, Phi, and so on."""

    kind = "causal"

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(base_model(model).forward).parameters
        self._takes_positions = "position_ids" in parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), None)
        super().__init__(model)

    def start(self, context_ids: Tensor) -> Tensor:
        return context_ids[:, -1:]

    def _encoded(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        return {}

    def _read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Read all but the last column, which holds the token that predicts the first label."""
        if context_ids.shape[1] == 1:
            return {}
        return self.resume(context_ids[:, :-1], context_mask[:, :-1], {}, 0)

    def resume(
        self, context_ids: Tensor, context_mask: Tensor, state: dict[str, Any], n_read: int
    ) -> dict[str, Any]:
        """Read the columns after those that a state stands for.

        Args:
            context_ids: `[rows, L]` int64, left-padded.
            context_mask: `[rows, L]`, 1 at tokens.
            state: the state after the first `n_read` columns, which is used up.
            n_read: number of columns, below L.

        Returns:
            The state after all L columns.
        """
        inputs = self._inputs_from(n_read, context_ids, context_mask, state)
        with self._live_head.capture():
            outputs = self.model(**inputs)
        return cache_of(outputs)

    def _first_inputs(
        self, context_ids: Tensor, context_mask: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        return self._inputs_from(-1 if state else 0, context_ids, context_mask, state)

    def _inputs_from(
        self, first: int, context_ids: Tensor, context_mask: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        inputs = {
            "input_ids": context_ids[:, first:],
            "attention_mask": context_mask,
            "use_cache": True,
            "return_dict": True,
            **state,
        }
        if self._takes_positions:
            inputs["position_ids"] = _positions(context_mask)[:, first:]
        return inputs

    def _next_inputs(self, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        news = {"input_ids": tokens, "attention_mask": mask}
        if self._takes_positions:
            news["position_ids"] = inputs["position_ids"][:, -1:] + 1
        return {**inputs, **news}

    def _continued(
        self, inputs: dict[str, Any], context_width: int, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        news: dict[str, Any] = {
            name: inputs[name][:, context_width - 1 :]
            for name in ("input_ids", "position_ids")
            if name in inputs
        }
        return {**inputs, **news, **branched(state), "use_cache": True}

    def room(self, context_width: int) -> int | None:
        positions = getattr(base_model(self.model).config, "max_position_embeddings", None)
        # The last answer token is predicted but never read: it needs no position.
        return None if positions is None else int(positions) - context_width + 1

    def inputs(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        room = self.room(context_ids.shape[1])
        if room is not None and labels.shape[1] > room:
            raise ValueError(
                f"labels: expected at most {room} tokens after a context of "
                f"{context_ids.shape[1]} in the generator's positions, got {labels.shape[1]} "
                f"(lower max_context or max_answer)"
            )
        counted = labels != IGNORE_INDEX
        n_docs = context_ids.shape[0] // labels.shape[0]
        # The last label is predicted but never read. Padding is after all that it could disturb.
        answer = labels.masked_fill(~counted, 0)[:, :-1].repeat_interleave(n_docs, dim=0)
        answer_mask = counted[:, :-1].repeat_interleave(n_docs, dim=0).to(context_mask.dtype)
        mask = torch.cat([context_mask, answer_mask], dim=1)
        inputs = {
            "input_ids": torch.cat([context_ids, answer], dim=1),
            "attention_mask": mask,
            "use_cache": False,
            "return_dict": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = _positions(mask)
        return inputs


def adapt_generator(model: Any) -> GeneratorAdapter:
    """Return the adapter of a Hugging Face generator, checked against the model's own logits.

    Args:
        model: any seq2seq or causal language model of transformers, plain or with PEFT adapters on
            its weights. LoRA on the head is used as W + scaling * B A, with gradients to A and B.

    Returns:
        `Seq2SeqAdapter` or `CausalAdapter`; its `kind` is "seq2seq" or "causal".

    Raises:
        ValueError: no language-model head, a head or adapter that is not of the form in
            `fastrag.nn.heads`, prompt-learning adapters (the message names what it is), a model
            that torch.compile or accelerate has wrapped, or one on the meta device.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fastrag.nn import adapt_generator
        >>> config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
        >>> adapter = adapt_generator(GPT2LMHeadModel(config))
        >>> context = torch.randint(20, (4, 5))                    # B = 2 questions, K = 2
        >>> labels = torch.tensor([[3, 4, 5], [6, 7, -100]])
        >>> adapter.kind, adapter.hidden(context, torch.ones_like(context), labels).shape
        ('causal', torch.Size([2, 2, 3, 8]))
    """
    _refuse_wrapped(model)
    config = getattr(base_model(model), "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(
            f"generator: expected a transformers model with a language-model head, got "
            f"{type(model).__name__}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"generator: expected a model with weights, got {architecture(model)} on the meta "
            f"device"
        )
    return Seq2SeqAdapter(model) if config.is_encoder_decoder else CausalAdapter(model)


def _refuse_wrapped(model: Any) -> None:
    """Raise ValueError for a model inside a wrapper, which the adapter would bypass.

    If the inner module were used, DDP would average no gradients and torch.compile would compile
    nothing, both silently.
    """
    inner = getattr(model, "_orig_mod", None)
    if inner is None:
        inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module):
        got = f"{type(model).__name__} around {architecture(inner)}"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        got = f"a compiled {architecture(model)}"
    elif hasattr(model, "_original_forward"):  # accelerate's mixed precision
        got = f"{architecture(model)} with the forward of accelerate"
    else:
        return
    raise ValueError(
        f"generator: expected a plain transformers model, got {got}; adapt before "
        f"accelerator.prepare or torch.compile"
    )


def _positions(mask: Tensor) -> Tensor:
    """Return the position of each token of left-padded rows, 0 at padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def close_to(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree to a few roundings of the coarser dtype of the two."""
    if got.shape != expected.shape:
        return False
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(expected.dtype).eps)
    got, expected = got.double(), expected.double()
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((got - expected).abs().max() <= max(8 * eps, 1e-5) * scale)
