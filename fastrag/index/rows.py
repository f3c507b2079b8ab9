"""`RowIndex`: an index that keeps its rows in this process, with tombstones, version and lock."""

from __future__ import annotations

import abc
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrag.index import inputs
from fastrag.index.base import Hits, Index
from fastrag.index.lock import ReadWriteLock
from fastrag.ops import checks
from fastrag.profiling import stage

INCONSISTENT = (
    "the index was being changed when {}, so its rows are not whole: load or build it again"
)


class RowIndex(Index):
    """Rows with tombstones, read by many threads at once and changed by one writer at a time.

    A subclass defines how N > 0 rows are searched (`_topk`) and read (`_vectors_of`), and the
    methods that change them.

    A forked child process can use the index as well. If another thread was changing the index at
    the time of the fork, all methods that need the rows raise a RuntimeError in the child.

    Args:
        dim: D, the width of a vector.
        device: device of the tombstones.

    Raises:
        ValueError: `dim` below 1, or a device that torch cannot use.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = inputs.check_dim(dim)
        self._n = 0
        device = inputs.usable_device(device)
        self._removed = torch.zeros(0, dtype=torch.bool, device=device)  # [N]
        self._n_removed = 0
        self._version = 0
        self._source: Path | None = None
        self._checksum: str | None = None
        self._lock = ReadWriteLock(inconsistent=INCONSISTENT.format("this process was forked"))
        # A writer prepares its rows before it takes `_lock`; this lock allows one writer at a time.
        self._writer = ReadWriteLock()

    def __len__(self) -> int:
        return self._n

    @property
    def search_device(self) -> torch.device:
        """Device on which the index is searched."""
        return self.device

    @property
    def n_live(self) -> int:
        """Number of rows that a search can return."""
        return self._n - self._n_removed

    @property
    def removed(self) -> Tensor:
        """Mask of the removed rows, `[N]` bool; read-only."""
        return self._removed

    @property
    def version(self) -> int:
        """Number of changes of the rows so far; saved and loaded."""
        return self._version

    @property
    def source(self) -> Path | None:
        """Folder that holds exactly this content, or None if there is none."""
        return self._source

    def remove(self, rows: Tensor | np.ndarray[Any, Any]) -> None:
        """Exclude rows from every later search; their numbers are not reused.

        Args:
            rows: `[n]` integers without repetition. A row may have been removed before.

        Raises:
            ValueError: unknown or repeated rows.
        """
        with self._writer.write():
            rows = inputs.checked_rows(rows, self._n, self._removed.device)
            if len(rows) == 0:
                return
            removed = self._removed.clone()
            removed[rows] = True
            with self._lock.write():
                self._changed()
                self._set_removed(removed)

    @torch.no_grad()
    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None, *, vectors: bool = False
    ) -> Hits:
        """Find the k rows with the largest inner product; see `Index.search`."""
        k = inputs.check_query(query_emb, self.dim, k)
        with stage("index/search"), self._lock.read():
            query = query_emb.to(self.search_device, torch.float32)
            mask = self._removed if self._n_removed else None
            if exclude is not None:
                exclude = inputs.checked_exclude(exclude, len(query), self._n, self._removed.device)
            if self._n == 0:
                scores, rows = inputs.missing(len(query), k, self.device)
            elif exclude is None or mask is None:
                scores, rows = self._topk(query, k, mask if exclude is None else exclude)
            elif exclude.dtype == torch.bool:
                scores, rows = self._topk(query, k, mask | exclude)
            else:
                # At most E of the best k + E live rows are excluded, so the best k are among them.
                wide = self._topk(query, k + exclude.shape[1], mask)
                scores, rows = inputs.drop_excluded(*wide, exclude.to(wide[1].device), k)
            taken = self._vectors_at(rows) if vectors else None
            version = self._version
        device = query_emb.device
        return Hits(
            scores.to(device),
            rows.to(device),
            None if taken is None else taken.to(device),
            version,
        )

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the stored vectors of rows; see `Index.vectors`.

        On a GPU, the vector of a row outside the index is NaN: an error would have to wait for the
        device.
        """
        return self.gather(rows)[0]

    @torch.no_grad()
    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the vectors of rows and their version, read under one lock."""
        checks.check_integer("rows", rows)
        with stage("index/vectors"), self._lock.read():
            return self._vectors_at(rows).to(rows.device), self._version

    def _vectors_at(self, rows: Tensor) -> Tensor:
        """Read rows on the device of the tombstones. The caller holds the lock."""
        at = rows.to(self._removed.device, torch.int64)
        outside = (at < -1) | (at >= self._n)
        if at.device.type == "cpu" and bool(outside.any()):
            bad = int(at[outside][0])
            raise ValueError(f"rows: expected -1 to {self._n - 1}, got {bad}")
        if self._n == 0:
            found = torch.zeros(*at.shape, self.dim, dtype=torch.float32, device=at.device)
        else:
            found = self._vectors_of(at.clamp(0, self._n - 1))
        found = found.masked_fill((at < 0)[..., None], 0.0)
        return found.masked_fill(outside[..., None], torch.nan)

    def save_copy(self, dir: str | os.PathLike[str]) -> None:
        source = self._source
        self.save(dir)
        with self._lock.read():
            if self._source is not None:  # else a change came in between
                self._source = source

    @abc.abstractmethod
    def _topk(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """Search N > 0 rows; exclude is `[N]` bool, `[B, E]` int64 or None."""

    @abc.abstractmethod
    def _vectors_of(self, rows: Tensor) -> Tensor:
        """Return the float32 vectors `[..., D]` of rows 0 to N - 1; N > 0."""

    def _changed(self) -> None:
        """Invalidate the checksum. Call it before a change, which may be interrupted."""
        self._version += 1
        self._source = self._checksum = None

    def _set_removed(self, removed: Tensor) -> None:
        n_removed = int(removed.sum())
        self._removed, self._n_removed = removed, n_removed

    def _append_live(self, n: int) -> None:
        """Count n more rows, none of them removed."""
        # One assignment of values that are ready: a signal handler cannot raise in its middle.
        self._removed, self._n = self._removed_and(n), self._n + n

    def _removed_and(self, n: int) -> Tensor:
        """Return the tombstones followed by those of n live rows."""
        new = torch.zeros(n, dtype=torch.bool, device=self._removed.device)
        return torch.cat([self._removed, new])

    def _load_removed(self, rows: np.ndarray[Any, Any], n: int, dir: object) -> None:
        """Set the number of rows and the tombstones to those of a saved index."""
        if rows.dtype != np.int64 or rows.ndim != 1:
            raise ValueError(
                f"{dir}: removed.npy: expected int64 [n], got {rows.dtype} {list(rows.shape)}"
            )
        if rows.size and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(
                f"{dir}: removed.npy: expected rows 0 to {n - 1}, got {rows.min()} to {rows.max()}"
            )
        self._n = n
        removed = torch.zeros(n, dtype=torch.bool)
        removed[torch.from_numpy(np.array(rows))] = True
        self._removed, self._n_removed = removed, len(np.unique(rows))

    def _removed_rows(self) -> np.ndarray[Any, Any]:
        return self._removed.nonzero().flatten().cpu().numpy()
