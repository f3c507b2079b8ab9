"""The folder of a searchable corpus: tokenised `passages`, and the `index` of their vectors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag import folders
from fastrag.data import Passage, RagProcessor
from fastrag.index import FaissIndex, FlatIndex, Index, PassageStore, codec, inputs
from fastrag.index.codec import Codec
from fastrag.index.encoding import EncodedBlocks
from fastrag.index.flat_files import write_flat
from fastrag.index.inputs import Vectors
from fastrag.index.passage_writer import BLOCK_ROWS
from fastrag.index.passages import FORMAT as PASSAGES_FORMAT
from fastrag.index.storage import as_value_error, check_replaceable
from fastrag.index.unfinished import Unfinished
from fastrag.index.vector_files import VectorFiles
from fastrag.messages import shown
from fastrag.ops import backends
from fastrag.train.record import INDEX_FOLDER

if TYPE_CHECKING:
    from fastrag.nn import TextEncoder

PASSAGES_FOLDER = "passages"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def build_index(
    folder: str | os.PathLike[str],
    passages: Iterable[Passage],
    encoder: TextEncoder | None,
    processor: RagProcessor,
    *,
    vectors: VectorFiles | FaissIndex | None = None,
    batch_size: int = 64,
    block_size: int = BLOCK_ROWS,
    dtype: str = "float32",
    device: str | None = None,
    origin: Mapping[str, str] | None = None,
    progress: bool = True,
) -> tuple[Index, PassageStore]:
    """Tokenise a corpus, encode it, and write `passages` and `index` into a folder.

    Both are written block by block into a hidden folder next to the target, in the memory of one
    block. If a build is interrupted or killed, the next one with the same arguments continues after
    the last finished block: it reads the corpus again and compares it with what is stored. The
    result has the same bytes.

    Args:
        folder: the folder; it appears whole, and an older index in it stays until then.
        passages: the corpus.
        encoder: the passage encoder; None if there are `vectors`.
        processor: tokenises the passages.
        vectors: the vectors of the passages, which are then not encoded (see `open_vectors`).
        batch_size: passages per encoder batch.
        block_size: passages per block, which is what a kill can lose.
        dtype: how the index stores vectors, as for FlatIndex. Scale and offset of int8 are chosen
            from all rows, which are first written to the disk in float32.
        device: where the encoder runs; None leaves it where it is.
        origin: names of the `encoder` and the `corpus`, which `fastrag index info` prints with the
            date.
        progress: show a progress bar.

    Returns:
        The index and the passages.

    Raises:
        ValueError: the corpus is empty or malformed; the folder holds something else, or another
            process is building it; an unfinished build has another corpus, encoder or settings; the
            disk is full. Finished blocks are kept.
        RuntimeError: `FASTRAG_BACKEND` names a backend that cannot run here.
    """
    out = Path(folder)
    _check_replaceable(out)
    for name, size in (("batch_size", batch_size), ("block_size", block_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if dtype not in codec.DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(codec.DTYPES)}, got {shown(dtype)}")
    backends.check_forced()  # else the first search fails, after the corpus was encoded
    task = PassageStore.task(processor) | {"dtype": dtype}
    if vectors is not None:
        task["vectors"] = _vectors_task(vectors, dtype)
    elif encoder is not None:
        task["passage encoder"] = _fingerprint(encoder)
    else:
        raise ValueError("encoder: expected a passage encoder, or vectors, got neither")
    note = {**(origin or {}), "built": datetime.now(UTC).isoformat(timespec="seconds")}
    with as_value_error(out, "a writable folder"):
        unfinished = Unfinished(out, task, note)
    with unfinished, _told(unfinished):
        store = _build_store(unfinished, passages, processor, block_size, progress)
        target = unfinished.data / INDEX_FOLDER
        if vectors is not None and len(vectors) != len(store):
            unfinished.discard()  # with these vectors it cannot be completed
            inputs.check_length(len(vectors), len(store))
        if isinstance(vectors, FaissIndex):
            vectors.passages_checksum = store.checksum()
            vectors.save(target)
        elif not target.is_dir():
            module: Any = encoder

            def blocks(start: int) -> Iterable[Vectors]:
                if vectors is not None:
                    return vectors.blocks(start, block_size)
                return EncodedBlocks(
                    module if device is None else module.to(device),
                    store,
                    batch_size,
                    block_size=block_size,
                    start=start,
                    progress=progress,
                )

            _write_index(unfinished, blocks, store, dtype, block_size)
        _check_replaceable(out)  # again: encoding takes long
        with as_value_error(out, "a writable folder"):
            unfinished.commit()
    return load_index(out)


def _vectors_task(vectors: VectorFiles | FaissIndex, dtype: str) -> str:
    if isinstance(vectors, VectorFiles):
        return vectors.fingerprint()
    if dtype != "float32":
        raise ValueError(
            f"dtype: expected 'float32' with a file of faiss, which stores vectors as it is, got "
            f"{shown(dtype)}"
        )
    return vectors.checksum()


def _build_store(
    unfinished: Unfinished,
    passages: Iterable[Passage],
    processor: RagProcessor,
    block_size: int,
    progress: bool,
) -> PassageStore:
    folder = unfinished.data / PASSAGES_FOLDER
    if folder.is_dir():  # an interrupted build finished it
        store = PassageStore.load(folder)
        store.check_same(passages, progress)
        return store
    return PassageStore.build(
        passages,
        processor,
        origin=unfinished.note,
        dir=folder,
        block_size=block_size,
        progress=progress,
    )


def _write_index(
    unfinished: Unfinished,
    blocks: Callable[[int], Iterable[Vectors]],
    store: PassageStore,
    dtype: str,
    block_size: int,
) -> None:
    n, task, stored_as = len(store), {"dtype": dtype}, Codec(dtype)
    if dtype == "int8":
        # Not in `data`: it goes when the build is complete.
        exact = unfinished.folder / "float32"
        if not exact.is_dir():
            write_flat(exact, blocks, n, stored_as=Codec("float32"), task={})
        matrix = FlatIndex.load(exact).index_emb
        stored_as = codec.fit_int8(inputs.checked_blocks(matrix, matrix.shape[1], matrix.device))

        def blocks(start: int) -> Iterable[Vectors]:
            return matrix[start:].split(block_size)

    write_flat(
        unfinished.data / INDEX_FOLDER,
        blocks,
        n,
        stored_as=stored_as,
        task=task,
        passages_checksum=store.checksum(),
    )


@contextlib.contextmanager
def _told(unfinished: Unfinished) -> Iterator[None]:
    """Add to the error of a full disk that finished blocks are kept."""
    try:
        yield
    except ValueError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
        if full and unfinished.has_blocks():
            raise ValueError(
                f"{error}; finished blocks are kept in {unfinished.folder}, and the next build "
                "continues after them"
            ) from error
        raise


def _fingerprint(encoder: Any) -> str:
    """Return a digest of the modules and weights of an encoder."""
    modules = re.sub(r"\b0x[0-9a-f]+", "", repr(encoder))  # an address differs in each process
    sha = hashlib.sha256(modules.encode("utf-8"))
    for name, tensor in encoder.state_dict().items():
        if isinstance(tensor, Tensor):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            sha.update(data.numpy().data)
    return sha.hexdigest()[:32]


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
