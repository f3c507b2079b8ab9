"""A linear map from stored vectors to fresh ones, fitted while training goes on.

    d_fresh = A d_stored + b,   q . d_fresh = (A^T q) . d_stored + q . b

`q . b` is the same for all passages of a question, so a search with A^T q among the stored vectors
ranks them as if they had all been mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.index.base import Index

# Pairs, counted by their weights, from which the first map is fitted.
MIN_PAIRS = 8.0
# A map that stretches some direction this much more than another loses float32 digits when vectors
# are mapped back.
MAX_CONDITION = 1e3
# Larger values leave much of a common drift in place, smaller ones follow the noise of few pairs.
RIDGE = 0.25
# Spread of the pairs in time, in half-lives, at which half of the trend is believed.
FLAT_SHARE = 0.25
_BLOCK_ROWS = 8192


class VectorMap:
    """The map d -> A d + b and its inverse.

    Args:
        matrix: A, `[D, D]`.
        offset: b, `[D]`.

    Raises:
        ValueError: A cannot be inverted in float32, or the shapes disagree.

    Example:
        >>> turned = VectorMap(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.zeros(2))
        >>> turned.passages(torch.tensor([[1.0, 0.0]]))
        tensor([[0., 1.]])
    """

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: expected [D, D], got {list(matrix.shape)}")
        if offset.shape != matrix.shape[:1]:
            raise ValueError(f"offset: expected [{len(matrix)}], got {list(offset.shape)}")
        # Rounded first: a map that was saved and loaded has the same inverse.
        self.matrix = matrix.detach().to("cpu", torch.float32)
        wide = self.matrix.double()
        inverse, failed = torch.linalg.inv_ex(wide)
        # the condition number in the Frobenius norm is at least D
        condition = float(wide.norm() * inverse.norm()) / len(wide)
        if int(failed) or not condition < MAX_CONDITION:
            raise ValueError(f"matrix: expected an invertible map, got condition {condition:.3g}")
        self.offset = offset.detach().to("cpu", torch.float32)
        inverse = inverse.float()
        self._copies = {self.matrix.device: (self.matrix, self.offset, inverse)}

    def questions(self, query_emb: Tensor) -> tuple[Tensor, Tensor]:
        """Return A^T q `[B, D]`, with which to search, and q . b `[B]`, to add to the scores."""
        matrix, offset, _ = self._on(query_emb.device)
        query = query_emb.float()
        return query @ matrix, query @ offset

    def passages(self, stored: Tensor) -> Tensor:
        """Return A d + b of stored vectors `[..., D]`."""
        matrix, offset, _ = self._on(stored.device)
        return stored @ matrix.T + offset

    def stored(self, vectors: Tensor) -> Tensor:
        """Return A^-1 (d - b), the form in which a vector `[..., D]` of the present is stored."""
        _, offset, inverse = self._on(vectors.device)
        return (vectors - offset) @ inverse.T

    def state_dict(self) -> dict[str, Tensor]:
        """Return A and b."""
        return {"matrix": self.matrix.clone(), "offset": self.offset.clone()}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._copies:
            matrix, offset, inverse = self._copies[self.matrix.device]
            self._copies[device] = (matrix.to(device), offset.to(device), inverse.to(device))
        return self._copies[device]


class FoldedVectors:
    """The mapped vectors of an index, block by block; may be read several times.

    Args:
        index: the index.
        vector_map: the map.
    """

    def __init__(self, index: Index, vector_map: VectorMap) -> None:
        self.index = index
        self.vector_map = vector_map

    def __iter__(self) -> Iterator[Tensor]:
        for rows in torch.arange(len(self.index)).split(_BLOCK_ROWS):
            yield self.vector_map.passages(self.index.vectors(rows))


class MapFit:
    """Running least squares for A and b, from pairs of a stored and a fresh vector.

    A drifts on, so a mean over recent pairs lags behind. Every moment is therefore extrapolated to
    the present along its weighted regression line in time tau <= 0, as in local linear regression:
    with weights w = 2^(tau / half_life) and sums w_j = sum w tau^j,

        m = sum w (w_2 - w_1 tau) f / (w_0 w_2 - w_1^2)    for f = x, y, x x^T, y x^T

    where x = d_stored and y = d_fresh. With the covariances C of these moments, the present A, and
    a ridge that pulls A to the identity where pairs are few,

        lambda     = tr(Cxx) / (4 w_0)
        affine     A <- A + (Cyx - A Cxx + lambda (I - A)) (mean Cxx + lambda I)^-1
        orthogonal A <- U V^T,  U S V^T = Cyx + lambda I         (Schönemann 1966)
        b          = m(y) - A m(x)

    Args:
        dim: D.
        kind: `"affine"` or `"orthogonal"`.
        half_life: number of steps after which a pair counts half.

    Example:
        >>> fit = MapFit(2, half_life=8)
        >>> x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
        >>> fit.add(x, x + 1.0)
        >>> [round(each, 3) for each in fit.solve().offset.tolist()]
        [1.0, 1.0]
    """

    def __init__(
        self, dim: int, kind: Literal["affine", "orthogonal"] = "affine", half_life: int = 32
    ) -> None:
        if half_life < 1:
            raise ValueError(f"half_life: expected at least 1 step, got {half_life}")
        self.dim = dim
        self.kind = kind
        self.half_life = half_life
        self._weights = [0.0, 0.0, 0.0]  # w_0, w_1, w_2
        # Sums of w f and w tau f.
        self._x = torch.zeros(2, dim, dtype=torch.float64)
        self._y = self._x.clone()
        self._xx = torch.zeros(2, dim, dim, dtype=torch.float64)
        self._yx = self._xx.clone()

    @property
    def settings(self) -> tuple[str, int]:
        """Kind and half-life."""
        return self.kind, self.half_life

    @property
    def _sums(self) -> dict[str, Tensor]:
        return {"x": self._x, "y": self._y, "xx": self._xx, "yx": self._yx}

    def forget(self) -> None:
        """Make all pairs a step older."""
        kept = 0.5 ** (1.0 / self.half_life)
        w0, w1, w2 = self._weights
        self._weights = [kept * w0, kept * (w1 - w0), kept * (w2 - 2.0 * w1 + w0)]
        for each in self._sums.values():
            each[1] -= each[0]
            each *= kept

    def add(self, stored: Tensor, fresh: Tensor) -> None:
        """Add pairs of the present step, both `[n, D]`."""
        x, y = (each.to("cpu", torch.float64) for each in (stored, fresh))
        self._weights[0] += len(x)
        self._x[0] += x.sum(0)
        self._y[0] += y.sum(0)
        self._xx[0] += x.T @ x
        self._yx[0] += y.T @ x

    def solve(self, present: VectorMap | None = None) -> VectorMap | None:
        """Return the map, or None while there are too few pairs.

        Args:
            present: the map in use; None: the identity.

        Raises:
            ValueError: the pairs do not determine an invertible map.
        """
        w0, w1, w2 = self._weights
        if w0 < MIN_PAIRS:
            return None
        # Without a spread of pairs in time there is no line: the second term keeps it flat.
        w2 = w2 + w0 * (FLAT_SHARE * self.half_life) ** 2
        scale = w0 * w2 - w1 * w1
        x, y, xx, yx = ((w2 * f[0] - w1 * f[1]) / scale for f in self._sums.values())
        cxx, cyx = xx - torch.outer(x, x), yx - torch.outer(y, x)
        mean = self._x[0] / w0
        spread = self._xx[0] / w0 - torch.outer(mean, mean)
        variance = float(spread.trace())
        if not variance > 1e-12 * float(self._xx[0].trace() / w0):
            raise ValueError("map: expected stored vectors that differ, got equal ones")
        eye = torch.eye(self.dim, dtype=torch.float64)
        pull = RIDGE * variance / w0
        if self.kind == "orthogonal":
            u, _, vh = torch.linalg.svd(cyx + pull * eye)
            matrix = u @ vh
        else:
            factor, failed = torch.linalg.cholesky_ex(spread + pull * eye)
            if int(failed):
                raise ValueError("map: expected a positive definite covariance, got another")
            start = eye if present is None else present.matrix.double()
            error = cyx - start @ cxx + pull * (eye - start)
            matrix = start + torch.cholesky_solve(error.T, factor).T
        return VectorMap(matrix, y - matrix @ x)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the sums over the pairs."""
        return {
            "settings": [self.kind, self.half_life],
            "weights": list(self._weights),
            **{name: each.clone() for name, each in self._sums.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: something is missing or of another shape or dtype; nothing is loaded.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            raise ValueError(f"map: expected {', '.join(expected)}, got {shown(state_dict)}")
        for name, ours in expected.items():
            got = state_dict[name]
            if isinstance(ours, Tensor):
                fits = isinstance(got, Tensor) and (got.shape, got.dtype) == (
                    ours.shape,
                    ours.dtype,
                )
            else:
                fits = isinstance(got, list) and [*map(type, got)] == [*map(type, ours)]
            if not fits or (name == "settings" and got != ours):
                raise ValueError(f"map: {name}: expected {shown(ours)}, got {shown(got)}")
        self._weights = list(state_dict["weights"])
        self._x, self._y, self._xx, self._yx = (state_dict[name].clone() for name in self._sums)
