"""`Index`, the interface that every kind of index implements, and `Hits`, the result of a search.

A kind of index is a subclass of `Index` and decides how its vectors are stored, searched and
scored. Code outside this folder never sees a matrix of vectors. Rows are numbered in the order in
which they are added, and a row keeps its number. A missing hit has row -1 and score -inf.
"""

from __future__ import annotations

import abc
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fastrag import folders, functional
from fastrag.index.inputs import Vectors
from fastrag.index.storage import read_manifest
from fastrag.messages import shown


@dataclass(frozen=True, eq=False)
class Hits:
    """The rows that a search found; unpacks as `scores, rows = hits`.

    Attributes:
        scores: `[B, k]` fp32 inner products, best first; -inf where a hit is missing.
        rows: `[B, k]` int64; -1 where a hit is missing.
        vectors: `[B, k, D]` fp32, read from the same version of the index as the scores; zero where
            a hit is missing. None unless the search was asked for them.
        version: the version of the index that was searched.
    """

    scores: Tensor
    rows: Tensor
    vectors: Tensor | None
    version: int

    def columns(self, chosen: Tensor) -> Hits:
        """Return the hits at the columns `chosen` `[B, m]` of each question."""
        taken = self.vectors
        if taken is not None:
            taken = taken.gather(1, chosen[..., None].expand(-1, -1, taken.shape[-1]))
        scores, rows = self.scores.gather(1, chosen), self.rows.gather(1, chosen)
        return Hits(scores, rows, taken, self.version)

    def __iter__(self) -> Iterator[Tensor]:
        yield self.scores
        yield self.rows


class Index(abc.ABC):
    """Vectors of passages by row, searched by inner product.

    A kind has to define `search`, `vectors`, `device` and `__len__`. An index that can change also
    defines `add`, `update`, `replace` and `remove`, and increments `version` with each change. An
    index that can be saved also defines `save`, `load` and `checksum`, and passes the format of its
    manifest, from which `Index.load` finds the class of a saved folder:

        class MyIndex(Index, format="mine.MyIndex"): ...

    Attributes:
        dim: width D of a vector.
        passages_checksum: checksum of the PassageStore that has the same rows, or None. It is saved
            with the index, so that a store from another build is detected.
    """

    dim: int
    passages_checksum: str | None = None
    _kinds: ClassVar[dict[str, type[Index]]] = {}

    def __init_subclass__(cls, *, format: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if format is not None:
            Index._kinds[format] = cls

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of rows, including removed ones."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Device of the vectors; if they are not in torch tensors, the device of their search."""

    @property
    def version(self) -> int:
        """Number of changes of the rows so far."""
        return 0

    @property
    def removed(self) -> Tensor:
        """Mask of the removed rows, `[N]` bool; read-only."""
        return torch.zeros(len(self), dtype=torch.bool, device=self.device)

    @property
    def n_live(self) -> int:
        """Number of rows that a search can return."""
        return len(self)

    @property
    def settings(self) -> dict[str, Any]:
        """Properties that only this kind has, by name, for `fastrag index info`."""
        return {}

    @property
    def source(self) -> Path | None:
        """Folder that holds exactly this content, or None if there is none."""
        return None

    @abc.abstractmethod
    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None, *, vectors: bool = False
    ) -> Hits:
        """Find the k rows with the largest inner product, without gradients.

        Args:
            query_emb: `[B, D]`, floating point.
            k: number of rows, at least 1. If fewer are live, the remaining hits are missing.
            exclude: rows that must not be returned: `[B, E]` int64, E rows for each query (-1 for
                no row), or `[N]` bool for all queries.
            vectors: also return the vectors of the hits, from the version that was searched.

        Returns:
            `Hits` on the query's device. All hits of an empty index are missing.

        Raises:
            ValueError: shapes or dtypes disagree, `k` below 1, or a NaN or infinity.
        """

    @abc.abstractmethod
    def vectors(self, rows: Tensor) -> Tensor:
        """Return the stored vectors of rows.

        Args:
            rows: `[...]` int64, any shape; -1 is missing.

        Returns:
            `[..., D]` fp32 on the rows' device; missing rows are zero.

        Raises:
            ValueError: `rows` is not an integer tensor, or (on the CPU) a row outside the index.
        """

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the vectors of rows, as `vectors` does, and the version that they were read in.

        A kind that other threads may change reads both under one lock.
        """
        return self.vectors(rows), self.version

    def score(self, query_emb: Tensor, rows: Tensor, tau: float | Tensor = 1.0) -> Tensor:
        """Score the rows of each question, differentiable in the question.

            s[b,k] = q_b . d_bk / tau

        The call copies the vectors, so a later change of the index affects neither the scores nor
        their gradient.

        Args:
            query_emb: `[B, D]`, differentiable.
            rows: `[B, K]` int64; -1 is a missing row and scores -inf.
            tau: temperature; if it is a tensor, it may receive a gradient.

        Returns:
            `[B, K]` fp32 (fp64 for fp64 queries).

        Raises:
            ValueError: as `vectors` and `fastrag.functional.doc_scores`.
        """
        taken = self.vectors(rows).to(query_emb.device)
        return functional.doc_scores(query_emb, taken, rows=rows, tau=tau)

    def add(self, vectors: Vectors | Iterable[Vectors]) -> range:
        """Append rows and return their numbers."""
        raise self._cannot("add")

    def update(self, rows: Tensor, vectors: Vectors) -> None:
        """Overwrite rows in place."""
        raise self._cannot("update")

    def replace(self, vectors: Vectors | Iterable[Vectors]) -> None:
        """Replace all vectors at once; the number of rows must not change."""
        raise self._cannot("replace")

    def remove(self, rows: Tensor) -> None:
        """Exclude rows from every later search; their numbers are not reused."""
        raise self._cannot("remove")

    def to(self, device: torch.device | str) -> Self:
        """Move the index and return it."""
        if torch.device(device) != self.device:
            raise ValueError(
                f"device: expected '{self.device}', where this {type(self).__name__} stays, got "
                f"'{device}'"
            )
        return self

    def checksum(self) -> str:
        """Return a digest of the content, the same on every device."""
        raise self._cannot("checksum")

    def save(self, dir: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an interrupted save leaves the previous folder in place."""
        raise self._cannot("save")

    def save_copy(self, dir: str | os.PathLike[str]) -> None:
        """Write the index as `save` does into a folder that may be deleted: `source` stays."""
        copy.copy(self).save(dir)

    @classmethod
    def load(
        cls,
        dir: str | os.PathLike[str],
        mmap: bool = True,
        verify: bool = False,
        device: torch.device | str = "cpu",
    ) -> Index:
        """Open a saved index of any registered kind.

        Args:
            dir: the folder.
            mmap: map the vectors instead of reading them, if the kind allows it.
            verify: check every byte against the manifest's checksums.
            device: where the index is searched.

        Returns:
            An index of the kind that wrote the folder.

        Raises:
            ValueError: the folder holds no index of a registered kind, or as `load` of the kind.
        """
        path = Path(dir)

        def read() -> Index:
            found = read_manifest(path, "fastrag index").get("format")
            kind = Index._kinds.get(found) if isinstance(found, str) else None
            load: Any = None if kind is None else kind.load
            if load is None or load.__func__ is Index.load.__func__:  # type: ignore[attr-defined]
                known = ", ".join(Index.formats())
                raise ValueError(f"{path}: expected an index ({known}), got {shown(found)}")
            return load(path, mmap, verify, device)

        return folders.read_whole(path, read)

    @staticmethod
    def formats() -> tuple[str, ...]:
        """Return the manifest formats of all registered kinds."""
        return tuple(Index._kinds)

    def _cannot(self, method: str) -> ValueError:
        return ValueError(f"index: expected one with `{method}`, got a {type(self).__name__}")
