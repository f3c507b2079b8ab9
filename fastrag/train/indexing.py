"""The folder of a searchable corpus: tokenised `passages`, and the `index` of their vectors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fastrag import folders
from fastrag.data import Passage, RagProcessor
from fastrag.index import FlatIndex, Index, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.index.passages import FORMAT as PASSAGES_FORMAT
from fastrag.index.storage import check_replaceable
from fastrag.ops import backends
from fastrag.train.record import INDEX_FOLDER

if TYPE_CHECKING:
    from fastrag.nn import TextEncoder

PASSAGES_FOLDER = "passages"


def build_index(
    folder: str | os.PathLike[str],
    passages: Iterable[Passage],
    encoder: TextEncoder,
    processor: RagProcessor,
    *,
    batch_size: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    origin: Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[Index, PassageStore]:
    """Tokenise a corpus, encode it, and write `passages` and `index` into a folder.

    Args:
        folder: the folder; it appears whole, and an older index in it stays until then.
        passages: the corpus.
        encoder: the passage encoder.
        processor: tokenises the passages.
        batch_size: passages per encoder batch.
        dtype: how the index stores vectors, as for FlatIndex.
        device: where the encoder runs; None leaves it where it is.
        origin: names of the `encoder` and the `corpus`, which `fastrag index info` prints with the
            date.
        progress: show a progress bar.

    Returns:
        The index and the passages.

    Raises:
        ValueError: the corpus is empty or malformed, or the folder holds something else.
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run here.
    """
    out = Path(folder)
    _check_replaceable(out)
    backends.check_forced()  # else the first search fails, after the corpus was encoded
    staging = folders.begin(out)
    try:
        store = PassageStore.build(
            passages,
            processor,
            origin={**(origin or {}), "built": datetime.now(UTC).isoformat(timespec="seconds")},
            dir=staging / PASSAGES_FOLDER,
            progress=progress,
        )
        if device is not None:
            encoder.to(device)
        vectors = encode_passages(encoder, store, batch_size, progress=progress)
        index = FlatIndex(vectors.shape[1], dtype)
        index.add(vectors)
        index.passages_checksum = store.checksum()
        index.save(staging / INDEX_FOLDER)
        _check_replaceable(out)  # again: encoding takes long
        folders.commit(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return load_index(out)


def _check_replaceable(out: Path) -> None:
    """Raise unless a folder is new, empty, or holds an index and its passages and nothing else."""
    parts = {INDEX_FOLDER: Index.formats(), PASSAGES_FOLDER: (PASSAGES_FORMAT,)}
    if out.exists() and not (out.is_dir() and {each.name for each in out.iterdir()} <= set(parts)):
        raise ValueError(f"out: expected a new folder or an index to replace, {out} is neither")
    for name, formats in parts.items():
        check_replaceable(out / name, *formats)


def load_index(folder: str | os.PathLike[str], verify: bool = False) -> tuple[Index, PassageStore]:
    """Load the folder that `build_index` wrote; its index may be replaced by one of another kind.

    Args:
        folder: the folder.
        verify: check every byte against the checksums.

    Returns:
        The index and the passages.

    Raises:
        ValueError: a part is missing or damaged, or the two belong to different builds.
    """
    root = Path(folder)
    return folders.read_whole(root, lambda: _read_index(root, verify))


def _read_index(root: Path, verify: bool) -> tuple[Index, PassageStore]:
    for part in (INDEX_FOLDER, PASSAGES_FOLDER):
        if not (root / part).is_dir():
            raise ValueError(
                f"index: expected a folder from `fastrag index build`, {root / part} is missing"
            )
    index = Index.load(root / INDEX_FOLDER, verify=verify)
    store = PassageStore.load(root / PASSAGES_FOLDER, verify=verify)
    if len(index) != len(store):
        raise ValueError(
            f"{root}: expected index and passages of one length, got {len(index)} and {len(store)}"
        )
    if index.passages_checksum not in (None, store.checksum()):
        raise ValueError(
            f"{root}: expected the passages that the index was built with, checksum "
            f"{index.passages_checksum}, got {store.checksum()}"
        )
    return index, store
