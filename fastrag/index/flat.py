"""FlatIndex: the passage vectors, searched exactly."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fastrag import functional
from fastrag.index.lock import ReadWriteLock
from fastrag.index.storage import as_tensor, read_folder, write_folder
from fastrag.ops import checks

FORMAT = "fastrag.FlatIndex"
VERSION = 1
DTYPES = ("float32",)

Vectors = torch.Tensor | np.ndarray[Any, Any]


class FlatIndex:
    """The vectors of N passages and exact maximum inner product search over them.

        search(q, k) = the k rows i with the largest q · x_i, ties by lowest row

    Row numbers never shift: `remove` leaves a tombstone, and `len` counts it. A search runs beside
    other searches and sees a changing row old or new, never half of each.

    Memory: a loaded index is mapped, read-only, and costs no memory of its own until it is changed;
    the first change (`add`, `update`) copies all vectors into memory. Nothing on disk ever
    changes but by `save`.

    Args:
        dim: D, the width of a vector.
        dtype: how vectors are stored; `"float32"`.
        device: where they are stored and searched.

    Raises:
        ValueError: `dim` below 1, or a dtype that is not supported.

    Example:
        >>> index = FlatIndex(2)
        >>> index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        range(0, 3)
        >>> scores, rows = index.search(torch.tensor([[2.0, 1.0]]), k=2)
        >>> rows
        tensor([[2, 0]])
    """

    def __init__(
        self, dim: int, dtype: str = "float32", device: torch.device | str = "cpu"
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim: expected a whole number of at least 1, got {dim!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {list(DTYPES)} (no other yet), got {dtype!r}")
        self.dim = dim
        self.dtype = dtype
        self._n = 0
        self._data = torch.empty(0, dim, device=device)  # [capacity, D]
        self._removed = torch.zeros(0, dtype=torch.bool, device=device)  # [N]
        self._n_removed = 0
        self._mapped = False
        self._version = 0
        self._source: Path | None = None
        self._checksum: str | None = None
        self._lock = ReadWriteLock()
        # Writers prepare their rows outside `_lock`, so they also exclude each other.
        self._writer = ReadWriteLock()

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return (
            f"FlatIndex(dim={self.dim}, dtype={self.dtype!r}, n={self._n}, n_live={self.n_live}, "
            f"device='{self.device}')"
        )

    @property
    def n_live(self) -> int:
        """Number of rows that a search can return."""
        return self._n - self._n_removed

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self._data.device

    @property
    def version(self) -> int:
        """Goes up by one with each change of rows; saved and loaded."""
        return self._version

    @property
    def source(self) -> Path | None:
        """The folder that holds exactly this content, or `None` after a change."""
        return self._source

    @property
    def index_emb(self) -> torch.Tensor:
        """The matrix `[N, D]`, tombstones included, as a view: read it, do not write to it."""
        return self._data[: self._n]

    def add(self, vectors: Vectors | Iterable[Vectors]) -> range:
        """Appends rows; all of them or, on an error, none.

        Args:
            vectors: `[n, D]`, or an iterable of such blocks (a generator keeps memory bounded: room
                grows by doubling, and no block is kept).

        Returns:
            The new rows' numbers.

        Raises:
            ValueError: another width, not floating point, or a NaN or infinity (the row is named).
        """
        with self._writer.write():
            start = stop = self._n
            whole = isinstance(vectors, torch.Tensor | np.ndarray)
            for block in _blocks(vectors):
                checked = self._checked(block, "vectors", first_row=stop - start)
                self._reserve(stop + len(checked), keep=stop, exact=whole)
                self._data[stop : stop + len(checked)] = checked
                stop += len(checked)
            if stop > start:
                new = torch.zeros(stop - start, dtype=torch.bool, device=self.device)
                with self._lock.write():
                    self._removed = torch.cat([self._removed, new])
                    self._n = stop
                    self._changed()
        return range(start, stop)

    def update(self, rows: torch.Tensor | np.ndarray[Any, Any], vectors: Vectors) -> None:
        """Overwrites rows in place. A memory-mapped index is first copied into memory.

        Args:
            rows: `[n]` whole numbers, each once; removed rows stay removed.
            vectors: `[n, D]`.

        Raises:
            ValueError: unknown or repeated rows, another shape, NaN or infinity; nothing changes.
        """
        with self._writer.write():
            rows = self._checked_rows(rows)
            checked = self._checked(vectors, "vectors")
            if len(rows) != len(checked):
                raise ValueError(
                    f"vectors: expected [{len(rows)}, {self.dim}] for {len(rows)} rows, got "
                    f"{list(checked.shape)}"
                )
            if len(rows) == 0:
                return
            if self._mapped:
                self._reserve(self._n, keep=self._n, exact=True)
            with self._lock.write():
                self._data[rows] = checked
                self._changed()

    def remove(self, rows: torch.Tensor | np.ndarray[Any, Any]) -> None:
        """Takes rows out of every later search; their numbers are not used again.

        Args:
            rows: `[n]` whole numbers, each once; removing a removed row changes nothing.

        Raises:
            ValueError: unknown or repeated rows.
        """
        with self._writer.write():
            rows = self._checked_rows(rows)
            if len(rows) == 0:
                return
            removed = self._removed.clone()
            removed[rows] = True
            with self._lock.write():
                self._removed = removed
                self._n_removed = int(removed.sum())
                self._changed()

    def replace(self, vectors: Vectors | Iterable[Vectors]) -> None:
        """Swaps all vectors at once (a rebuilt index); tombstones are kept.

        Args:
            vectors: `[N, D]`, or blocks that add up to N rows.

        Raises:
            ValueError: another number of rows or width, NaN or infinity; nothing changes.
        """
        with self._writer.write():
            fresh = torch.empty(self._n, self.dim, device=self.device)
            stop = 0
            for block in _blocks(vectors):
                checked = self._checked(block, "vectors", first_row=stop)
                if stop + len(checked) > self._n:
                    stop += len(checked)
                    break
                fresh[stop : stop + len(checked)] = checked
                stop += len(checked)
            if stop != self._n:
                more = "or more " if stop > self._n else ""
                raise ValueError(f"vectors: expected {self._n} rows, got {stop} {more}".rstrip())
            with self._lock.write():
                self._data, self._mapped = fresh, False
                self._changed()

    @torch.no_grad()
    def search(
        self, query_emb: torch.Tensor, k: int, exclude: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds the k rows with the largest inner product; no gradient.

        Args:
            query_emb: `[B, D]`, floating point.
            k: how many rows, at least 1. Where fewer are live, the rest is missing.
            exclude: rows not to be returned: `[B, E]` int64 per query (-1: none), or bool `[N]`.

        Returns:
            scores `[B, k]` fp32 (missing: -inf) and rows `[B, k]` int64 (missing: -1), best first,
            on the query's device. An empty index returns only missing rows.

        Raises:
            ValueError: shapes or dtypes disagree, `k` below 1, or a NaN or infinity.
        """
        self._check_query(query_emb, k)
        with self._lock.read():
            query = query_emb.to(self.device, torch.float32)
            mask = self._removed if self._n_removed else None
            if exclude is not None:
                exclude = self._checked_exclude(exclude, len(query))
            if self._n == 0:
                scores = query.new_full((len(query), k), -torch.inf)
                rows = torch.full((len(query), k), -1, dtype=torch.int64, device=self.device)
            elif exclude is None or mask is None:
                scores, rows = functional.mips_topk(
                    query, self.index_emb, k, exclude=mask if exclude is None else exclude
                )
            elif exclude.dtype == torch.bool:
                scores, rows = functional.mips_topk(
                    query, self.index_emb, k, exclude=mask | exclude
                )
            else:
                # At most E of the best k + E live rows are excluded, so the best k are among them.
                wide = functional.mips_topk(
                    query, self.index_emb, k + exclude.shape[1], exclude=mask
                )
                scores, rows = _drop(*wide, exclude, k)
        return scores.to(query_emb.device), rows.to(query_emb.device)

    @torch.no_grad()
    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """The stored vectors of rows.

        Args:
            rows: `[...]` int64, any shape; -1 is missing.

        Returns:
            `[..., D]` fp32 on the rows' device; missing rows are zero. On a GPU a row outside the
            index gives NaN instead of an error, because raising would wait for the device.

        Raises:
            ValueError: not whole numbers, or (on the CPU) a row outside the index.
        """
        checks.check_integer("rows", rows)
        with self._lock.read():
            at = rows.to(self.device, torch.int64)
            outside = (at < -1) | (at >= self._n)
            if self.device.type == "cpu" and bool(outside.any()):
                bad = int(at[outside][0])
                raise ValueError(f"rows: expected -1 to {self._n - 1}, got {bad}")
            if self._n == 0:
                found = torch.zeros(*at.shape, self.dim, device=self.device)
            else:
                found = self._data[at.clamp(0, self._n - 1)]
            found = found.masked_fill((at < 0)[..., None], 0.0)
            found = found.masked_fill(outside[..., None], torch.nan)
        return found.to(rows.device)

    def to(self, device: torch.device | str) -> Self:
        """Moves the vectors; returns the index itself.

        Args:
            device: any torch device.
        """
        with self._writer.write(), self._lock.write():
            moved = self._data[: self._n].to(device)
            self._mapped = self._mapped and moved.device == self._data.device
            self._data, self._removed = moved, self._removed.to(device)
        return self

    def checksum(self) -> str:
        """Names the content: dim, dtype, vectors and tombstones.

        Read off the manifest while the index is as it was saved, else computed once.

        Returns:
            32 hexadecimal digits; equal content gives equal digits on any device.
        """
        with self._lock.read():
            if self._checksum is None:
                sha = hashlib.sha256()
                for block in self.index_emb.split(65536):
                    sha.update(block.cpu().contiguous().numpy().data.cast("B"))
                self._checksum = self._checksum_of(sha.hexdigest())
            return self._checksum

    def save(self, dir: str | os.PathLike[str]) -> None:
        """Writes the index as a folder, whole or not at all.

        Args:
            dir: the folder; an older FlatIndex in it stays whole until the new one is.

        Raises:
            ValueError: the path is taken by something else, or cannot be written.
        """
        with self._lock.read():
            manifest = write_folder(
                dir,
                {
                    "vectors": self.index_emb.cpu().numpy(),
                    "removed": self._removed_rows(),
                },
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "dim": self.dim,
                    "dtype": self.dtype,
                    "index_version": self._version,
                },
            )
            self._checksum = self._checksum_of(manifest["files"]["vectors.npy"]["sha256"])
            self._source = Path(dir).absolute()

    @classmethod
    def load(
        cls,
        dir: str | os.PathLike[str],
        mmap: bool = True,
        verify: bool = False,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Opens a saved index.

        Args:
            dir: the folder.
            mmap: map the vectors (CPU only) instead of reading them.
            verify: check every byte against the manifest's SHA-256.
            device: where the vectors go.

        Raises:
            ValueError: naming the file, what was expected and what was found: missing, truncated or
                altered file, another format, a newer format version, unreadable path.
        """
        manifest, arrays = read_folder(
            dir, format=FORMAT, version=VERSION, mmap=mmap, verify=verify
        )
        index = cls(_entry(manifest, "dim", dir), _entry(manifest, "dtype", dir))
        vectors, removed = _entry(arrays, "vectors", dir), _entry(arrays, "removed", dir)
        if vectors.ndim != 2 or vectors.shape[1] != index.dim or vectors.dtype != np.float32:
            raise ValueError(
                f"{dir}: vectors.npy: expected float32 [N, {index.dim}], got {vectors.dtype} "
                f"{list(vectors.shape)}"
            )
        index._data = as_tensor(vectors)
        index._n = len(vectors)
        index._mapped = mmap
        index._removed = torch.zeros(index._n, dtype=torch.bool)
        if removed.size and (removed.min() < 0 or removed.max() >= index._n):
            raise ValueError(
                f"{dir}: removed.npy: expected rows 0 to {index._n - 1}, got "
                f"{removed.min()} to {removed.max()}"
            )
        index._removed[torch.from_numpy(np.array(removed))] = True
        index._n_removed = int(index._removed.sum())
        index._version = _entry(manifest, "index_version", dir)
        index._checksum = index._checksum_of(manifest["files"]["vectors.npy"]["sha256"])
        index._source = Path(dir).absolute()
        return index if torch.device(device).type == "cpu" else index.to(device)

    def _changed(self) -> None:
        self._version += 1
        self._source = self._checksum = None

    def _reserve(self, n: int, *, keep: int, exact: bool) -> None:
        """Makes room for n rows in memory of our own and copies the first `keep`."""
        capacity = self._data.shape[0]
        if n <= capacity and not self._mapped:
            return
        room = n if exact and capacity == 0 else max(n, 2 * capacity if n > capacity else n)
        grown = torch.empty(room, self.dim, device=self.device)
        grown[:keep] = self._data[:keep]
        with self._lock.write():
            self._data, self._mapped = grown, False

    def _removed_rows(self) -> np.ndarray[Any, Any]:
        return self._removed.nonzero().flatten().cpu().numpy()

    def _checksum_of(self, vectors_sha256: str) -> str:
        removed = hashlib.sha256(self._removed_rows().tobytes()).hexdigest()
        described = json.dumps([self.dim, self.dtype, self._n, vectors_sha256, removed])
        return hashlib.sha256(described.encode("ascii")).hexdigest()[:32]

    def _checked(self, vectors: Any, name: str, first_row: int = 0) -> torch.Tensor:
        """Vectors as fp32 on the index's device."""
        if isinstance(vectors, np.ndarray):
            vectors = torch.from_numpy(np.array(vectors))
        if not isinstance(vectors, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor or an array, got {type(vectors).__name__}")
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"{name}: expected [n, {self.dim}], got {list(vectors.shape)}")
        if not vectors.dtype.is_floating_point:
            raise ValueError(f"{name}: expected floating point, got {vectors.dtype}")
        vectors = vectors.detach().to(self.device, torch.float32)
        finite = vectors.isfinite().all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            bad = vectors[row][~vectors[row].isfinite()][0].item()
            raise ValueError(
                f"{name}: expected finite fp32 numbers, got {bad} in row {first_row + row}"
            )
        return vectors

    def _checked_rows(self, rows: Any) -> torch.Tensor:
        try:
            rows = torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"rows: expected [n] int64, got {rows!r}") from error
        if rows.numel() == 0:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        if rows.ndim != 1 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
            raise ValueError(f"rows: expected [n] int64, got {list(rows.shape)} {rows.dtype}")
        rows = rows.to(self.device, torch.int64)
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self._n:
            raise ValueError(f"rows: expected 0 to {self._n - 1}, got {low if low < 0 else high}")
        if len(rows.unique()) != len(rows):
            values, counts = rows.unique(return_counts=True)
            raise ValueError(f"rows: expected each once, got {int(values[counts > 1][0])} again")
        return rows

    def _check_query(self, query_emb: Any, k: int) -> None:
        if not isinstance(query_emb, torch.Tensor) or not query_emb.dtype.is_floating_point:
            got = getattr(query_emb, "dtype", type(query_emb).__name__)
            raise ValueError(f"query_emb: expected a floating-point tensor, got {got}")
        if query_emb.ndim != 2 or query_emb.shape[1] != self.dim:
            raise ValueError(f"query_emb: expected [B, {self.dim}], got {list(query_emb.shape)}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a whole number of at least 1, got {k!r}")

    def _checked_exclude(self, exclude: torch.Tensor, n_queries: int) -> torch.Tensor:
        checks.check_tensor("exclude", exclude)
        exclude = exclude.to(self.device)
        if exclude.dtype == torch.bool and exclude.shape == (self._n,):
            return exclude
        if exclude.dtype in (torch.int64, torch.int32) and (
            exclude.ndim == 2 and exclude.shape[0] == n_queries
        ):
            return exclude.to(torch.int64)
        raise ValueError(
            f"exclude: expected int64 [{n_queries}, E] or bool [{self._n}], got {exclude.dtype} "
            f"{list(exclude.shape)}"
        )


def _blocks(vectors: Any) -> Iterator[Any]:
    if isinstance(vectors, torch.Tensor | np.ndarray):
        yield vectors
    elif isinstance(vectors, Iterable):
        yield from vectors
    else:
        raise ValueError(
            f"vectors: expected [n, D] or an iterable of blocks, got {type(vectors).__name__}"
        )


def _drop(
    scores: torch.Tensor, rows: torch.Tensor, exclude: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the first k hits whose row is not excluded; `[B, k + E]` to `[B, k]`."""
    if exclude.shape[1] == 0:
        return scores, rows
    barred = exclude.sort(dim=1).values
    at = torch.searchsorted(barred, rows).clamp(max=barred.shape[1] - 1)
    dropped = barred.gather(1, at) == rows
    order = dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    scores = scores.masked_fill(dropped, -torch.inf).gather(1, order)
    return scores, rows.masked_fill(dropped, -1).gather(1, order)


def _entry(found: Any, key: str, dir: str | os.PathLike[str]) -> Any:
    if key not in found:
        raise ValueError(f"{dir}: expected {key!r} in a {FORMAT} folder, got {sorted(found)}")
    return found[key]
