"""SweepLane: all passages by the same weights, a few in each step.

    step s            copy the weights
    s + 1 .. s + P    encode N / P passages with the copy, search the old vectors
    s + P             write all vectors at once, and copy the weights again

No vector of the index is then of other weights than its neighbours, and no step encodes everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrag.freshness.lanes import Encoded, Lane, copy_weights, eval_copy
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.index.passages import PassageStore


class SweepLane:
    """Encode all passages, some in each call of `collect`.

    Memory: N D numbers and the weights of the encoder.

    Args:
        passages: the passages.
        dim: width that the vectors must have.
        n: passages in each step.
        inner: encodes those of a step.
    """

    def __init__(self, passages: PassageStore, dim: int, n: int, inner: Lane) -> None:
        self.passages = passages
        self.n = n
        self.inner = inner
        self._dim = dim
        self._twin: nn.Module | None = None
        self._step = 0
        self._next = 0  # first row that has not been sent to the inner lane
        self._n_made = 0
        self._vectors: Tensor | None = None

    @property
    def busy(self) -> bool:
        """Whether a sweep is under way."""
        return self._vectors is not None

    def submit(self, encoder: Any, rows: Tensor | None, step: int) -> None:
        """Begin a sweep with the present weights.

        Raises:
            ValueError: the encoder is no module, whose weights could be copied.
        """
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"encoder: expected a module, got {type(encoder).__name__}")
        if self._twin is None:
            self._twin = eval_copy(encoder)
        else:
            copy_weights(encoder, self._twin)
        self._step, self._next, self._n_made = step, 0, 0
        self._vectors = torch.empty(len(self.passages), self._dim)

    def collect(self, *, wait: bool = False) -> Encoded | None:
        """Encode the passages of a step, and return all vectors after the last."""
        if self._vectors is None:
            return None
        self._take()
        if self._next < len(self._vectors):
            rows = torch.arange(self._next, min(self._next + self.n, len(self._vectors)))
            self.inner.submit(self._twin, rows, self._step)
            self._next += len(rows)
        if not self.inner.busy:
            self._take()
        if self._n_made < len(self._vectors):
            return None
        vectors, self._vectors = self._vectors, None
        return Encoded(None, vectors, self._step)

    def close(self) -> None:
        """Give up the sweep."""
        self.inner.close()
        self._vectors = None

    def _take(self) -> None:
        made = self.inner.collect(wait=False)
        if made is not None and made.rows is not None and self._vectors is not None:
            self._vectors[made.rows] = made.vectors
            self._n_made += len(made.vectors)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the vectors made so far and the weights that make them; None between sweeps."""
        if self._vectors is None or self._twin is None:
            return None
        weights = {name: each.cpu().clone() for name, each in self._twin.state_dict().items()}
        made = self._vectors[: self._n_made].clone()
        return {"step": self._step, "vectors": made, "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any] | None, encoder: Any) -> None:
        """Go on with the sweep of `state_dict`; the encoder has the modules of its weights.

        Raises:
            ValueError: something is missing, or belongs to another encoder or corpus.
        """
        if state_dict is None:
            return
        try:
            step, made, weights = (state_dict[name] for name in ("step", "vectors", "weights"))
            twin = eval_copy(encoder)
            twin.load_state_dict(weights)
            vectors = torch.empty(len(self.passages), self._dim)
            vectors[: len(made)] = made
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"sweep: expected the state of a sweep: {error}") from error
        if type(step) is not int or len(made) >= len(vectors):
            raise ValueError(f"sweep: expected the state of a sweep, got {shown(state_dict)}")
        self._twin, self._step, self._vectors = twin, step, vectors
        self._next = self._n_made = len(made)
