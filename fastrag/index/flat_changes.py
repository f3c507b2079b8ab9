"""Folder with the rows in which a FlatIndex differs from a saved one, its base.

    manifest.json    folder and checksum of the base; checksum of the index that both make together
    rows.npy         numbers of the rows, [n] int64
    vectors.npy      these rows as they are stored, [n, D]
    removed.npy      the removed rows, as in the folder of a FlatIndex

The base has to stay as it is, because loading reads it again. It is looked for at its place
relative to this folder, so that both can be moved together, and then at its absolute path.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch

from fastrag.index import codec
from fastrag.index.flat import FlatIndex
from fastrag.index.flat_files import Base
from fastrag.index.storage import FolderWriter, entry_of, read_folder
from fastrag.manifests import integer, optional, record, text

FORMAT = "fastrag.FlatIndexChanges"
VERSION = 1
_FIELDS = record(
    {
        "base": record({"folder": text(), "relative": text(), "checksum": text()}),
        "checksum": text(),
        "index_version": integer(),
        "n_clamped": integer(),
        "passages": optional(text()),
    }
)
# With more changed rows, a whole copy is not much larger and does not depend on the base.
_LARGEST_SHARE = 0.5


def save_changes(index: FlatIndex, dir: str | os.PathLike[str]) -> bool:
    """Write the rows that were updated since `index.track_changes`, if they are few.

    Args:
        index: the index.
        dir: the folder: new, empty, or one of older changes, which is replaced.

    Returns:
        Whether they were written. They were not if changes are not tracked, if rows were added or
        all were replaced since, if more than half of them changed, or (with a warning) if the base
        is not as it was.

    Raises:
        ValueError: the path holds something else or cannot be written.
    """
    with index._lock.read():
        base = index._base
        if base is None or int(base.changed.sum()) > _LARGEST_SHARE * len(index):
            return False
        found = _checksum_in(base.folder)
        if found != base.checksum:
            index._base = None
            warnings.warn(
                f"{base.folder}: expected the index as it was loaded, checksum {base.checksum}, "
                f"got {found}; checkpoints hold all vectors from now on",
                stacklevel=2,
            )
            return False
        rows = base.changed.nonzero()[:, 0]
        with FolderWriter(dir, format=FORMAT, version=VERSION) as writer:
            writer.put("rows", rows.cpu().numpy())
            writer.put("vectors", codec.to_numpy(index.index_emb[rows]))
            writer.put("removed", index._removed_rows())
            place = os.path.relpath(os.path.realpath(base.folder), os.path.realpath(dir))
            writer.commit(
                {
                    "base": {
                        "folder": str(base.folder),
                        "relative": place,
                        "checksum": base.checksum,
                    },
                    "checksum": index._known_checksum(),
                    "index_version": index.version,
                    "n_clamped": index.n_clamped,
                    "passages": index.passages_checksum,
                }
            )
    return True


def load_changes(
    dir: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    search_device: torch.device | str | None = None,
) -> FlatIndex:
    """Open the index that a folder of changes and its base make together, in memory.

    Every byte is checked. The index goes on tracking changes to the same base.

    Args:
        dir: the folder.
        device: device of the vectors.
        search_device: as for `FlatIndex`.

    Raises:
        ValueError: a file is missing, truncated, altered or newer, or the base is not as it was;
            the message names it.
    """
    dir = Path(dir).absolute()
    manifest, arrays = read_folder(
        dir, format=FORMAT, version=VERSION, fields=_FIELDS, mmap=False, verify=True
    )
    base = manifest["base"]
    folder = Path(os.path.normpath(os.path.realpath(dir) + "/" + base["relative"]))
    if (found := _checksum_in(folder)) != base["checksum"] and str(folder) != base["folder"]:
        folder = Path(base["folder"])
        found = _checksum_in(folder)
    if found != base["checksum"]:
        raise ValueError(
            f"{dir}: expected the index in {folder}, of which it holds the changes, with checksum "
            f"{base['checksum']}, got {found}"
        )
    index = FlatIndex.load(folder, mmap=False, verify=True)
    rows, vectors, removed = (
        entry_of(arrays, name, dir, FORMAT) for name in ("rows", "vectors", "removed")
    )
    dtype = codec.numpy_dtype(index._codec.dtype)
    if rows.dtype != np.int64 or rows.ndim != 1 or ((rows < 0) | (rows >= len(index))).any():
        raise ValueError(f"{dir}: rows.npy: expected int64 [n], of 0 to {len(index) - 1}")
    if vectors.dtype != dtype or vectors.shape != (len(rows), index.dim):
        raise ValueError(
            f"{dir}: vectors.npy: expected {dtype} [{len(rows)}, {index.dim}], got "
            f"{vectors.dtype} {list(vectors.shape)}"
        )
    codec.to_numpy(index.index_emb)[rows] = vectors
    if (made := index._codes.take()) is not None:
        made.update(torch.from_numpy(rows))
    index._codes.put(made)
    index._load_removed(removed, len(index), dir)
    checksum = index._checksum_of(index._content_sha256())
    if checksum != manifest["checksum"]:
        raise ValueError(
            f"{dir}: expected an index of checksum {manifest['checksum']}, got {checksum}"
        )
    changed = torch.zeros(len(index), dtype=torch.bool)
    changed[torch.from_numpy(rows)] = True
    index._base = Base(folder, base["checksum"], changed)
    index._checksum, index._source = checksum, dir
    index._version, index._n_clamped = manifest["index_version"], manifest["n_clamped"]
    index.passages_checksum = manifest["passages"]
    return index.to(device, search_device=search_device)


def _checksum_in(folder: Path) -> str:
    """Return the checksum of the FlatIndex in a folder, or why it cannot be read."""
    try:
        return FlatIndex.load(folder).checksum()
    except ValueError as error:
        return str(error)
