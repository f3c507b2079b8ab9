"""FaissIndex: approximate and compressed search by faiss, with the methods of FlatIndex.

faiss is imported when the first index is made. Its wheels contain an OpenMP runtime of their own,
so faiss and torch have separate threads, which compete for the processors if both work at once.
This module sets no number of threads: `faiss.omp_set_num_threads` and OMP_NUM_THREADS are left to
the user.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastrag import manifests
from fastrag.index import faiss_support as support
from fastrag.index import inputs
from fastrag.index.inputs import Vectors
from fastrag.index.rows import INCONSISTENT, RowIndex
from fastrag.index.storage import FolderWriter, entry_of, read_folder
from fastrag.manifests import integer, optional, record, text

FORMAT = "fastrag.FaissIndex"
VERSION = 1
_FIELDS = record(
    {
        "dim": integer(1, (1 << 31) - 1),  # faiss counts dimensions in 32 bits
        "factory": text(),
        "parameters": optional(text()),
        "count": integer(),
        "index_version": integer(),
    },
    {"passages": optional(text())},
)
_CPU = torch.device("cpu")
# faiss changes rows in place and cannot undo a change.
_INTERRUPTED = INCONSISTENT.format("the change was interrupted")


class FaissIndex(RowIndex, format=FORMAT):
    """The vectors of N passages in an index of faiss, searched by inner product.

    A factory that needs training (IVF, PQ, OPQ …) is trained by `train`, or else on the vectors of
    the first `add`: an evenly spaced sample of an array, or the first blocks of an iterable. Rows
    keep their numbers: `remove` leaves a tombstone. Searches may run at the same time as other
    searches, but not during a change. faiss changes rows in place, so an exception (Ctrl-C) during
    an `update`, or during an `add` to an index that has rows, makes the index unusable: each later
    call raises a RuntimeError.

    `vectors` returns the vectors as faiss reconstructs them, so training scores the compressed
    vectors. A factory whose rows faiss cannot reconstruct, such as an IVF with fast scan, is
    rejected unless a refining index keeps the rows: `"IVF4096,PQ64x4fs,RFlat"`.

    Args:
        dim: D, the width of a vector.
        factory: factory string of the faiss index, for example `"Flat"`, `"IVF4096,PQ64"`,
            `"HNSW32"`.
        parameters: search parameters of faiss, for example `"nprobe=32"` or `"efSearch=64"`.
        device: device of the search. A GPU needs a build of faiss for it; `add`, `update` and
            `vectors` then still use the copy in main memory.

    Raises:
        ValueError: `dim` below 1; a factory or parameters that faiss does not know; a factory whose
            rows faiss cannot reconstruct; a device that this faiss cannot use.
        ImportError: faiss is not installed.

    Example:
        >>> index = FaissIndex(2, "Flat")
        >>> index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        range(0, 3)
        >>> scores, rows = index.search(torch.tensor([[2.0, 1.0]]), k=2)
        >>> rows
        tensor([[2, 0]])
    """

    def __init__(
        self,
        dim: int,
        factory: str = "Flat",
        *,
        parameters: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dim)
        self.factory = factory
        self.parameters = parameters
        self._index = support.make(self.dim, factory, parameters)
        self._mapped: np.ndarray[Any, Any] | None = None  # memory of a loaded `_index`
        self._device = inputs.named_device(device)
        self._on_gpu: Any = None
        if self._device.type != "cpu":
            support.require_gpu(self._device)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: faiss copies the index into memory of its own."""
        return self.__dict__ | {"_mapped": None}

    def __repr__(self) -> str:
        return (
            f"FaissIndex(dim={self.dim}, factory={self.factory!r}, n={self._n}, "
            f"n_live={self.n_live}, device='{self.device}')"
        )

    @property
    def device(self) -> torch.device:
        """Device on which the index is searched."""
        return self._device

    @property
    def settings(self) -> dict[str, Any]:
        """Factory and search parameters of faiss."""
        return {"factory": self.factory, "parameters": self.parameters or "none"}

    @property
    def is_trained(self) -> bool:
        """Whether rows can be added without training first."""
        return bool(self._index.is_trained)

    def train(self, vectors: Vectors | Iterable[Vectors]) -> None:
        """Train the index before the first `add`.

        Args:
            vectors: a sample `[n, D]` of the passages; all of it is used.

        Raises:
            ValueError: the index has rows already; as `add`; or too few vectors for the factory.
        """
        with self._writer.write():
            if self._n:
                raise ValueError(f"train: expected an index without rows, got one of {self._n}")
            fresh = support.make(self.dim, self.factory, self.parameters)
            sample = inputs.checked_whole(vectors, self.dim, _CPU)
            support.train(fresh, sample.numpy(), self.factory)
            with self._lock.write():
                self._take(fresh)

    def add(self, vectors: Vectors | Iterable[Vectors]) -> range:
        """Append rows: all of them or, on an error, none.

        Args:
            vectors: `[n, D]`, in memory or mapped from a file, or an iterable of such blocks. If
                the index has rows already, all blocks are checked before the first is added, and
                the blocks of a generator are held in memory.

        Returns:
            The numbers of the new rows.

        Raises:
            ValueError: another width, not floating point, a NaN or infinity (the row is named), or
                too few vectors to train the factory on.
        """
        with self._writer.write():
            start = self._n
            if start == 0:
                index = support.clone(self._changeable())
                n = _append(index, self._training(index, vectors))
                if n:
                    self._swap(index, n)
                return range(n)
            if isinstance(vectors, Iterator):
                vectors = list(self._checked_blocks(vectors))
            for _ in self._checked_blocks(vectors):
                pass
            changeable = self._changeable()
            with self._lock.write():
                self._take(changeable)
                self._lock.broken = _INTERRUPTED
                n = _append(self._index, self._checked_blocks(vectors))
                if n:
                    self._changed()
                    self._append_live(n)
                    self._copy_to_device()
                self._lock.broken = None
        return range(start, start + n)

    def update(self, rows: Tensor | np.ndarray[Any, Any], vectors: Vectors) -> None:
        """Overwrite rows in place; centroids and codebooks of faiss are not trained again.

        Args:
            rows: `[n]` integers without repetition; removed rows stay removed.
            vectors: `[n, D]`.

        Raises:
            ValueError: unknown or repeated rows, another shape, NaN or infinity, or a factory whose
                rows faiss cannot overwrite (HNSW, fast scan); nothing changes.
        """
        with self._writer.write():
            rows = inputs.checked_rows(rows, self._n, _CPU)
            checked = inputs.checked_update(rows, vectors, self.dim, _CPU)
            if len(rows) == 0:
                return
            support.check_updatable(self._index, self.factory)
            changeable = self._changeable()
            with self._lock.write():
                self._take(changeable)
                self._lock.broken = _INTERRUPTED
                self._changed()
                support.overwrite(self._index, rows.numpy(), checked.numpy())
                self._copy_to_device()
                self._lock.broken = None

    def remove(self, rows: Tensor | np.ndarray[Any, Any]) -> None:
        """Exclude rows from every later search; their numbers are not reused.

        Args:
            rows: `[n]` integers without repetition. A row may have been removed before.

        Raises:
            ValueError: unknown or repeated rows, or a factory whose search cannot exclude rows.
        """
        support.excluding(self._index, np.zeros(self._n, dtype=bool), self.factory)
        super().remove(rows)

    def replace(self, vectors: Vectors | Iterable[Vectors]) -> None:
        """Train and build a new index and replace the current one by it; tombstones are kept.

        Args:
            vectors: `[N, D]`, or blocks that add up to N rows.

        Raises:
            ValueError: another number of rows or width, NaN or infinity; nothing changes.
        """
        with self._writer.write():
            fresh = support.make(self.dim, self.factory, self.parameters)
            n = _append(fresh, self._training(fresh, vectors)) if self._n else 0
            inputs.check_length(n, self._n)
            self._swap(fresh, 0)

    def to(self, device: torch.device | str) -> Self:
        """Search on another device from now on; return the index itself.

        Args:
            device: cpu, or cuda with a build of faiss for it.

        Raises:
            ValueError: this build of faiss cannot use the device.
        """
        device = inputs.named_device(device)
        if device.type != "cpu":
            support.require_gpu(device)
        with self._writer.write(), self._lock.write():
            self._device = device
            self._copy_to_device()
        return self

    def checksum(self) -> str:
        """Return a digest of the content: the bytes of faiss, factory, width and tombstones.

        Returns:
            32 hexadecimal digits.
        """
        with self._lock.read():
            if self._checksum is None:
                sha = hashlib.sha256()
                support.write(self._index, sha.update)
                self._checksum = self._checksum_of(sha.hexdigest())
            return self._checksum

    def save(self, dir: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an interrupted save leaves the previous folder in place.

        Args:
            dir: the folder: new, empty, or one of an older FaissIndex, which is replaced.

        Raises:
            ValueError: the path holds something else or cannot be written.
        """
        with (
            self._lock.read(),
            FolderWriter(dir, format=FORMAT, version=VERSION) as writer,
        ):
            stream = writer.stream("index", np.uint8)
            support.write(self._index, lambda data: stream.append(np.frombuffer(data, np.uint8)))
            writer.put("removed", self._removed_rows())
            manifest = writer.commit(
                {
                    "dim": self.dim,
                    "factory": self.factory,
                    "parameters": self.parameters,
                    "count": self._n,
                    "index_version": self._version,
                    "passages": self.passages_checksum,
                }
            )
            self._checksum = self._checksum_of(manifest["files"]["index.npy"]["sha256"])
            self._source = Path(dir).absolute()

    @classmethod
    def load(
        cls,
        dir: str | os.PathLike[str],
        mmap: bool = True,
        verify: bool = False,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Open a saved index.

        Args:
            dir: the folder.
            mmap: map the file instead of reading it; the first `add` or `update` then reads it.
                faiss cannot map the codes of a fast scan and reads them.
            verify: check every byte against the manifest's checksums.
            device: device of the search.

        Raises:
            ValueError: a missing, truncated or altered file, or another format; the message names
                the file.
            ImportError: faiss is not installed.
        """
        manifest, arrays = read_folder(
            dir, format=FORMAT, version=VERSION, fields=_FIELDS, verify=verify
        )
        dim, count = manifest["dim"], manifest["count"]
        data = entry_of(arrays, "index", dir, FORMAT)
        removed = entry_of(arrays, "removed", dir, FORMAT)
        with manifests.named(dir):
            read = support.read_in_place(data) if mmap else support.read(data)
            if (read.d, read.ntotal) != (dim, count):
                raise ValueError(
                    f"index.npy: expected {count} vectors of width {dim}, got {read.ntotal} of "
                    f"width {read.d}"
                )
            index = cls(dim, manifest["factory"], parameters=manifest["parameters"])
            support.check_kept(read, index.factory)
        index._index, index._mapped = read, data if mmap else None
        index._load_removed(removed, count, dir)
        index._version = manifest["index_version"]
        index.passages_checksum = manifest.get("passages")
        index._checksum = index._checksum_of(manifest["files"]["index.npy"]["sha256"])
        index._source = Path(dir).absolute()
        return index if torch.device(device).type == "cpu" else index.to(device)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        factory: str | None = None,
        *,
        parameters: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Reads an index that faiss itself wrote (`faiss.write_index`, or `datasets`).

        Args:
            path: the file.
            factory: what faiss built it with, for example `"HNSW32"`, which `replace` builds again;
                None: faiss is asked.
            parameters: as for the class; None: those in the file.
            device: as for the class.

        Raises:
            ValueError: not an index, one for another metric than the inner product, one that
                numbers its rows in another way, or a factory that is missing or of another kind.
            ImportError: faiss is not installed.
        """
        read = support.read_file(path)
        index = cls(
            int(read.d),
            support.factory_of(read) if factory is None else factory,
            parameters=parameters,
        )
        if not (isinstance(read, type(index._index)) or isinstance(index._index, type(read))):
            raise ValueError(
                f"factory: expected that of an {type(read).__name__}, which {path} holds, got "
                f"{index.factory!r} for an {type(index._index).__name__}"
            )
        support.check_kept(read, index.factory)
        support.enable_lookup(read)
        support.set_parameters(read, index.factory, parameters)
        index._swap(read, int(read.ntotal))
        return index if torch.device(device).type == "cpu" else index.to(device)

    def _changed(self) -> None:
        super()._changed()
        self._on_gpu = None  # until it is copied again, searches run on the CPU

    def _copy_to_device(self) -> None:
        on_cpu = self._device.type == "cpu"
        self._on_gpu = None if on_cpu else support.on_gpu(self._index, self._device)

    def _changeable(self) -> Any:
        return self._index if self._mapped is None else support.read(self._mapped)

    def _take(self, index: Any) -> None:
        self._index, self._mapped = index, None

    def _swap(self, index: Any, n_new: int) -> None:
        with self._lock.write():
            self._changed()
            removed = self._removed_and(n_new)
            self._index, self._mapped = index, None
            self._removed, self._n = removed, self._n + n_new
            self._copy_to_device()

    def _checked_blocks(self, vectors: Vectors | Iterable[Vectors]) -> Iterator[Tensor]:
        return inputs.checked_blocks(vectors, self.dim, _CPU)

    def _training(self, index: Any, vectors: Vectors | Iterable[Vectors]) -> Iterable[Tensor]:
        """Train an index on the vectors if it needs training; return all vectors as blocks."""
        if isinstance(vectors, inputs.SizedBlocks) and not index.is_trained:
            vectors = inputs.checked_whole(vectors, self.dim, _CPU)  # the sample is from all rows
        blocks = self._checked_blocks(vectors)
        if index.is_trained:
            return blocks
        wanted, sample, seen = support.training_rows(index), [], 0
        length = inputs.whole_length(vectors)
        step = 1 if length is None else max(1, length // wanted)
        for block in blocks:
            sample.append(block[-seen % step :: step])
            seen += len(block)
            if length is None and seen >= wanted:
                break
        if not seen:
            return ()
        support.train(index, torch.cat(sample).numpy(), self.factory)
        if length is None:
            return itertools.chain(sample, blocks)
        return self._checked_blocks(vectors)

    def _topk(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        query = query.cpu()
        inputs.check_finite(query, name="query_emb")
        index, parameters, n_more = self._on_gpu or self._index, None, 0
        if exclude is not None and exclude.dtype == torch.bool:
            index = self._index  # faiss cannot exclude rows on a GPU
            parameters = support.excluding(index, exclude.numpy(), self.factory)
        elif exclude is not None:
            n_more = exclude.shape[1]
        n = min(k + n_more, self._n)
        scores, rows = support.search(index, query.numpy(), n, parameters, self.factory)
        room = (0, k + n_more - n)
        scores = torch.nn.functional.pad(scores, room, value=-torch.inf)
        rows = torch.nn.functional.pad(rows, room, value=-1)
        if exclude is not None and n_more:
            return inputs.drop_excluded(scores, rows, exclude, k)
        return scores, rows

    def _vectors_of(self, rows: Tensor) -> Tensor:
        found = support.reconstruct(self._index, rows.flatten().numpy(), self.factory)
        return torch.from_numpy(found).reshape(*rows.shape, self.dim)

    def _checksum_of(self, index_sha256: str) -> str:
        removed = hashlib.sha256(self._removed_rows().tobytes()).hexdigest()
        described = json.dumps([self.dim, self.factory, self._n, index_sha256, removed])
        return hashlib.sha256(described.encode("ascii")).hexdigest()[:32]


def _append(index: Any, blocks: Iterable[Tensor]) -> int:
    """Add all rows and return their number."""
    before = index.ntotal
    for block in blocks:
        index.add(block.numpy())
    support.enable_lookup(index)
    return int(index.ntotal - before)
