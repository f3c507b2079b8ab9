"""IndexRefresher: update the vectors of an index as the passage encoder trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastrag.freshness.policies import RefreshPolicy
from fastrag.messages import shown
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index.encoding import PassageEncoder
    from fastrag.nn import RagModel
    from fastrag.nn.retriever import Retrieved, Retriever


@dataclass(frozen=True)
class Refresh:
    """Report of a refresh.

    Attributes:
        step: number of optimiser steps before the refresh.
        n_passages: number of passages that were encoded.
        version: version of the index after the refresh.
    """

    step: int
    n_passages: int
    version: int


class IndexRefresher:
    """Encode the passages that a policy chooses, and write their vectors into the index.

    Call `step` after each optimiser step; `RefreshCallback(refresher)` does so under
    `transformers.Trainer`. The index changes to the new vectors at once. A training step that has
    already searched keeps the vectors of the version that it searched. If encoding fails, index and
    policy are unchanged.

    Args:
        retriever: a `Retriever`, or the `RagModel` that has one.
        policy: a setting such as `"every:20"`, or a `RefreshPolicy`.
        batch_size: passages per forward pass of the encoder.

    Raises:
        ValueError: an unknown policy, or numbers out of range.

    Example:
        >>> refresher = IndexRefresher(model, "every:20")       # doctest: +SKIP
        >>> for step, batch in enumerate(batches, start=1):     # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     refresher.step(step)
    """

    def __init__(
        self,
        retriever: Retriever | RagModel,
        policy: RefreshPolicy | str = "frozen",
        batch_size: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        owner: Any = retriever
        self.retriever: Retriever = getattr(owner, "retriever", owner)
        self.policy = RefreshPolicy.parse(policy)
        self.batch_size = batch_size
        self.refreshed_at = 0

    @property
    def changing(self) -> bool:
        """Whether the policy ever changes the index."""
        return self.policy.changes_index

    def step(
        self,
        step: int,
        retrieved: Retrieved | None = None,
        encoder: PassageEncoder | None = None,
    ) -> Refresh | None:
        """Encode the passages that the policy chooses after this step.

        Args:
            step: number of optimiser steps done.
            retrieved: result of the retriever in this step, for policies that use it.
            encoder: encodes the passages; None: the retriever's passage encoder.

        Returns:
            The report of the refresh, or None if the policy chose no passages.

        Raises:
            ValueError: there is no passage encoder, its vectors do not fit the index, or the policy
                needs `retrieved`. Index and policy are unchanged.
        """
        before = self.policy.state_dict()
        encoder = self.retriever.passage_encoder if encoder is None else encoder
        try:
            rows = self.policy.choose(step, self.retriever, retrieved, encoder)
            if rows is None:
                return None
            return self.refresh(step, None if isinstance(rows, str) else rows, encoder)
        except BaseException:
            self.policy.load_state_dict(before)
            raise

    def refresh(
        self, step: int, rows: Tensor | None = None, encoder: PassageEncoder | None = None
    ) -> Refresh:
        """Encode passages now, without asking the policy.

        Args:
            step: number of optimiser steps done, stored in `refreshed_at`.
            rows: rows to encode, `[n]` without repetition; None: all.
            encoder: as for `step`.

        Returns:
            The report of the refresh.

        Raises:
            ValueError: as `step`.
        """
        with stage("refresh"):
            self.retriever.refresh_index(self.batch_size, rows=rows, encoder=encoder)
        self.refreshed_at = step
        index = self.retriever.index
        return Refresh(step, len(index) if rows is None else len(rows), index.version)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last refresh and the state of the policy."""
        return {
            "policy": str(self.policy),
            "refreshed_at": self.refreshed_at,
            "state": self.policy.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`; the index itself is not part of it.

        Raises:
            ValueError: the state belongs to another policy, or a value is not as expected. Nothing
                is loaded.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            raise ValueError(f"state_dict: expected {', '.join(expected)}, got {shown(state_dict)}")
        if state_dict["policy"] != expected["policy"]:
            raise ValueError(
                f"state_dict: expected the state of {shown(expected['policy'])}, got that of "
                f"{shown(state_dict['policy'])}"
            )
        refreshed_at, state = state_dict["refreshed_at"], state_dict["state"]
        if type(refreshed_at) is not int or refreshed_at < 0:
            raise ValueError(
                f"state_dict: refreshed_at: expected a number of steps, got {shown(refreshed_at)}"
            )
        if not isinstance(state, Mapping):
            raise ValueError(f"state_dict: state: expected a mapping, got {shown(state)}")
        self.policy.load_state_dict(state)
        self.refreshed_at = refreshed_at
