"""Refresh policies: the choice of passages to encode again after a training step.

Stored vectors become stale while the passage encoder trains. `frozen` never refreshes them, as in
Lewis et al. 2020, who train only the question encoder; `every:n` encodes all passages every n
steps.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.index.encoding import PassageEncoder
    from fastrag.nn.retriever import Retrieved, Retriever

Rows = Tensor | Literal["all"] | None


class RefreshPolicy(abc.ABC):
    """Choose the passages to encode again after a step; a subclass with `word` becomes a setting.

        class Half(RefreshPolicy, word="half"):
            usage = "half:n"                # takes an integer, as in `policy: half:3`

            def __init__(self, n): self.n = n

            def choose(self, step, retriever, retrieved, encoder): ...

    Attributes:
        word: name of the policy in a config.
        usage: form of the setting, `word` or `word:n`. A policy with another kind of argument
            overrides `from_argument` and `__str__`.
        changes_index: whether the policy ever chooses a passage. If not, a checkpoint contains the
            checksum of the index instead of a copy.

    Example:
        >>> policy = RefreshPolicy.parse("every:20")
        >>> policy, policy.n
        (RefreshPolicy.parse('every:20'), 20)
    """

    word: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    changes_index: ClassVar[bool] = True
    n: int
    _known: ClassVar[dict[str, type[RefreshPolicy]]] = {}

    def __init_subclass__(cls, *, word: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if word is not None:
            cls.word = word
            cls.usage = cls.__dict__.get("usage", word)
            RefreshPolicy._known[word] = cls

    @staticmethod
    def parse(text: str | RefreshPolicy) -> RefreshPolicy:
        """Return the policy of a setting.

        Args:
            text: for example `"frozen"` or `"every:20"`; a policy is returned as it is.

        Raises:
            ValueError: an unknown name or a bad argument; the message lists the known settings.
        """
        if isinstance(text, RefreshPolicy):
            return text
        word, colon, argument = str(text).strip().partition(":")
        kind = RefreshPolicy._known.get(word)
        made = kind.from_argument(argument if colon else None) if kind else None
        if made is None:
            known = ", ".join(repr(each.usage) for each in RefreshPolicy._known.values())
            raise ValueError(f"refresh: expected one of {known}, got {shown(text)}")
        return made

    @classmethod
    def from_argument(cls, argument: str | None) -> RefreshPolicy | None:
        """Make the policy from the text after the colon; return None for an invalid text."""
        if ":" not in cls.usage:
            return cls() if argument is None else None
        make: Any = cls
        fits = argument is not None and re.fullmatch(r"[1-9][0-9]*", argument)
        return make(int(argument or 0)) if fits else None

    @abc.abstractmethod
    def choose(
        self,
        step: int,
        retriever: Retriever,
        retrieved: Retrieved | None,
        encoder: PassageEncoder | None,
    ) -> Rows:
        """Choose the passages to encode again after a step.

        Args:
            step: number of optimiser steps done.
            retriever: the retriever whose index is refreshed, with `index` and `passages`.
            retrieved: question vectors and hits of this step, if the training loop passes them. The
                hits contain the stored vectors that the step used.
            encoder: the passage encoder with its current weights.

        Returns:
            Rows `[n]` int64 without repetition, "all", or None.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: numbers, text and tensors."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the state belongs to another policy.
        """
        if state_dict:
            raise ValueError(f"state_dict: expected no state of {self}, got {shown(state_dict)}")

    def __str__(self) -> str:
        return f"{self.word}:{self.n}" if ":" in self.usage else self.word

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefreshPolicy) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"RefreshPolicy.parse({str(self)!r})"


class Frozen(RefreshPolicy, word="frozen"):
    """Never encode passages again, for a passage encoder that does not train."""

    changes_index = False

    def choose(self, step: int, *_: Any) -> Rows:
        """Choose nothing."""
        return None


class Every(RefreshPolicy, word="every"):
    """Encode all passages every n steps; training waits for it.

    Args:
        n: number of steps, at least 1.
    """

    usage = "every:n"

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"n: expected at least 1 step, got {n}")
        self.n = n

    def choose(self, step: int, *_: Any) -> Rows:
        """Choose all passages at every n-th step, but not at step 0."""
        return "all" if step > 0 and step % self.n == 0 else None
