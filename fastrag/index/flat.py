"""FlatIndex: passage vectors in one matrix, searched exactly."""

from __future__ import annotations

import dataclasses
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

from fastrag import functional, manifests
from fastrag.index import codec, inputs
from fastrag.index import codes as row_codes
from fastrag.index.codec import Codec
from fastrag.index.flat_codes import FlatCodes, checked_codes
from fastrag.index.flat_files import (
    FIELDS,
    FORMAT,
    VERSION,
    Base,
    FlatFiles,
    bytes_of,
    check_stored,
    content_sha256,
    factor_of,
    stored_dtype,
)
from fastrag.index.host_search import HostSearch
from fastrag.index.inputs import Vectors
from fastrag.index.room import MemoryRoom, room_for
from fastrag.index.rows import RowIndex
from fastrag.index.storage import FolderWriter, as_tensor, entry_of, read_folder
from fastrag.messages import shown

# Number of rows from which scale and offset of int8 codes are chosen if an iterable is added.
SAMPLE_ROWS = 16384


class FlatIndex(RowIndex, format=FORMAT):
    """The vectors of N passages with exact maximum inner product search.

        search(q, k) = the k rows i with the largest q · x_i, ties by lowest row

    Rows keep their numbers: `remove` leaves a tombstone, and `len` counts it. Searches run
    concurrently, and a search during a change sees either the old or the new version of the index.

    int8 stores `x = offset + scale * code` in a quarter of the memory, and the search is exact for
    these x. Scale and offset of each dimension are chosen from the vectors of the first `add` (from
    the first 16,384 rows of an iterable of blocks) and stay until `replace`. Later values outside
    their range are clamped, and `n_clamped` counts them. `astype` and `replace` choose from all
    rows.

    A large float32 index also has int8 codes of its rows, a quarter more memory. A search reads all
    codes, but only the rows that can be among the k best, and returns the same bits. The codes are
    computed from all rows, which takes as long as some tens of searches of the rows: by the search
    with which those since the last `add` or `replace` have taken as long, or by `save`. They are
    saved with the index, and `update` keeps them right.

    Memory: a loaded index is mapped read-only and takes no memory of its own until the first `add`
    or `update`, which copies all vectors into memory. Only `save` changes files.

    Args:
        dim: D, the width of a vector.
        dtype: dtype of the stored vectors: `"float32"`, `"float16"`, `"bfloat16"` or `"int8"`.
        device: device of the stored vectors.
        codes: codes of float32 rows. `False`: none. `None`: on a CPU, when they pay, as above;
            needs the C++ extension. `True`: made by the first search that is faster with them, also
            on a GPU.
        exact: `"float32"` with `dtype="int8"` is an older name of `codes=True` and gives a warning.
        search_device: device of the search, `None` for `device`. It may be a GPU if `device` is the
            CPU: each search then copies the vectors to the GPU block by block (float32 rows,
            without codes). A call that the GPU kernels do not support, such as a k above 1024, runs
            on the CPU with the same results.

    Raises:
        ValueError: `dim` below 1, an unsupported `dtype`, `codes` with another dtype than float32,
            another `exact`, a device that torch cannot use, or a `search_device` that the machine
            does not have or that does not fit `device`.

    Example:
        >>> index = FlatIndex(2)
        >>> index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        range(0, 3)
        >>> scores, rows = index.search(torch.tensor([[2.0, 1.0]]), k=2)
        >>> rows
        tensor([[2, 0]])
    """

    def __init__(
        self,
        dim: int,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        *,
        codes: bool | None = None,
        exact: str | None = None,
        search_device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dim, device)
        if dtype not in codec.DTYPES:
            raise ValueError(
                f"dtype: expected one of {', '.join(codec.DTYPES)}, got {shown(dtype)}"
            )
        dtype, codes = checked_codes(dtype, codes, exact)
        self.dtype = dtype
        self._codec = Codec(dtype)
        # [capacity, pitch]
        self._data = codec.allocate(0, self.dim, self._codec.dtype, self._removed.device)
        self._codes = FlatCodes(codes)
        self._n_clamped = 0
        # Folder on the disk from which the vectors are mapped, read-only; None: they are in memory.
        self._mapped: Path | None = None
        self._base: Base | None = None
        self._host_search = HostSearch.of(search_device, self.device)

    @classmethod
    def from_datasets(
        cls, dataset: Any, column: str = "embeddings", dtype: str = "float32", **settings: Any
    ) -> Self:
        """Make an index of a column of vectors of a Hugging Face `datasets` object.

        Args:
            dataset: a `datasets.Dataset`; it is read block by block.
            column: name of the column; row i of the index is row i of the dataset.
            dtype: as for the class.
            settings: further arguments of the constructor.

        Raises:
            ValueError: no such column, no rows, vectors of several widths, or as `add`.

        Example:
            >>> index = FlatIndex.from_datasets(dataset, dtype="int8")      # doctest: +SKIP
        """
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list) or column not in columns:
            raise ValueError(
                f"dataset: expected one split with the column {shown(column)}, got "
                f"{type(dataset).__name__} with {shown(columns)}"
            )
        blocks = inputs.column_blocks(dataset, column)
        first = next(blocks, None)
        if first is None:
            raise ValueError("dataset: expected at least one row, got none")
        index = cls(first.shape[1], dtype, **settings)
        index.add(itertools.chain([first], blocks))
        return index

    def __repr__(self) -> str:
        return (
            f"FlatIndex(dim={self.dim}, dtype={self.dtype!r}, codes={self.codes}, n={self._n}, "
            f"n_live={self.n_live}, device='{self.device}', search_device='{self.search_device}')"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """How rows are stored, and the bytes that a search reads, for `fastrag index info`.

        `pitch` is the number of bytes per row, `clamped` that of clamped values. A search for one
        question reads at most `reads` bytes, and without codes it would read `reads_rows`.
        """
        found = {"dtype": self.dtype, "pitch": self.pitch, "clamped": self._n_clamped}
        rows = self.index_emb
        n_bytes = rows.numel() * rows.itemsize
        return found | {"reads": self._codes.reads(rows), "reads_rows": n_bytes}

    @property
    def codes(self) -> bool | None:
        """The argument `codes`; `False` for other dtypes than float32."""
        return self._codes.wanted

    @property
    def n_clamped(self) -> int:
        """Number of values that were clamped because they lay outside the range of int8 codes."""
        return self._n_clamped

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._data.device

    @property
    def search_device(self) -> torch.device:
        """Device on which the vectors are searched."""
        return self.device if self._host_search is None else self._host_search.device

    @property
    def index_emb(self) -> Tensor:
        """View of the stored matrix `[N, D]`, including removed rows; read-only."""
        return self._data[: self._n, : self.dim]

    @property
    def scale(self) -> Tensor | None:
        """Scale of int8 codes, `[D]` float32; `None` for other dtypes."""
        return self._codec.scale

    @property
    def offset(self) -> Tensor | None:
        """Offset of int8 codes, `[D]` float32; `None` for other dtypes."""
        return self._codec.offset

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next: a multiple of 64, except in a mapped file of format 1."""
        return self._data.stride(0) * self._data.itemsize

    def add(self, vectors: Vectors | Iterable[Vectors]) -> range:
        """Append rows: all of them or, on an error, none.

        Args:
            vectors: `[n, D]`, in memory or mapped from a file (`numpy.load(..., mmap_mode="r")`),
                or an iterable of such blocks, which are read one at a time. The capacity grows by
                doubling, starting at the size of the first `add` or of its first block.

        Returns:
            The numbers of the new rows.

        Raises:
            ValueError: another width, not floating point, a NaN or infinity, or a number beyond the
                range of the dtype (the row is named).
        """
        with self._writer.write():
            start = stop = self._n
            whole = inputs.whole_length(vectors)
            chosen, blocks = self._encoding(vectors)
            n_clamped = 0
            for block in blocks:
                stored, n = chosen.encode(block, stop - start)
                self._reserve(max(stop + len(block), start + (whole or 0)), keep=stop)
                self._data[stop : stop + len(block), : self.dim] = stored
                stop += len(block)
                n_clamped += n
            if stop > start:
                with self._lock.write():
                    self._changed()
                    self._codes.drop()
                    self._codec, self._base = chosen, None
                    self._n_clamped += n_clamped
                    self._append_live(stop - start)
        return range(start, stop)

    def update(self, rows: Tensor | np.ndarray[Any, Any], vectors: Vectors) -> None:
        """Overwrite rows in place. A mapped index is first copied into memory.

        Args:
            rows: `[n]` integers without repetition; removed rows stay removed.
            vectors: `[n, D]`; int8 codes keep their scale and offset.

        Raises:
            ValueError: unknown or repeated rows, another shape, NaN or infinity; nothing changes.
        """
        with self._writer.write():
            rows = inputs.checked_rows(rows, self._n, self.device)
            checked = inputs.checked_update(rows, vectors, self.dim, self.device)
            if len(rows) == 0:
                return
            stored, n_clamped = self._codec.encode(checked)
            if self._mapped:
                self._reserve(self._n, keep=self._n)
            with self._lock.write():
                self._changed()
                # The codes are put back after the change. If it is interrupted, there are none, and
                # the next search computes them.
                made = self._codes.take()
                if self._base is not None:
                    self._base.changed[rows] = True
                codec.put_rows(self.index_emb, rows, stored)
                self._n_clamped += n_clamped
                if made is not None:
                    made.update(rows)
                self._codes.put(made)

    def replace(self, vectors: Vectors | Iterable[Vectors]) -> None:
        """Replace all vectors at once, as after encoding all passages; tombstones are kept.

        The old vectors stay until all new ones are there. If this index is mapped from a folder,
        the new vectors are written to a file without a name next to that folder and mapped as well,
        so they take no memory of their own; if the place is not writable, they are kept in memory.

        Args:
            vectors: `[N, D]`, or blocks that add up to N rows and are read one at a time. An int8
                index reads vectors twice, to choose scale and offset from all of them, and first
                writes the blocks of a generator to where the new rows will be, in float32.

        Raises:
            ValueError: another number of rows or width, NaN or infinity, or a full disk; nothing
                changes.
        """
        with self._writer.write():
            chosen, n_clamped = self._codec, 0
            if self._codec.dtype == "int8" and self._n:
                vectors = self._kept_blocks(vectors, self._n, self._mapped)
                chosen = codec.fit_int8(self._checked_blocks(vectors))
            room = room_for(self._n, self.dim, self._codec.dtype, self.device, self._mapped)
            stop = 0
            for block in self._checked_blocks(vectors):
                stored, n = chosen.encode(block, stop)
                stop += len(block)
                if stop > self._n:
                    break
                room.append(stored)
                n_clamped += n
            inputs.check_length(stop, self._n)
            fresh, mapped = room.rows(), None if isinstance(room, MemoryRoom) else self._mapped
            with self._lock.write():
                self._changed()
                self._codes.drop()
                self._data, self._mapped = fresh, mapped
                self._codec, self._n_clamped, self._base = chosen, n_clamped, None

    @torch.no_grad()
    def astype(self, dtype: str, *, codes: bool | None = None, exact: str | None = None) -> Self:
        """Return an index of the same rows and tombstones in another dtype.

        It is stored and searched on the same devices.

        Args:
            dtype: as for the class; scale and offset of int8 are chosen from all rows.
            codes: as for the class.
            exact: as for the class.

        Raises:
            ValueError: an unknown dtype, or a number beyond its range (the message names the row).
        """
        made = type(self)(
            self.dim,
            dtype,
            self.device,
            codes=codes,
            exact=exact,
            search_device=self.search_device,
        )
        with self._lock.read():
            room = codec.allocate(self._n, self.dim, made._codec.dtype, self.device)
            if made._codec.dtype == self._codec.dtype:
                made._codec, made._n_clamped = self._codec, self._n_clamped
                room[:, : self.dim] = self.index_emb
            else:
                if made._codec.dtype == "int8" and self._n:
                    made._codec = codec.fit_int8(map(self._codec.decode, self._stored_blocks()))
                stop = 0
                for block in map(self._codec.decode, self._stored_blocks()):
                    stored, _ = made._codec.encode(block, stop)
                    room[stop : stop + len(block), : self.dim] = stored
                    stop += len(block)
            made._data, made._n = room, self._n
            made._set_removed(self._removed.clone())
            made._version = self._version
            made.passages_checksum = self.passages_checksum
        return made

    def to(
        self, device: torch.device | str, *, search_device: torch.device | str | None = None
    ) -> Self:
        """Move the vectors; return the index itself.

        Args:
            device: any torch device.
            search_device: as for the class; None: search on `device`.

        Raises:
            ValueError: as for the class; nothing changes.
        """
        device = inputs.usable_device(device)
        host_search = HostSearch.of(search_device, device)
        with self._writer.write(), self._lock.write():
            at = self._data.device
            moved = self._data[: self._n].to(device)
            removed, moved_codec = self._removed.to(device), self._codec.to(device)
            mapped = self._mapped if moved.device == at else None
            self._data, self._mapped, self._removed = moved, mapped, removed
            if (base := self._base) is not None:
                self._base = dataclasses.replace(base, changed=base.changed.to(device))
            if moved.device != at:
                self._codes.drop()
            self._host_search, self._codec = host_search, moved_codec
        return self

    def checksum(self) -> str:
        """Return a digest of the content: dim, dtype, vectors and tombstones.

        It is taken from the manifest if the index has not changed since it was saved or loaded, and
        otherwise computed once.

        Returns:
            32 hexadecimal digits, the same for equal content on every device.
        """
        with self._lock.read():
            return self._known_checksum()

    def track_changes(self) -> None:
        """Remember from now on which rows are updated, so that a checkpoint can hold these alone.

        Nothing happens if no folder holds exactly this content, or if changes are tracked already.
        """
        with self._writer.write():
            if self._base is None and self._source is not None:
                unchanged = torch.zeros(self._n, dtype=torch.bool, device=self.device)
                self._base = Base(self._source, self.checksum(), unchanged)

    def save(self, dir: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an interrupted save leaves the previous folder in place.

        Args:
            dir: the folder: new, empty, or one of an older FlatIndex, which is replaced.

        Raises:
            ValueError: the path holds something else or cannot be written.
        """
        with (
            self._lock.read(),
            FolderWriter(dir, format=FORMAT, version=VERSION) as writer,
        ):
            files = FlatFiles(writer, self.dim, self._codec)
            for block in self._stored_blocks():
                files.append(block)
            manifest = files.commit(
                self._removed_rows(),
                self._codes.for_save(self.index_emb),
                dtype=self.dtype,
                codes=self.codes,
                index_version=self._version,
                n_clamped=self._n_clamped,
                passages=self.passages_checksum,
            )
            self._checksum = self._checksum_of(content_sha256(manifest))
            self._source = Path(dir).absolute()

    @classmethod
    def load(
        cls,
        dir: str | os.PathLike[str],
        mmap: bool = True,
        verify: bool = False,
        device: torch.device | str = "cpu",
        *,
        codes: bool | None = None,
        search_device: torch.device | str | None = None,
    ) -> Self:
        """Open a saved index, of this or an earlier format version.

        Args:
            dir: the folder.
            mmap: map the vectors (CPU only) instead of reading them.
            verify: check every byte against the manifest's checksums.
            device: device of the vectors.
            codes: as for the class; `None`: as it was saved.
            search_device: as for the class.

        Raises:
            ValueError: a missing, truncated or altered file, another format, a newer format version
                or an unreadable path (the message names the file); or as for the class.
        """
        manifest, arrays = read_folder(
            dir, format=FORMAT, version=VERSION, fields=FIELDS, mmap=mmap, verify=verify
        )
        stored, removed = (entry_of(arrays, key, dir, FORMAT) for key in ("vectors", "removed"))
        check_stored(stored, manifest, dir)
        with manifests.named(dir):
            dtype = stored_dtype(manifest)
            if codes is None:
                codes = manifest.get("codes", dtype != manifest["dtype"] or None)
            index = cls(manifest["dim"], dtype, codes=codes)
        index._load_removed(removed, len(stored), dir)
        # numpy has no bfloat16, so the file holds its bits as uint16; torch reads them as int16.
        raw = stored.view(np.int16) if index.dtype == "bfloat16" else stored
        index._data = as_tensor(raw).view(index._codec.torch_dtype)
        index._mapped = Path(dir).absolute().parent if mmap else None
        if index._codec.dtype == "int8" and index._n:
            factors = (factor_of(arrays, name, index.dim, dir) for name in ("scale", "offset"))
            index._codec = Codec("int8", *factors)
        if index._n:
            index._codes.load(arrays, manifest, index.index_emb, dir, mapped=mmap)
        if verify and index._content_sha256() != content_sha256(manifest):
            raise ValueError(
                f"{dir}: expected vectors of width {index.dim} with the SHA-256 "
                f"{content_sha256(manifest)}, got {index._content_sha256()}"
            )
        index._n_clamped = manifest.get("n_clamped", 0)
        index._version = manifest["index_version"]
        index.passages_checksum = manifest.get("passages")
        index._checksum = index._checksum_of(content_sha256(manifest))
        index._source = Path(dir).absolute()
        return index.to(device, search_device=search_device)

    def _checked_blocks(self, vectors: Vectors | Iterable[Vectors]) -> Iterator[Tensor]:
        return inputs.checked_blocks(vectors, self.dim, self.device)

    def _kept_blocks(
        self, vectors: Vectors | Iterable[Vectors], n: int, disk: Path | None
    ) -> Vectors | Iterable[Vectors]:
        """Return vectors that can be read twice: the rows of a generator are kept in float32."""
        if not isinstance(vectors, Iterator):
            return vectors
        room, n_found = room_for(n, self.dim, "float32", self.device, disk), 0
        for block in self._checked_blocks(vectors):
            n_found += len(block)
            if n_found > n:
                break
            room.append(block)
        inputs.check_length(n_found, n)
        return room.rows()[:, : self.dim]

    def _encoding(self, vectors: Vectors | Iterable[Vectors]) -> tuple[Codec, Iterable[Tensor]]:
        """Return the codec for new rows, and the rows as blocks."""
        blocks = self._checked_blocks(vectors)
        if self._codec.dtype != "int8" or self._n:
            return self._codec, blocks
        if (length := inputs.whole_length(vectors)) is not None:
            vectors = self._kept_blocks(vectors, length, None)
            blocks = self._checked_blocks(vectors)
            sample = list(itertools.islice(self._checked_blocks(vectors), 1))
            measured: Iterable[Tensor] = self._checked_blocks(vectors)
        else:
            sample, n = [], 0
            for block in blocks:
                sample.append(block)
                n += len(block)
                if n >= SAMPLE_ROWS:
                    break
            measured, blocks = sample, itertools.chain(sample, blocks)
        return codec.fit_int8(measured) if sample else self._codec, blocks

    def _topk(self, query: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._host_search is not None:
            return self._host_search.search(
                query, self.index_emb, k, exclude, **self._codec.arguments
            )
        rows = self.index_emb
        # Not asked for a small index, whose search takes no longer than asking.
        wanted = self._codes.wanted
        if wanted or (wanted is None and rows.numel() >= row_codes.LEAST_NUMBERS):
            made = self._codes.for_search(query, rows, k)
            if made is not None:
                return made.search(query, k, exclude)
        return functional.mips_topk(query, rows, k, exclude=exclude, **self._codec.arguments)

    def _vectors_of(self, rows: Tensor) -> Tensor:
        return self._codec.decode(self.index_emb[rows])

    def _stored_blocks(self) -> Iterator[Tensor]:
        n_rows = max(1, inputs.BLOCK_BYTES // (self.dim * self._data.itemsize))
        return iter(self.index_emb.split(n_rows)) if self._n else iter(())

    def _reserve(self, n: int, *, keep: int) -> None:
        """Allocate memory for at least n rows if needed and copy the first `keep` rows into it."""
        capacity = self._data.shape[0]
        if n <= capacity and not self._mapped:
            return
        room = max(n, 2 * capacity) if n > capacity else n
        grown = codec.allocate(room, self.dim, self._codec.dtype, self.device)
        grown[:keep, : self.dim] = self._data[:keep, : self.dim]
        with self._lock.write():
            self._data, self._mapped = grown, None
            self._codes.move(self.index_emb)

    def _known_checksum(self) -> str:
        """Return the checksum, which is computed once. The caller holds the lock."""
        if self._checksum is None:
            self._checksum = self._checksum_of(self._content_sha256())
        return self._checksum

    def _content_sha256(self) -> str:
        sha = hashlib.sha256()
        for block in self._stored_blocks():
            sha.update(bytes_of(block))
        return sha.hexdigest()

    def _checksum_of(self, vectors_sha256: str) -> str:
        removed = hashlib.sha256(self._removed_rows().tobytes()).hexdigest()
        parts = [self.dim, self._codec.dtype, self._n, vectors_sha256, removed]
        for factor in self._codec.arguments.values():
            parts.append(hashlib.sha256(factor.cpu().numpy().tobytes()).hexdigest())
        return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:32]
