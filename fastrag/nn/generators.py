"""Adapters: the hidden states of a generator at the answer positions, for any Hugging Face model.

    hidden = adapter.hidden(context_ids, context_mask, labels)     # [B, K, T, H], before the head
    head = adapter.head()                                          # LMHead, with gradients
    state = adapter.read(context_ids, context_mask)                # read the contexts once,
    hidden = adapter.hidden(context_ids, context_mask, labels, state=state)     # for labels
    model.generate(context_ids, attention_mask=context_mask, **state)           # and for answers

Seq2seq: the encoder reads the context `[B*K, L]` once, the decoder reads the labels shifted right.
Causal: context (left-padded) and answer (right-padded) are one sequence with explicit positions;
the state that predicts label t is one column before it.

An adapter checks itself when it is made: hidden states and head must reproduce the model's own
logits on two tokens, plain and with the head's input scaled up until a softcap would show.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastrag.nn.arguments import check_answers
from fastrag.nn.heads import LiveHead, LMHead, architecture, base_model, declared_heads
from fastrag.ops.positions import IGNORE_INDEX, check_label_values

_PROBE_LOGIT = 64.0  # size of the largest logit in the second self-check: above every softcap known
_CACHE_NAMES = ("cache", "past_key_values")  # transformers' name from 5.24 on, and before


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
        """Read contexts once; `hidden` and the model's `generate` continue from the result.

        Args:
            context_ids: `[B*K, L]` int64, padded as for `hidden`.
            context_mask: `[B*K, L]`, 1 at tokens.

        Returns:
            Keyword arguments of the model's `generate`, which uses them up; an empty dict if the
            model cannot continue from them.
        """
        raise NotImplementedError

    def capturing(self) -> AbstractContextManager[list[Tensor]]:
        """Record the states `[rows, tokens, H]` that enter the head at each call of the model.

        While the ``with`` block runs, the model makes the logits of one position only.
        """
        return self._live_head.capture()

    def predicting(self) -> AbstractContextManager[list[Tensor]]:
        """Record the states `[rows, 1, H]` that predict the next token at each call of the model.

        While the ``with`` block runs, the model makes logits of each row's last token only.
        """
        return self._live_head.capture_last()

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
            if not _close(hidden[:, -2], self._captured(heads[0], changed)[:, -2]):
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
                if _close(head.logits(hidden), own) and _close(head.logits(loud), own_loud):
                    return live
        tried = [f"logit_scale={h.logit_scale:g}, softcap={h.softcap}" for h in heads]
        raise ValueError(
            f"generator: expected logits = softcap*tanh(logit_scale*(hidden W^T + bias)/softcap), "
            f"but {architecture(self.model)} gives other logits on two tokens (tried {tried})"
        )


class Seq2SeqAdapter(GeneratorAdapter):
    """Encoder-decoder models: BART, mBART, Pegasus, Marian, T5, EncoderDecoderModel, and so on."""

    kind = "seq2seq"

    def read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        encoder = base_model(self.model).get_encoder()
        outputs = encoder(input_ids=context_ids, attention_mask=context_mask, return_dict=True)
        return {"encoder_outputs": outputs}

    def _continued(
        self, inputs: dict[str, Any], context_width: int, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != "input_ids"} | {**state}

    def inputs(self, context_ids: Tensor, context_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        decoder_ids = self._shift_right(labels)
        n_docs = context_ids.shape[0] // labels.shape[0]
        return {
            "input_ids": context_ids,
            "attention_mask": context_mask,
            "decoder_input_ids": decoder_ids.repeat_interleave(n_docs, dim=0),
            "use_cache": False,
            "return_dict": True,
        }

    def _shift_right(self, labels: Tensor) -> Tensor:
        """Return the decoder's input: its start token, then the labels but the last."""
        base = base_model(self.model)
        pad = getattr(base.config, "pad_token_id", None) or 0
        known = labels.masked_fill(labels == IGNORE_INDEX, pad)
        start = getattr(base.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(base.generation_config, "decoder_start_token_id", None)
        if start is None:
            raise ValueError(
                f"generator: expected config.decoder_start_token_id on {architecture(self.model)}, "
                f"got None"
            )
        return torch.cat([known.new_full((known.shape[0], 1), start), known[:, :-1]], dim=1)


class CausalAdapter(GeneratorAdapter):
    """Decoder-only models: GPT-2, Llama, Qwen, Gemma, Granite, Cohere, Phi, and so on."""

    kind = "causal"

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(base_model(model).forward).parameters
        self._takes_positions = "position_ids" in parameters
        super().__init__(model)

    def read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        return self._read(context_ids, context_mask) if self._continues else {}

    def _read(self, context_ids: Tensor, context_mask: Tensor) -> dict[str, Any]:
        """Read all but the last column, which holds the token that predicts the first label."""
        before = context_mask[:, :-1]
        if before.shape[1] == 0:
            return {}
        inputs = {
            "input_ids": context_ids[:, :-1],
            "attention_mask": before,
            "use_cache": True,
            "return_dict": True,
        }
        if self._takes_positions:
            inputs["position_ids"] = _positions(before)
        with self._live_head.capture():
            outputs = self.model(**inputs)
        # Only the first, because an output with the new name also answers to the old one.
        found = [name for name in _CACHE_NAMES if name in outputs.keys()][:1]  # noqa: SIM118
        return {name: outputs[name] for name in found}

    def _continued(
        self, inputs: dict[str, Any], context_width: int, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        news: dict[str, Any] = {
            name: inputs[name][:, context_width - 1 :]
            for name in ("input_ids", "position_ids")
            if name in inputs
        }
        caches = {name: _branch(cache) for name, cache in state.items()}
        return {**inputs, **news, **caches, "use_cache": True}

    @functools.cached_property
    def _continues(self) -> bool:
        """Whether the model gives the same states when it continues from its cache.

        Models without a cache do not, nor do recurrent ones that then take one token at a time.
        """
        embedding = base_model(self.model).get_input_embeddings()
        vocab = min(embedding.weight.shape[0], self.n_vocab)
        ids = torch.arange(8, device=embedding.weight.device).view(2, 4) % vocab
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        labels = ids[:, :3].flip(0)
        with evaluating(self.model):
            whole = self.hidden(ids, mask, labels)
            try:
                state = self._read(ids, mask)
                return bool(state) and _close(self.hidden(ids, mask, labels, state=state), whole)
            except Exception:  # models raise many kinds here, and still run in one piece
                return False

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


def _branch(cache: Any) -> Any:
    """Return a cache that grows independently and shares the present tensors if possible.

    The layers named here replace their tensors when they grow; others may write into them.
    """
    branch = copy.copy(cache)
    branch.layers = [
        copy.copy(layer)
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return branch


def _close(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree to a few roundings of the coarser dtype of the two."""
    if got.shape != expected.shape:
        return False
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(expected.dtype).eps)
    got, expected = got.double(), expected.double()
    scale = expected.abs().max().clamp(min=1e-6)
    return bool((got - expected).abs().max() <= max(8 * eps, 1e-5) * scale)
