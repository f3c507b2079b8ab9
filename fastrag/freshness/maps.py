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
# Half-life of a pair in further pairs, for each dimension. Drift is linear in time for few steps
# only: on encoders that train, 10 leave twice to four times the drift that 1 leaves.
PAIRS_PER_DIM = 1.0
MIN_HALF_LIFE = 4  # steps: a trend needs several
# Larger values leave much of a common drift in place, smaller ones follow the noise of few pairs.
RIDGE = 0.25
# Part of the trend that is not believed, for steadiness.
FLAT_SHARE = 0.02
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

    A drifts on, so a fit that held for recent pairs on average would lag behind. The map is
    therefore fitted together with its trend V in time tau <= 0, as in local linear regression, and
    taken at tau = 0. With x = d_stored, y = d_fresh and weights w that fall with the age of a pair,

        min  sum w |y - (A + tau V) [x; 1]|^2 + lambda |A - I|^2 + lambda' |V|^2

    where A contains b as its last column, which has no ridge. `"orthogonal"` replaces A by the
    orthogonal matrix next to it, U V^T for A = U S V^T (Schönemann 1966).

    Memory: 5 D^2 numbers. Time of a fit: that of a linear system of size 2 D.

    Args:
        dim: D.
        kind: `"affine"` or `"orthogonal"`.
        half_life: number of steps after which a pair counts half; None: as many as bring D pairs,
            but at least four.

    Example:
        >>> fit = MapFit(2, half_life=8)
        >>> x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
        >>> fit.add(x, x + 1.0)
        >>> [round(each, 3) for each in fit.solve().offset.tolist()]
        [1.0, 1.0]
    """

    def __init__(
        self,
        dim: int,
        kind: Literal["affine", "orthogonal"] = "affine",
        half_life: int | None = None,
    ) -> None:
        if half_life is not None and half_life < 1:
            raise ValueError(f"half_life: expected at least 1 step or None, got {half_life}")
        self.dim = dim
        self.kind = kind
        self.half_life = half_life
        self._n_new = 0  # pairs of the present step
        # sums of w tau^j [x; 1] [x; 1]^T, j = 0, 1, 2, and of w tau^j (y - x) [x; 1]^T, j = 0, 1
        self._xx = torch.zeros(3, dim + 1, dim + 1, dtype=torch.float64)
        self._rx = torch.zeros(2, dim, dim + 1, dtype=torch.float64)

    @property
    def settings(self) -> tuple[str, int | None]:
        """Kind and half-life."""
        return self.kind, self.half_life

    @property
    def n_pairs(self) -> float:
        """Number of pairs, each counted by its weight."""
        return float(self._xx[0, -1, -1])

    @property
    def mean_age(self) -> float:
        """Weighted mean of the age of the pairs, in steps."""
        return float(-self._xx[1, -1, -1] / self._xx[0, -1, -1]) if self.n_pairs else 0.0

    def forget(self) -> None:
        """Make all pairs a step older."""
        if self.half_life is None:
            kept = 0.5 ** min(1.0 / MIN_HALF_LIFE, self._n_new / (PAIRS_PER_DIM * self.dim))
        else:
            kept = 0.5 ** (1.0 / self.half_life)
        self._n_new = 0
        self._xx[2] += self._xx[0] - 2.0 * self._xx[1]
        self._xx[1] -= self._xx[0]
        self._rx[1] -= self._rx[0]
        self._xx *= kept
        self._rx *= kept

    def add(self, stored: Tensor, fresh: Tensor) -> None:
        """Add pairs of the present step, both `[n, D]`."""
        x, y = (each.to("cpu", torch.float64) for each in (stored, fresh))
        wide = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self._n_new += len(x)
        self._xx[0] += wide.T @ wide
        self._rx[0] += (y - x).T @ wide

    def solve(self) -> VectorMap | None:
        """Return the map, or None while there are too few pairs.

        Raises:
            ValueError: the pairs do not determine an invertible map.
        """
        n, dim = self.n_pairs, self.dim
        if n < MIN_PAIRS:
            return None
        square, mean = float(self._xx[0].diagonal()[:-1].sum()) / n, self._xx[0, -1, :-1] / n
        variance = square - float(mean @ mean)
        if not variance > 1e-12 * square:
            raise ValueError("map: expected stored vectors that differ, got equal ones")
        spread = float(self._xx[2, -1, -1]) / n + 1.0  # of tau, which may be 0 for all pairs
        ridge = torch.full((2, dim + 1), RIDGE * variance, dtype=torch.float64)
        ridge[1] = (RIDGE + FLAT_SHARE * n / dim) * variance * spread
        ridge[0, -1] = 0.0
        (s0, s1, s2), (r0, r1) = self._xx, self._rx
        system = torch.cat([torch.cat([s0, s1], dim=1), torch.cat([s1, s2], dim=1)])
        factor, failed = torch.linalg.cholesky_ex(system + ridge.flatten().diag())
        if int(failed):
            raise ValueError("map: expected pairs that determine a map, got too similar ones")
        found = torch.cholesky_solve(torch.cat([r0, r1], dim=1).T, factor).T[:, : dim + 1]
        matrix, offset = found[:, :-1] + torch.eye(dim, dtype=torch.float64), found[:, -1]
        if self.kind == "orthogonal":
            center = matrix @ mean + offset
            u, _, vh = torch.linalg.svd(matrix)
            matrix = u @ vh
            offset = center - matrix @ mean
        return VectorMap(matrix, offset)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the sums over the pairs."""
        sums = {"xx": self._xx.clone(), "rx": self._rx.clone()}
        return {"settings": [self.kind, self.half_life], "n_new": self._n_new, **sums}

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
            fits = type(got) is type(ours) and (name != "settings" or got == ours)
            if isinstance(ours, Tensor):
                fits = fits and (got.shape, got.dtype) == (ours.shape, ours.dtype)
            if not fits:
                raise ValueError(f"map: {name}: expected {shown(ours)}, got {shown(got)}")
        self._n_new = state_dict["n_new"]
        self._xx, self._rx = state_dict["xx"].clone(), state_dict["rx"].clone()
