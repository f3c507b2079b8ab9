"""Files of a FlatIndex: the stored rows, the tombstones, and what the manifest says about them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrag.index import codec, flat_codes, inputs
from fastrag.index.codec import Codec
from fastrag.index.codes import RowCodes
from fastrag.index.flat_codes import FlatCodes
from fastrag.index.inputs import Vectors
from fastrag.index.room import room_on_disk
from fastrag.index.storage import FolderWriter, as_tensor, entry_of
from fastrag.index.unfinished import ResumableWriter
from fastrag.manifests import flag, integer, one_of, optional, record, sha256, text

FORMAT = "fastrag.FlatIndex"
# 1: contiguous float32 rows. 2: any dtype, each row starts at a multiple of 64 bytes.
VERSION = 2
FIELDS = record(
    {"dim": integer(1), "dtype": one_of(*codec.DTYPES), "index_version": integer()},
    {
        "exact": one_of("stored", "float32"),  # of older folders; see `stored_dtype`
        "codes": optional(flag()),
        "row_codes": flat_codes.FIELDS,
        "count": integer(),
        "pitch": integer(1),
        "n_clamped": integer(),
        "content_sha256": sha256(),
        "passages": optional(text()),
    },
)
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Base:
    """The saved index that changes are relative to.

    Attributes:
        folder: its folder.
        checksum: its checksum.
        changed: mask of the rows that were updated since, `[N]` bool on the device of the vectors.
    """

    folder: Path
    checksum: str
    changed: Tensor


class FlatFiles:
    """Append stored rows to the folder of a FlatIndex and complete it.

    Args:
        writer: writes the folder; a `ResumableWriter` may have rows already.
        dim: D.
        codec: how the rows are stored.
    """

    def __init__(self, writer: FolderWriter, dim: int, stored_as: Codec) -> None:
        self._writer, self._dim, self._codec = writer, dim, stored_as
        self._pitch = codec.pitch_of(dim, stored_as.dtype)
        self._stream = writer.stream("vectors", codec.numpy_dtype(stored_as.dtype), (self._pitch,))
        # With padding between rows, the checksum of the file is not that of the vectors.
        self._content = hashlib.sha256() if self._pitch > dim else None
        if self._content is not None:
            kept = self._stream.rows()
            n_rows = max(1, inputs.BLOCK_BYTES // kept[:1].nbytes) if len(kept) else 1
            for start in range(0, len(kept), n_rows):
                block = np.ascontiguousarray(kept[start : start + n_rows, :dim])
                self._content.update(block.data.cast("B"))

    def append(self, stored: Tensor) -> None:
        """Append stored rows `[n, D]`."""
        if self._content is not None:
            self._content.update(bytes_of(stored))
            stored = torch.nn.functional.pad(stored, (0, self._pitch - self._dim))
        self._stream.append(codec.to_numpy(stored))

    def rows(self) -> Tensor:
        """Return the rows so far `[n, D]`, mapped from the file."""
        return as_tensor(self._stream.rows())[:, : self._dim]

    def commit(
        self, removed: np.ndarray[Any, Any], row_codes: RowCodes | None = None, **described: Any
    ) -> dict[str, Any]:
        """Write the rest and complete the folder.

        Args:
            removed: the removed rows, `[n]` int64.
            row_codes: codes of the rows to be written as well.
            described: further entries of the manifest.

        Returns:
            The manifest.
        """
        n = self._stream.n_rows
        self._writer.put("removed", removed)
        for name, array in self._codec.arguments.items():
            self._writer.put(name, array.cpu().numpy())
        if row_codes is not None:
            code_arrays, described["row_codes"] = flat_codes.arrays_of(row_codes)
            for name, x in code_arrays.items():
                self._writer.put(name, x)
        described |= {
            "dim": self._dim,
            "count": n,
            "pitch": self._pitch * codec.DTYPES[self._codec.dtype].itemsize,
        }
        if self._content is not None:
            described["content_sha256"] = self._content.hexdigest()
        return self._writer.commit(described)


def write_flat(
    dir: str | os.PathLike[str],
    blocks: Callable[[int], Iterable[Vectors]],
    n_rows: int,
    *,
    stored_as: Codec,
    task: Mapping[str, str],
    passages_checksum: str | None = None,
) -> None:
    """Write a FlatIndex of new vectors block by block, in the memory of one block.

    A write that is killed continues after its last finished block. The folder has the same bytes as
    `FlatIndex.save` writes after one `add` of all vectors.

    Args:
        dir: the folder: new, empty, or one of an older FlatIndex, which is replaced.
        blocks: returns the blocks `[n, D]` from a row on.
        n_rows: number of rows in all.
        stored_as: how the rows are stored; int8 needs scale and offset.
        task: what is written; see `Unfinished`.
        passages_checksum: see `Index`.

    Raises:
        ValueError: another number of rows, or as `FlatIndex.add` and `ResumableWriter`.
    """
    with ResumableWriter(dir, format=FORMAT, version=VERSION, task=task) as writer:
        dim, n_clamped = writer.state.get("dim", 0), writer.state.get("n_clamped", 0)
        files = FlatFiles(writer, dim, stored_as) if dim else None
        row = writer.n_rows
        for given in blocks(row) if row < n_rows else ():
            if files is None:
                dim = given.shape[-1]
                files = FlatFiles(writer, dim, stored_as)
            for block in inputs.checked_blocks(given, dim, _CPU, first_row=row):
                stored, n = stored_as.encode(block, row)
                files.append(stored)
                row += len(block)
                n_clamped += n
            if row > n_rows:
                break
            writer.end_block(row, {"dim": dim, "n_clamped": n_clamped})
        inputs.check_length(row, n_rows)
        if files is None:
            raise ValueError("vectors: expected at least one row, got none")
        row_codes = None
        if stored_as.dtype == "float32":
            # In a file, so that the memory does not grow with the index.
            room = partial(room_on_disk, row, dim, writer.folder)
            row_codes = FlatCodes(None).for_save(files.rows(), room)
        files.commit(
            np.zeros(0, dtype=np.int64),
            row_codes,
            dtype=stored_as.dtype,
            codes=None if stored_as.dtype == "float32" else False,
            index_version=1,
            n_clamped=n_clamped,
            passages=passages_checksum,
        )


def bytes_of(block: Tensor) -> memoryview:
    """Return the bytes of stored rows without the padding between rows."""
    return codec.to_numpy(block.contiguous()).data.cast("B")


def stored_dtype(manifest: dict[str, Any]) -> str:
    """Return the dtype of the stored vectors.

    A folder from before the option `codes` has the dtype int8 for float32 rows that are searched
    through codes, and the entry `exact`.
    """
    return "float32" if manifest.get("exact") == "float32" else str(manifest["dtype"])


def content_sha256(manifest: dict[str, Any]) -> str:
    """Return the saved checksum of the vectors without the padding between rows."""
    whole = manifest["files"]["vectors.npy"]["sha256"]
    return str(manifest.get("content_sha256", whole))


def check_stored(
    stored: np.ndarray[Any, Any], manifest: dict[str, Any], dir: str | os.PathLike[str]
) -> None:
    """Check that the array of a folder has the shape and dtype that its manifest states.

    Raises:
        ValueError: it has not.
    """
    dim, dtype = manifest["dim"], codec.numpy_dtype(stored_dtype(manifest))
    first = manifest["version"] == 1
    pitch = dim * dtype.itemsize if first else entry_of(manifest, "pitch", dir, FORMAT)
    count = len(stored) if first else entry_of(manifest, "count", dir, FORMAT)
    if (
        stored.dtype != dtype
        or stored.shape != (count, pitch // dtype.itemsize)
        or pitch % dtype.itemsize
        or (pitch < dim * dtype.itemsize)
    ):
        raise ValueError(
            f"{dir}: vectors.npy: expected {dtype} [{count}, {pitch / dtype.itemsize:g}] for "
            f"{manifest['dtype']} vectors of width {dim}, got {stored.dtype} {list(stored.shape)}"
        )


def factor_of(arrays: Any, name: str, dim: int, dir: str | os.PathLike[str]) -> Tensor:
    """Return scale or offset of int8 codes from the arrays of a folder.

    Raises:
        ValueError: it is missing, or of another shape or dtype.
    """
    found = entry_of(arrays, name, dir, FORMAT)
    if found.dtype != np.float32 or found.shape != (dim,):
        raise ValueError(
            f"{dir}: {name}.npy: expected float32 [{dim}], got {found.dtype} {list(found.shape)}"
        )
    return torch.from_numpy(np.array(found))
