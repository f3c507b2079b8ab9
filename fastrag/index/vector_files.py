"""Vectors that others made, read from their files block by block. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastrag.index.faiss_index import FaissIndex
from fastrag.index.inputs import Vectors
from fastrag.index.passage_writer import BLOCK_ROWS
from fastrag.messages import reason, shown

COLUMN = "embeddings"
FAISS_SUFFIXES = (".faiss", ".index")
_SUFFIXES = (".npy", ".safetensors", ".pt", *FAISS_SUFFIXES)
PICKLE_HINT = (
    "of a pickle of pairs that DPR wrote and you trust, `numpy.save(path, numpy.stack([vector for "
    "_, vector in pairs]))` makes one"
)


class _Part(NamedTuple):
    """The array `[n, D]` of a file, and a function that reads rows of it."""

    shape: Sequence[int]
    read: Callable[[int, int], Vectors]


class VectorFiles:
    """The rows of one or several files, one after the other.

    Args:
        paths: files `.npy` or `.pt` (a tensor), `.safetensors`, and folders of
            `dataset.save_to_disk`, in the order of the rows.
        column: name of the column of a dataset, and of the tensor in a file with several.

    Attributes:
        dim: D.

    Raises:
        ValueError: a file that is not as expected, or files of several widths.

    Example:
        >>> vectors = VectorFiles(["wiki_0.npy", "wiki_1.npy"])        # doctest: +SKIP
        >>> index = FlatIndex(vectors.dim)                              # doctest: +SKIP
        >>> index.add(vectors.blocks())                                 # doctest: +SKIP
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], column: str = COLUMN) -> None:
        self._paths = [Path(path) for path in paths]
        self._parts = [_part(path, column) for path in self._paths]
        shapes = [list(part.shape) for part in self._parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"vectors: expected arrays [n, D] of one width, got {shown(shapes)}")
        self.dim: int = int(shapes[0][1])

    def __len__(self) -> int:
        return sum(part.shape[0] for part in self._parts)

    def blocks(self, start: int = 0, block_size: int = BLOCK_ROWS) -> Iterator[Vectors]:
        """Yield blocks `[n, D]` of at most `block_size` rows, from a row on."""
        for part in self._parts:
            n = part.shape[0]
            for first in range(start, n, block_size):
                yield part.read(first, min(first + block_size, n))
            start = max(0, start - n)

    def fingerprint(self) -> str:
        """Return a digest of the sizes of the files and of the times of their last changes."""
        files = [
            each
            for path in self._paths
            for each in (sorted(path.iterdir()) if path.is_dir() else [path])
        ]
        stats = [each.stat() for each in files]
        described = json.dumps([[stat.st_size, stat.st_mtime_ns] for stat in stats])
        return hashlib.sha256(described.encode("ascii")).hexdigest()[:32]


def open_vectors(
    paths: Sequence[str | os.PathLike[str]], column: str = COLUMN
) -> VectorFiles | FaissIndex:
    """Open vectors that others made: files of vectors, or one file of faiss.

    Args:
        paths: as for `VectorFiles`, or one file that `faiss.write_index` wrote.
        column: as for `VectorFiles`.

    Raises:
        ValueError: as `VectorFiles` and `FaissIndex.from_file`.
        ImportError: faiss, or datasets, is needed and not installed.
    """
    if len(paths) == 1 and Path(paths[0]).suffix in FAISS_SUFFIXES:
        return FaissIndex.from_file(paths[0])
    return VectorFiles(paths, column)


def load_saved_dataset(path: str | os.PathLike[str], name: str) -> Any:
    """Open a folder of `dataset.save_to_disk`.

    Args:
        path: the folder.
        name: name of the argument in messages.

    Raises:
        ValueError: it is none.
        ImportError: datasets is not installed.
    """
    import datasets

    if not os.path.isdir(path):
        raise ValueError(f"{name}: expected a folder of save_to_disk, {path} is none")
    try:
        return datasets.load_from_disk(os.fspath(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # datasets reads its own files without checking them
        raise ValueError(
            f"{name}: expected a folder of save_to_disk, got {path}: {type(error).__name__}: "
            f"{error}"
        ) from error


def _part(path: Path, column: str) -> _Part:
    if os.path.isdir(path):
        return _dataset_part(path, column)
    kinds = {".npy": _npy_part, ".safetensors": _safetensors_part, ".pt": _torch_part}
    if path.suffix not in kinds:
        raise ValueError(
            f"vectors: expected files ending in {', '.join(_SUFFIXES)}, or a folder of "
            f"save_to_disk, got {path}; {PICKLE_HINT}"
        )
    try:
        return kinds[path.suffix](path, column)
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"vectors: expected an array [n, D] in {path}: {reason(error)}") from error


def _npy_part(path: Path, column: str) -> _Part:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _Part(array.shape, lambda start, stop: array[start:stop])


def _torch_part(path: Path, column: str) -> _Part:
    # weights_only admits tensors and plain values, and runs no code.
    tensor = _chosen(torch.load(path, weights_only=True, mmap=True, map_location="cpu"), column)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"expected a tensor, got {type(tensor).__name__}")
    return _Part(tensor.shape, lambda start, stop: tensor[start:stop])


def _safetensors_part(path: Path, column: str) -> _Part:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")
    found = file.get_slice(_chosen({name: name for name in file.keys()}, column))  # noqa: SIM118
    return _Part(found.get_shape(), lambda start, stop: found[start:stop])


def _dataset_part(path: Path, column: str) -> _Part:
    dataset = load_saved_dataset(path, "vectors")
    if column not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            f"vectors: expected one split with the column {shown(column)} in {path}, got "
            f"{shown(getattr(dataset, 'column_names', None))}"
        )
    rows = dataset.with_format("numpy", columns=[column])

    def read(start: int, stop: int) -> Vectors:
        vectors = rows[start:stop][column]
        if vectors.ndim != 2:
            raise ValueError(
                f"vectors: expected vectors of one width in the column {column!r}, got others in "
                f"rows {start} to {stop - 1} of {path}"
            )
        return vectors

    return _Part((len(dataset), *(read(0, 1).shape[1:] if len(dataset) else (0,))), read)


def _chosen(found: Any, column: str) -> Any:
    """Return the value itself, or of several by name the one of the column."""
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    if column not in found:
        raise ValueError(f"expected {shown(column)} or one array, got {shown(list(found))}")
    return found[column]
