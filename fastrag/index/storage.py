"""Folders of arrays on disk: written atomically, checked when read, no pickle.

A folder holds one `.npy` file per array and `manifest.json`: format name, format version, and for
each file its dtype, shape, size, the SHA-256 of its data, and the CRC-32 of each block of 16 MiB,
which locates damage in a file. The manifest contains its own SHA-256.

`fastrag/folders.py` describes how a folder stays whole if the process is killed. `read_folder`
restores a folder that an interrupted replacement set aside. If a folder is replaced during the
read, the old or the new one is read as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch

from fastrag import folders, manifests
from fastrag.manifests import integer, items, record, sha256, table, text
from fastrag.messages import shown

MANIFEST = "manifest.json"
# Headers have a fixed size, so that the shape of a streamed array can be written last.
_HEADER_BYTES = 128
_BLOCK_BYTES = 1 << 24
_DTYPES = [np.dtype(kind) for kind in "?bBhHiIqQefd"]
_FILE = record(
    {
        "dtype": manifests.one_of(*map(np.lib.format.dtype_to_descr, _DTYPES)),
        "shape": items(integer()),
        "bytes": integer(_HEADER_BYTES),
        "sha256": sha256(),
    },
    # older folders have no CRC-32
    {"block_bytes": integer(1), "crc32": items(text("[0-9a-f]{8}", "8 hexadecimal digits"))},
)
_FILES = table(_FILE, text(r"[\w-]+\.npy", "the name of a .npy file"))


def _header(dtype: np.dtype[Any], shape: Sequence[int]) -> bytes:
    """Return the canonical `.npy` (version 1.0) header of a C-ordered array, 128 bytes long."""
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    text = repr({**described, "shape": tuple(int(n) for n in shape)}).encode("ascii")
    n_text = _HEADER_BYTES - 10
    if len(text) >= n_text:
        raise ValueError(f"array: expected a shape that fits a {n_text}-byte header, got {shape}")
    return b"\x93NUMPY\x01\x00" + n_text.to_bytes(2, "little") + text.ljust(n_text - 1) + b"\n"


class Digests:
    """Compute the SHA-256 of a stream of bytes and the CRC-32 of each block in one pass."""

    def __init__(self, block_bytes: int | None = None) -> None:
        self._sha = hashlib.sha256()
        self._block_bytes = _BLOCK_BYTES if block_bytes is None else block_bytes
        self._room = self._block_bytes
        self._crc = 0
        self.n_bytes = 0
        self.blocks: list[str] = []

    def update(self, data: memoryview | bytes) -> None:
        """Take the next bytes."""
        self._sha.update(data)
        self.n_bytes += len(data)
        rest = memoryview(data)
        while rest:
            part, rest = rest[: self._room], rest[self._room :]
            self._crc = zlib.crc32(part, self._crc)
            self._room -= len(part)
            if self._room == 0:
                self._end_block()

    def read(self, file: BinaryIO, n_bytes: int | None = None) -> None:
        """Take the bytes of a file from its position on, until there are `n_bytes` in all."""
        while n_bytes is None or self.n_bytes < n_bytes:
            left = _BLOCK_BYTES if n_bytes is None else min(_BLOCK_BYTES, n_bytes - self.n_bytes)
            if not (data := file.read(left)):
                break
            self.update(data)

    def so_far(self) -> str:
        """Return the SHA-256 of the bytes so far; more may follow."""
        return self._sha.hexdigest()

    def sha256(self) -> str:
        """Return the SHA-256 of all bytes and add the CRC-32 of the last block to `blocks`."""
        if self._room < self._block_bytes:
            self._end_block()
        return self._sha.hexdigest()

    def _end_block(self) -> None:
        self.blocks.append(f"{self._crc:08x}")
        self._crc, self._room = 0, self._block_bytes


class ArrayStream:
    """Append blocks of rows to one `.npy` file; the whole array is never in memory.

    Args:
        path: the file.
        dtype: the array's dtype; blocks must have it.
        tail: the shape after the first dimension.
        kept: the digests of the rows that the file begins with and that stay; None: a new file.
    """

    header_bytes = _HEADER_BYTES

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        tail: tuple[int, ...] = (),
        kept: Digests | None = None,
    ) -> None:
        self._path, self._dtype, self._tail = path, dtype, tail
        self._digests = Digests() if kept is None else kept
        self._file: BinaryIO = path.open("wb" if kept is None else "r+b")
        if kept is None:
            self._file.write(b"\0" * _HEADER_BYTES)
        else:
            self._file.truncate(_HEADER_BYTES + kept.n_bytes)
            self._file.seek(0, os.SEEK_END)
        self.n_rows = 0 if kept is None else kept.n_bytes // (dtype.itemsize * math.prod(tail))

    def append(self, block: np.ndarray[Any, Any]) -> None:
        """Write rows `[n, *tail]`.

        Raises:
            ValueError: another dtype or row shape.
        """
        if block.dtype != self._dtype or block.shape[1:] != self._tail:
            raise ValueError(
                f"{self._path.name}: expected rows of {self._dtype} {list(self._tail)}, got "
                f"{block.dtype} {list(block.shape[1:])}"
            )
        if not block.size:
            self.n_rows += block.shape[0]
            return
        step = max(1, _BLOCK_BYTES // max(1, block[:1].nbytes))
        with as_value_error(self._path, "a writable file"):
            for start in range(0, block.shape[0], step):
                data = np.ascontiguousarray(block[start : start + step]).data.cast("B")
                self._file.write(data)
                self._digests.update(data)
                folders.step(f"block {self._path.stem}", self._path.parent)
        self.n_rows += block.shape[0]

    def rows(self) -> np.ndarray[Any, Any]:
        """Return the rows so far, mapped from the file."""
        shape = (self.n_rows, *self._tail)
        if 0 in shape:  # an empty file cannot be mapped
            return np.zeros(shape, dtype=self._dtype)
        self._file.flush()
        return np.memmap(self._path, self._dtype, "r", offset=_HEADER_BYTES, shape=shape)

    def sync(self) -> dict[str, Any]:
        """Force the rows so far to the disk; return their number of bytes and their SHA-256."""
        folders.flush(self._file)
        return {"bytes": self._digests.n_bytes, "sha256": self._digests.so_far()}

    def close(self) -> dict[str, Any]:
        """Write the header, flush the file to the disk, and return its manifest entry."""
        shape = (self.n_rows, *self._tail)
        n_bytes = self._file.tell()
        self._file.seek(0)
        self._file.write(_header(self._dtype, shape))
        folders.flush(self._file)
        self._file.close()
        return {
            "dtype": np.lib.format.dtype_to_descr(self._dtype),
            "shape": list(shape),
            "bytes": n_bytes,
            "sha256": self._digests.sha256(),
            "block_bytes": _BLOCK_BYTES,
            "crc32": self._digests.blocks,
        }

    def abort(self) -> None:
        """Close the file, which will be deleted."""
        with contextlib.suppress(
            OSError
        ):  # closing writes buffered bytes to a disk that may be full
            self._file.close()


class FolderWriter:
    """Write one folder atomically: a context manager after which it is unchanged without `commit`.

    Args:
        path: the folder to create or replace. An existing folder is replaced only if it is empty or
            holds the same format and no other files.
        format: format name.
        version: format version, an integer.
        holds: names of subfolders that have manifests of their own.

    Raises:
        ValueError: the path holds something else or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str,
        version: int,
        holds: Sequence[str] = (),
    ) -> None:
        self.path = Path(path).absolute()
        self._format, self._version, self._holds = format, version, holds
        self._streams: dict[str, ArrayStream] = {}
        self._done = False
        with self.writing():
            folders.recover(self.path)
            check_replaceable(self.path, format, holds=holds)
            self.folder = self._begin()

    def _begin(self) -> Path:
        """Make the folder to write into."""
        return folders.begin(self.path)

    def _replace(self) -> None:
        """Give the complete folder its name."""
        folders.commit(self.folder, self.path)

    def _leave(self) -> None:
        """Clean up at the end, complete or not."""
        if not self._done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return as_value_error(self.path, "a writable folder")

    def stream(self, name: str, dtype: Any, tail: tuple[int, ...] = ()) -> ArrayStream:
        """Open an array to append to.

        Args:
            name: name of the file without `.npy`.
            dtype: dtype of the array.
            tail: shape of the array after the first dimension.
        """
        return self._open_stream(name, dtype, tail)

    def _open_stream(
        self, name: str, dtype: Any, tail: tuple[int, ...], kept: Digests | None = None
    ) -> ArrayStream:
        file = self.folder / f"{name}.npy"
        with self.writing():
            self._streams[name] = ArrayStream(file, np.dtype(dtype), tail, kept)
        return self._streams[name]

    def put(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Write a whole array, in blocks."""
        array = np.atleast_1d(array)
        with self.writing():
            self.stream(name, array.dtype, array.shape[1:]).append(array)

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Flush all files and replace the previous folder by the new one.

        Args:
            manifest: further entries of the manifest, JSON-serialisable.

        Returns:
            The complete manifest.

        Raises:
            ValueError: the disk is full or not writable; the previous folder stays as it was.
        """
        with self.writing():
            files = {}
            for name, stream in self._streams.items():
                files[f"{name}.npy"] = stream.close()
                folders.step(f"array {name}", self.folder)
            body = manifests.sealed(
                {
                    **manifest,
                    "format": self._format,
                    "version": self._version,
                    "files": files,
                }
            )
            manifests.write(self.folder / MANIFEST, body)
            folders.step("manifest", self.folder)
            # Other files may have been added while this folder was written.
            check_replaceable(self.path, self._format, holds=self._holds)
            self._replace()
            self._done = True
        return body

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._done:
            for stream in self._streams.values():
                stream.abort()
        self._leave()


def write_folder(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write arrays and a manifest to a folder atomically.

    Args:
        path: the folder to create or replace.
        arrays: arrays by file name without `.npy`.
        manifest: entries of the manifest, JSON-serialisable, with `format` (a name) and `version`
            (an integer).

    Returns:
        The manifest as written, with a `files` entry per array.

    Raises:
        ValueError: `format` or `version` is missing, the path holds something else, or the disk is
            full or not writable; the previous folder stays as it was.
    """
    rest = dict(manifest)
    name, version = rest.pop("format", None), rest.pop("version", None)
    if not isinstance(name, str) or not isinstance(version, int):
        raise ValueError(f"manifest: expected a format name and version, got {name!r}, {version!r}")
    with FolderWriter(path, format=name, version=version) as writer:
        for key, array in arrays.items():
            writer.put(key, array)
        return writer.commit(rest)


def read_folder(
    path: str | os.PathLike[str],
    *,
    format: str,
    version: int,
    fields: manifests.Check = manifests.anything,
    mmap: bool = True,
    verify: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Read a folder that `write_folder` wrote.

    Manifest, format version, file sizes and `.npy` headers are always checked: a truncated file
    that is mapped would end the process with a bus error.

    Args:
        path: the folder.
        format: the required format name.
        version: the newest format version that the caller can read.
        fields: description of the manifest's entries besides `files`.
        mmap: map the files (read-only) instead of reading them.
        verify: also check the checksums of all files, which reads everything once.

    Returns:
        manifest, and arrays by name.

    Raises:
        ValueError: a missing, truncated or altered file, or another format; the message names the
            file.
    """
    path = Path(path)

    def read() -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        manifest = _checked_manifest(path, format, version)
        manifests.verify(path / MANIFEST, manifest, fields)
        return manifest, _open_arrays(path, manifest, mmap, verify)

    with as_value_error(path, "a readable folder"):
        found = folders.read_whole(path, read)
        folders.step("read", path)
    return found


def _open_arrays(
    path: Path, manifest: Mapping[str, Any], mmap: bool, verify: bool
) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    for file_name, entry in manifest["files"].items():
        file = path / file_name
        _check_file(file, entry)
        if verify:
            _check_data(file, entry)
        arrays[file_name.removesuffix(".npy")] = _open_array(file, entry, mmap)
    return arrays


def as_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor that shares an array's memory. Do not write to it if that is mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def entry_of(found: Mapping[str, Any], key: str, path: object, format: str) -> Any:
    """Return a required entry of a manifest or of a folder's arrays.

    Raises:
        ValueError: there is no such entry.
    """
    if key not in found:
        raise ValueError(f"{path}: expected {key!r} in a {format} folder, got {sorted(found)}")
    return found[key]


def read_manifest(path: Path, format: str) -> dict[str, Any]:
    """Return the manifest of a folder of any format and version, without checking its entries.

    Args:
        path: the folder.
        format: name of the format in messages.

    Raises:
        ValueError: there is no manifest, or it is not a JSON object.
    """
    file = path / MANIFEST
    if not path.exists():
        raise ValueError(f"{path}: expected a {format} folder, got no such folder")
    if not file.exists():
        raise ValueError(f"{path}: expected a {format} folder with {MANIFEST}, got none")
    manifest = manifests.load(file)
    if not isinstance(manifest, dict):
        raise ValueError(f"{file}: expected format {format!r}, got {type(manifest).__name__!r}")
    return manifest


def _checked_manifest(path: Path, format: str, version: int) -> dict[str, Any]:
    file = path / MANIFEST
    manifest = read_manifest(path, format)
    if manifest.get("format") != format:
        raise ValueError(f"{file}: expected format {format!r}, got {shown(manifest.get('format'))}")
    found = manifest.get("version")
    if type(found) is not int or not 1 <= found <= version:
        raise ValueError(
            f"{file}: expected format version 1 to {version}, got {shown(found)} (a newer fastrag "
            "reads newer versions)"
        )
    manifest = manifests.unsealed(file, manifest)
    manifests.verify(file, manifest, record({"files": _FILES}))
    return manifest


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    if not file.exists():
        raise ValueError(f"{file}: expected {entry['bytes']} bytes, got no such file")
    n_bytes = file.stat().st_size
    if n_bytes != entry["bytes"]:
        raise ValueError(f"{file}: expected {entry['bytes']} bytes, got {n_bytes}")
    with manifests.named(file):
        expected = _header(np.dtype(entry["dtype"]), entry["shape"])
    with file.open("rb") as opened:
        found = opened.read(_HEADER_BYTES)
    if found != expected:
        raise ValueError(
            f"{file}: expected the npy header of {entry['dtype']} {entry['shape']}, got {found!r}"
        )
    n_data = math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
    if n_bytes != _HEADER_BYTES + n_data:
        raise ValueError(
            f"{file}: expected {_HEADER_BYTES + n_data} bytes for {entry['dtype']} "
            f"{entry['shape']}, got {n_bytes}"
        )


def _check_data(file: Path, entry: Mapping[str, Any]) -> None:
    expected: Sequence[str] = entry.get("crc32", ())  # none in older folders
    size = entry.get("block_bytes", _BLOCK_BYTES)
    n_blocks = -(-(entry["bytes"] - _HEADER_BYTES) // size)
    if expected and len(expected) != n_blocks:
        raise ValueError(f"{file}: expected {n_blocks} CRC-32 of blocks, got {len(expected)}")
    digests = Digests(size if expected else None)
    with file.open("rb") as opened:
        opened.seek(_HEADER_BYTES)
        digests.read(opened)
    found = digests.sha256()
    if found != entry["sha256"]:
        places = [
            f"block {i} (bytes {_HEADER_BYTES + i * size} to "
            f"{min(_HEADER_BYTES + (i + 1) * size, entry['bytes']) - 1})"
            for i, crcs in enumerate(zip(expected, digests.blocks, strict=False))
            if crcs[0] != crcs[1]
        ]
        where = f": altered in {places[0]}" if places else ""
        where += f" and {len(places) - 1} more" if places[1:] else ""
        raise ValueError(f"{file}: expected SHA-256 {entry['sha256']}, got {found}{where}")


def _open_array(file: Path, entry: Mapping[str, Any], mmap: bool) -> np.ndarray[Any, Any]:
    dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
    if 0 in shape:  # an empty file cannot be mapped
        return np.zeros(shape, dtype=dtype)
    with file.open("rb") as opened:
        if mmap:  # numpy raises an error if the file is shorter
            return np.memmap(opened, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=shape)
        # torch, unlike numpy, allocates at multiples of 64 bytes, where the mapped data start too.
        memory = torch.empty(entry["bytes"] - _HEADER_BYTES, dtype=torch.uint8).numpy()
        opened.seek(_HEADER_BYTES)
        n_read = opened.readinto(memory.data)
        if n_read != len(memory):
            raise ValueError(
                f"{file}: expected {entry['bytes']} bytes, got {_HEADER_BYTES + n_read}"
            )
        return memory.view(dtype).reshape(shape)


def check_replaceable(path: Path, *formats: str, holds: Sequence[str] = ()) -> None:
    """Check that a folder may be replaced: it is empty, or has only files that a manifest lists.

    Args:
        path: the folder; it need not exist.
        formats: the formats that it may have.
        holds: names of subfolders that have manifests of their own.

    Raises:
        ValueError: the path is a file, has another format, or holds a file that its manifest does
            not list; the message names the file.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder to write to, got a file")
    if not any(path.iterdir()):
        return
    found = _manifest_of(path).get("format")
    if found not in formats:
        raise ValueError(
            f"{path}: expected an empty folder or a {' or '.join(formats)} one to replace, got a "
            f"folder of format {shown(found)}"
        )
    listed = {file for name in ("", *holds) for file in _listed(path / name)}
    files = {each for each in path.rglob("*") if each.is_symlink() or not each.is_dir()}
    foreign = sorted(files - listed)
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise ValueError(
            f"{path}: expected only files that its manifest lists, which are replaced, got "
            f"{foreign[0].relative_to(path)}{more}"
        )


def _manifest_of(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder, or an empty one if it is missing or damaged."""
    with contextlib.suppress(ValueError):
        return read_manifest(path, "")
    return {}


def _listed(path: Path) -> Iterator[Path]:
    """Yield the manifest of a folder and the files that it lists."""
    manifest = _manifest_of(path)
    names = [name for key in ("files", "parts") for name in _as_names(manifest.get(key))]
    yield from (path / name for name in (MANIFEST, *names) if manifest)


def _as_names(found: Any) -> list[str]:
    names = list(found) if isinstance(found, list | dict) else []
    return [name for name in names if isinstance(name, str)]


@contextlib.contextmanager
def as_value_error(path: Path, expected: str) -> Iterator[None]:
    """Turn an OSError (permission, full disk, not a folder) into a ValueError with the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: expected {expected}, got {error}") from error
