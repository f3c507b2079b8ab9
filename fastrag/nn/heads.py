"""The language-model head of any Hugging Face generator: weight, bias, scale and softcap.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)     with a softcap
    logits = logit_scale * (hidden W^T + bias)                               without one

`hidden` is the input of the output projection. It is captured at the projection itself, so all
that an architecture does before it (the d_model**-0.5 of tied T5, the transform of BERT's head) is
part of `hidden` and of its gradient, and no list of architectures is needed. Scale and softcap are
read from the model's own configuration and tested against the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrag.ops.mixture_logp import head_products

# Attributes under which configurations state what happens to the logits after the projection.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1
_SCALINGS = ("logits_scaling",)  # Granite divides by it, HyperCLOVA X multiplies
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Predicting(NamedTuple):
    """States that predict the next tokens, recorded at one call of a model.

    Attributes:
        hidden: the input of the head at the last position, `[rows, 1, H]`.
        log_z: log sum_v exp(z_v) of its logits z, `[rows, 1]`.
    """

    hidden: Tensor
    log_z: Tensor


@dataclass(frozen=True)
class LMHead:
    """What turns the last hidden states into logits, as tensors that carry gradients.

    Args:
        weight: output projection `[V, H]`.
        bias: `[V]` or None.
        softcap: c of ``c * tanh(z / c)``, or None.
        logit_scale: factor on ``hidden @ weight.T + bias``.

    Example:
        >>> import torch
        >>> from fastrag.nn import LMHead
        >>> head = LMHead(torch.eye(2), torch.tensor([0.0, 1.0]), logit_scale=2.0)
        >>> head.logits(torch.tensor([[3.0, 4.0]]))
        tensor([[ 6., 10.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., V]` of `hidden` `[..., H]`, literally as the equation above."""
        logits = self.logit_scale * nn.functional.linear(hidden, self.weight, self.bias)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


def base_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or `model` itself.

    Raises:
        ValueError: the adapter learns a prompt; its virtual tokens would shift every position.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            kind = config.peft_type
            raise ValueError(
                f"generator: expected a PEFT adapter on the weights (such as LoRA), got the "
                f"prompt-learning adapter {name!r} of type {getattr(kind, 'value', kind)}"
            )
    return model.get_base_model()


def architecture(model: Any) -> str:
    """Return the class name that error messages use for `model`, inside any PEFT wrapper."""
    return type(base_model(model)).__name__


class LiveHead:
    """The head of `model`, read again at each call, so that it is never a stale copy.

    Gradients reach the weight whether it is tied to the input embedding or not, and the LoRA
    matrices A and B where the head carries LoRA. It holds after `load_state_dict`, `.to()`,
    `resize_token_embeddings` and adapter switches.

    Args:
        model: a transformers model with an output projection, or a PEFT model around one.
        logit_scale: factor on the projection.
        softcap: bound of the logits, or None.

    Raises:
        ValueError: the model has no output projection, or an adapter on it is not plain LoRA.
    """

    def __init__(
        self, model: Any, *, logit_scale: float = 1.0, softcap: float | None = None
    ) -> None:
        self.model = model
        self.logit_scale = logit_scale
        self.softcap = softcap
        self()

    def __call__(self) -> LMHead:
        base = base_model(self.model)
        weight, bias = _projection(_output_module(base), type(base).__name__)
        extra = getattr(base, "final_logits_bias", None)  # BART, mBART, Marian
        if extra is not None:
            extra = extra.reshape(-1).to(weight.dtype)
            bias = extra if bias is None else bias + extra
        return LMHead(weight, bias, self.softcap, self.logit_scale)

    @property
    def n_vocab(self) -> int:
        """V, the rows of the output projection."""
        module: Any = _output_module(self.model)
        module = getattr(module, "original_module", module)
        return int(getattr(module, "base_layer", module).weight.shape[0])

    @contextmanager
    def capture(self, replace: Tensor | None = None, *, n_rows: int = 1) -> Iterator[list[Tensor]]:
        """Record the inputs of the projection while the model runs inside the ``with`` block.

        The projection itself then sees the first position of `n_rows` rows only, so the
        vocabulary-sized logits are never made. With `replace`, it sees that tensor instead.
        """
        seen: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:n_rows, :1] if replace is None else replace, *args[1:])

        handle = _output_module(self.model).register_forward_pre_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def capture_last(self) -> Iterator[list[Predicting]]:
        """Record what predicts the next token of each row, at each call inside the ``with`` block.

        The projection sees no row. Its output is replaced by the products of the last states, which
        are computed together with log_z, so the logits of a whole context are never made.
        """
        seen: list[Predicting] = []
        module, head = _output_module(self.model), vars(self())
        _, bias = _projection(module, architecture(self.model))
        logits: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0][:, -1:]
            z0, log_z = head_products(hidden.squeeze(1), **head)
            logits.append(z0 if bias is None else z0.add_(bias))
            seen.append(Predicting(hidden, log_z.unsqueeze(1)))
            return (args[0][:0, :1], *args[1:])

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return logits.pop().to(output.dtype).unsqueeze(1)

        handles = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _output_module(model: Any) -> nn.Module:
    """Return the output projection of a model, in whatever adapter layer it is wrapped."""
    base = base_model(model)
    module: nn.Module | None = base.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"generator: expected a model with a language-model head, got {type(base).__name__}, "
            f"whose get_output_embeddings() is None"
        )
    if isinstance(module, nn.Embedding):  # FSMT: the input embedding serves as the head
        raise ValueError(
            f"generator: expected an output projection module, got {type(base).__name__}, which "
            f"computes its logits from an nn.Embedding"
        )
    return module


def declared_heads(model: Any) -> list[LiveHead]:
    """Return the heads that the configuration of `model` allows, the likeliest first.

    Whether a declared factor multiplies or divides is not written in a configuration; the
    self-check of the adapters picks the head that reproduces the model's own logits.
    """
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    scales = [float(v) for name in _MULTIPLIERS if (v := getattr(config, name, None)) is not None]
    for name in _SCALINGS:
        if value := getattr(config, name, None):
            scales += [1.0 / float(value), float(value)]
    softcaps = [float(v) for name in _SOFTCAPS if (v := getattr(config, name, None)) is not None]
    return [
        LiveHead(model, logit_scale=scale, softcap=softcap)
        for scale, softcap in product([*scales, 1.0], [*softcaps, None])
    ]


def _projection(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the effective weight and bias of an output projection, adapters included."""
    if hasattr(module, "original_module"):  # PEFT modules_to_save
        module = _active_copy(module, name)
    if hasattr(module, "base_layer"):
        return _lora_projection(module, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"generator: expected a floating-point [V, H] weight at the head of {name}, got "
            f"{type(module).__name__}"
        )
    return weight, getattr(module, "bias", None)


def _active_copy(module: Any, name: str) -> Any:
    """Return the trained copy that PEFT's modules_to_save wrapper uses now."""
    if not hasattr(module, "modules_to_save"):
        raise ValueError(
            f"generator: expected a plain, LoRA or modules_to_save head on {name}, got "
            f"{type(module).__name__}"
        )
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _lora_projection(layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return W + sum of scaling * B A over the active adapters; refuse any variant of LoRA."""
    weight, bias = _projection(layer.base_layer, name)
    if not all(hasattr(layer, part) for part in ("lora_A", "lora_B", "scaling")):
        raise ValueError(
            f"generator: expected plain LoRA on the head of {name}, got an adapter layer of type "
            f"{type(layer).__module__}.{type(layer).__name__}"
        )
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        _refuse_variants(layer, adapter, name)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = weight + (layer.scaling[adapter] * (b @ a)).to(weight.dtype)
    return weight, bias


def _refuse_variants(layer: Any, adapter: str, name: str) -> None:
    """Raise for a LoRA variant on the head that is not W + scaling * B A."""
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        raise ValueError(
            f"generator: expected plain LoRA on the head of {name}, got {kind} (adapter "
            f"{adapter!r}); leave the head out of target_modules or use modules_to_save"
        )
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    if dropout:
        raise ValueError(
            f"generator: expected lora_dropout=0 for LoRA on the head of {name}, got {dropout} "
            f"(adapter {adapter!r}): the head is used as one weight, without its input"
        )
    if layer.lora_bias.get(adapter, False):
        raise ValueError(
            f"generator: expected lora_bias=False for LoRA on the head of {name} (adapter "
            f"{adapter!r})"
        )
