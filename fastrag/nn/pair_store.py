"""PairStore: numbers by a key of 16 bytes, in files that only grow and that a kill does not break.

    DIR/store.json       fingerprint of what made the numbers
    DIR/<i>.pairs        records: key, n, CRC-32 of both and of the numbers, n float32 numbers

A record is appended in one write. After a kill, opening finds the last whole record and cuts what
is behind it. If the files exceed their limit, the oldest is deleted.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from fastrag import folders, manifests
from fastrag.messages import shown

Numbers = npt.NDArray[np.float32]

MANIFEST = "store.json"
FORMAT = "fastrag-pairs-1"
KEY_BYTES = 16
N_FILES = 8  # among which the limit is divided
_HEAD = struct.Struct("<16sII")
_FIELDS = manifests.record({"format": manifests.one_of(FORMAT), "made_by": manifests.text()})


class PairStore:
    """Keep arrays of numbers by key on disk.

    One process at a time opens a folder. Memory: about 150 bytes per key; the numbers are read from
    the files, which the system caches.

    Args:
        dir: the folder, made if there is none.
        made_by: fingerprint of what made the numbers.
        max_bytes: limit of the files together.
        rebuild: delete numbers that something else has made, instead of refusing them.

    Raises:
        ValueError: the folder holds something else, or numbers with another fingerprint, or another
            process has opened it.

    Example:
        >>> with PairStore("runs/logp", "generator-1") as store:       # doctest: +SKIP
        ...     store.put([key], [numpy.zeros(4, numpy.float32)])
        ...     store.get(key)
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        made_by: str,
        max_bytes: int = 1 << 30,
        *,
        rebuild: bool = False,
    ) -> None:
        if max_bytes < N_FILES * _HEAD.size:
            raise ValueError(
                f"max_bytes: expected at least {N_FILES * _HEAD.size}, got {max_bytes}"
            )
        self.dir = Path(dir)
        self.made_by = made_by
        self.max_bytes = max_bytes
        self._places: dict[bytes, tuple[int, int, int]] = {}  # file, offset of the numbers, n
        self._files: dict[int, int] = {}  # number of each file -> descriptor, oldest first
        self._sizes: dict[int, int] = {}
        self._lock = folders.lock(self.dir)
        try:
            self._check(made_by, rebuild)
            for path in sorted(self.dir.glob("*.pairs")):
                self._read(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def n_bytes(self) -> int:
        """Size of the files."""
        return sum(self._sizes.values())

    def get(self, key: bytes) -> Numbers | None:
        """Return the numbers of a key, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        file, offset, n = place
        return np.frombuffer(os.pread(self._files[file], 4 * n, offset), dtype="<f4")

    def put(self, keys: Sequence[bytes], values: Sequence[Numbers]) -> None:
        """Append numbers; a key that is there gets the new ones.

        Raises:
            OSError: the disk is full, or refuses; nothing is added.
        """
        if not keys:
            return
        parts, ends = [], []
        for key, value in zip(keys, values, strict=True):
            data = np.ascontiguousarray(value, dtype="<f4").tobytes()
            n = len(data) // 4
            parts += [_HEAD.pack(key, n, _checksum(key, n, data)), data]
            ends.append((n, _HEAD.size + len(data)))
        file = self._writable()
        start = offset = self._sizes[file]
        try:
            self._write(file, b"".join(parts), start)
        except OSError:
            os.ftruncate(self._files[file], start)
            raise
        for key, (n, size) in zip(keys, ends, strict=True):
            self._places[key] = (file, offset + _HEAD.size, n)
            offset += size
        self._sizes[file] = offset
        while self.n_bytes > self.max_bytes and len(self._files) > 1:
            self._delete(next(iter(self._files)))

    def close(self) -> None:
        """Close the files, so that another process may open the folder."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files, self._sizes, self._places = {}, {}, {}
        self._lock.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # not if the constructor refused
            self.close()

    def _check(self, made_by: str, rebuild: bool) -> None:
        """Compare the fingerprint, and write it into a new folder."""
        path = self.dir / MANIFEST
        others = [each.name for each in self.dir.iterdir() if each.name != "lock"]
        if path.exists():
            found = manifests.read(path, _FIELDS)["made_by"]
            if found == made_by:
                return
            if not rebuild:
                raise ValueError(
                    f"{self.dir}: expected numbers made by {shown(made_by)}, got those of "
                    f"{shown(found)}; another folder, or rebuild=True, which deletes them"
                )
            for each in self.dir.glob("*.pairs"):
                each.unlink()
        elif others:
            raise ValueError(
                f"{self.dir}: expected an empty folder or a store, got {shown(others)}"
            )
        with folders.replacing(path) as temporary:
            manifests.write(temporary, {"format": FORMAT, "made_by": made_by})

    def _read(self, path: Path) -> None:
        """Take the keys of a file, and cut what is behind its last whole record."""
        number, data = int(path.stem), path.read_bytes()
        end = 0
        for key, offset, n in _records(data):
            self._places[key] = (number, offset, n)
            end = offset + 4 * n
        self._files[number] = os.open(path, os.O_RDWR)
        self._sizes[number] = end
        if end < len(data):
            warnings.warn(
                f"{path}: {len(data) - end} bytes behind the last whole record are cut, as after a "
                "kill",
                stacklevel=5,
            )
            os.ftruncate(self._files[number], end)

    def _writable(self) -> int:
        """Return the newest file, or a new one if that is full."""
        number = next(reversed(self._files), -1)
        if number < 0 or self._sizes[number] >= self.max_bytes // N_FILES:
            number += 1
            path = self.dir / f"{number:08d}.pairs"
            self._files[number] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._sizes[number] = 0
        return number

    def _write(self, file: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._files[file], view, offset)
            view, offset = view[n:], offset + n

    def _delete(self, number: int) -> None:
        self._places = {key: place for key, place in self._places.items() if place[0] != number}
        os.close(self._files.pop(number))
        del self._sizes[number]
        (self.dir / f"{number:08d}.pairs").unlink()


def _records(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield key, offset of the numbers and their count, as far as records are whole."""
    start = 0
    while start + _HEAD.size <= len(data):
        key, n, checksum = _HEAD.unpack_from(data, start)
        offset = start + _HEAD.size
        numbers = data[offset : offset + 4 * n]
        if len(numbers) < 4 * n or _checksum(key, n, numbers) != checksum:
            return
        yield key, offset, n
        start = offset + 4 * n


def _checksum(key: bytes, n: int, numbers: bytes) -> int:
    return zlib.crc32(numbers, zlib.crc32(struct.pack("<16sI", key, n)))
