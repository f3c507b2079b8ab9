"""Pass transformers' switches for recomputed activations on to the models inside a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ActivationCheckpointing:
    """Give a module the four methods that Trainer calls on the models of transformers.

    A subclass defines `_checkpointed_parts`.
    """

    def _checkpointed_parts(self) -> list[Any]:
        """Return the transformers models whose activations may be recomputed."""
        raise NotImplementedError

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Recompute activations of encoders and generator in the backward pass (not of the loss).

        Args:
            activation_checkpointing_kwargs: for `torch.utils.checkpoint`, as in transformers.
            options: passed on to each part, as transformers names them.
        """
        for part in self._checkpointed_parts():
            if hasattr(part, "activation_checkpointing_enable"):
                part.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
            else:  # transformers before 5.20 only has the older name
                part.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Undo `activation_checkpointing_enable`."""
        for part in self._checkpointed_parts():
            if hasattr(part, "activation_checkpointing_disable"):
                part.activation_checkpointing_disable()
            else:
                part.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Call `activation_checkpointing_enable`, named so from transformers 5.20 on."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Call `activation_checkpointing_disable`, named so from transformers 5.20 on."""
        self.activation_checkpointing_disable()
