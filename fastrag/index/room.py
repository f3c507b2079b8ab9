"""Room for the rows of an index that replaces another: in memory, or in a file without a name."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrag.index import codec
from fastrag.index.storage import as_tensor, as_value_error


class MemoryRoom:
    """Rows in the memory of a device.

    Args:
        n: N, number of rows.
        dim: D.
        dtype: a key of `codec.DTYPES`.
        device: the device.
    """

    def __init__(self, n: int, dim: int, dtype: str, device: torch.device) -> None:
        self._rows, self._dim, self._n = codec.allocate(n, dim, dtype, device), dim, 0

    def append(self, stored: Tensor) -> None:
        """Append stored rows `[n, D]`."""
        self._rows[self._n : self._n + len(stored), : self._dim] = stored
        self._n += len(stored)

    def rows(self) -> Tensor:
        """Return all rows `[N, pitch]`."""
        return self._rows


class FileRoom:
    """Rows in a file that has no name and vanishes with the last tensor that maps it.

    The system keeps the rows in memory as far as there is room.

    Args:
        folder: a folder on the file system for the file.
        dim: D.
        dtype: a key of `codec.DTYPES`.

    Raises:
        OSError: the folder is not writable.
    """

    def __init__(self, folder: Path, dim: int, dtype: str) -> None:
        self._folder, self._dim, self._dtype = folder, dim, dtype
        self._pitch = codec.pitch_of(dim, dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `rows`)
        self._n = 0

    def append(self, stored: Tensor) -> None:
        """Append stored rows `[n, D]`."""
        padded = torch.nn.functional.pad(stored, (0, self._pitch - self._dim))
        # Written and not mapped: a full disk is then an error and not the end of the process.
        with as_value_error(self._folder, "room for the new vectors"):
            self._file.write(codec.to_numpy(padded.contiguous()).data)
        self._n += len(stored)

    def rows(self) -> Tensor:
        """Return all rows `[N, pitch]`, mapped read-only; the room takes no more."""
        with as_value_error(self._folder, "room for the new vectors"), self._file as file:
            file.flush()
            if self._n == 0:
                return codec.allocate(0, self._dim, self._dtype, "cpu")
            shape, dtype = (self._n, self._pitch), codec.numpy_dtype(self._dtype)
            mapped = np.memmap(file, dtype, "r", shape=shape)
        # torch reads the bits of bfloat16 from int16.
        raw = mapped.view(np.int16) if self._dtype == "bfloat16" else mapped
        return as_tensor(raw).view(codec.DTYPES[self._dtype])


def room_for(
    n: int, dim: int, dtype: str, device: torch.device, folder: Path | None
) -> MemoryRoom | FileRoom:
    """Return room for N rows: in `folder` if it is given and writable, and else in memory."""
    if folder is not None:
        with contextlib.suppress(OSError):
            return FileRoom(folder, dim, dtype)
    return MemoryRoom(n, dim, dtype, device)


def room_on_disk(n: int, dim: int, folder: Path) -> Tensor:
    """Return `[N, D]` int8 to be written, in a file without a name that vanishes with the tensor.

    Raises:
        ValueError: the disk is full or not writable.
    """
    pitch = codec.pitch_of(dim, "int8")
    with (
        as_value_error(folder, "room for the codes"),
        tempfile.TemporaryFile(dir=folder) as file,
    ):
        # Written first: on a full disk, writing to what is mapped would end the process.
        left, block = n * pitch, bytes(1 << 24)
        while left:
            left -= file.write(memoryview(block)[:left])
        file.flush()
        mapped = np.memmap(file, np.int8, "r+", shape=(n, pitch))
    return as_tensor(mapped)[:, :dim]
