"""Indexes of other projects: those of Hugging Face's RagRetriever, and DPR's passages and vectors.

No pickle is read, because reading one runs code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastrag.data import Passage, RagProcessor, read_passages
from fastrag.index import FaissIndex, FlatIndex, Index, PassageStore
from fastrag.index.vector_files import FAISS_SUFFIXES, PICKLE_HINT, load_saved_dataset
from fastrag.messages import shown

_COLUMNS = ("title", "text")


def read_hf_index(
    passages_path: str | os.PathLike[str],
    processor: RagProcessor,
    *,
    index_path: str | os.PathLike[str] | None = None,
    factory: str | None = None,
    dtype: str = "float32",
    dir: str | os.PathLike[str] | None = None,
) -> tuple[Index, PassageStore]:
    """Read what transformers' RagRetriever calls a custom index.

    Args:
        passages_path: folder of `dataset.save_to_disk`, with the columns title, text and
            embeddings.
        processor: tokenises the passages.
        index_path: file of `dataset.get_index("embeddings").save`, read as a `FaissIndex`, whose
            scores are those of the vectors in the file. None: a `FlatIndex` of the column
            embeddings.
        factory: faiss's description of the index, for example "HNSW32", where the file does not
            tell.
        dtype: how a FlatIndex stores the vectors.
        dir: write the passages there; None: keep them in memory.

    Returns:
        Index and passages, one row of the dataset each. Ids are the column id, or else row numbers;
        a pair of quotes around a title is taken off, as transformers does.

    Raises:
        ValueError: no such folder, a column is missing, vectors of several widths, an index of
            another metric than the inner product or of another length.
        ImportError: datasets, or faiss for an `index_path`, is not installed.

    Example:
        >>> index, passages = read_hf_index("my_dataset", processor)    # doctest: +SKIP
    """
    dataset = load_saved_dataset(passages_path, "passages_path")
    if index_path is None:
        if factory is not None:
            raise ValueError(f"factory: expected None without an index_path, got {shown(factory)}")
        return from_dataset(dataset, processor, dtype=dtype, dir=dir)
    _no_dtype(dtype)
    index = FaissIndex.from_file(index_path, factory)
    return _joined(index, passages_of(dataset), processor, dir=dir)


def read_dpr(
    passages: str | os.PathLike[str],
    embeddings: Any,
    processor: RagProcessor,
    *,
    dtype: str = "float32",
    dir: str | os.PathLike[str] | None = None,
) -> tuple[Index, PassageStore]:
    """Read DPR's passages and their vectors.

    Args:
        passages: file with the columns id, text and title, such as `psgs_w100.tsv`, also packed.
        embeddings: the vectors in the order of the file: arrays `[n, D]` or `.npy` files of such,
            one or several, or an index of faiss that was saved with `faiss.write_index` (`.faiss`,
            `.index`).
        processor: tokenises the passages.
        dtype: how a FlatIndex stores the vectors.
        dir: write the passages there; None: keep them in memory.

    Returns:
        Index and passages.

    Raises:
        ValueError: a file that is not as expected, a pickle among them (the message says how to
            convert it), or another number of vectors than of passages.

    Example:
        >>> index, passages = read_dpr(                                 # doctest: +SKIP
        ...     "psgs_w100.tsv.gz", ["wiki_0.npy", "wiki_1.npy"], processor, dir="passages")
    """
    if isinstance(embeddings, str | os.PathLike) and Path(embeddings).suffix in FAISS_SUFFIXES:
        _no_dtype(dtype)
        index: Index = FaissIndex.from_file(embeddings)
    else:
        blocks = _blocks(embeddings)
        flat = FlatIndex(blocks[0].shape[1], dtype)
        for block in blocks:
            flat.add(block)
        index = flat
    return _joined(index, read_passages(passages), processor, dir=dir)


def from_dataset(
    dataset: Any,
    processor: RagProcessor,
    *,
    dtype: str = "float32",
    dir: str | os.PathLike[str] | None = None,
) -> tuple[Index, PassageStore]:
    """Read a `datasets` object with the columns title, text and embeddings; see `read_hf_index`."""
    index = FlatIndex.from_datasets(dataset, dtype=dtype)
    return _joined(index, passages_of(dataset), processor, dir=dir)


def passages_of(dataset: Any) -> Iterator[Passage]:
    """Yield the passages of a `datasets` object with the columns title and text.

    Args:
        dataset: the object; its column id, or else its row number, is the id.

    Raises:
        ValueError: a column is missing, an id is missing, or a title is no text.
    """
    columns = [name for name in ("id", *_COLUMNS) if name in dataset.column_names]
    if not set(_COLUMNS) <= set(columns):
        raise ValueError(
            f"dataset: expected columns {list(_COLUMNS)}, got {shown(list(dataset.column_names))}"
        )
    for row, record in enumerate(dataset.with_format(None, columns=columns)):
        title, id = record["title"], record.get("id", row)
        if id is None or not isinstance(title, str | None):
            name, got = ("an id", "none") if id is None else ("a title", type(title).__name__)
            raise ValueError(f"dataset: row {row}: expected {name}, got {got}")
        yield Passage(
            id=str(id),
            title=(title or "").removeprefix('"').removesuffix('"'),
            text=record["text"],
        )


def _no_dtype(dtype: str) -> None:
    if dtype != "float32":
        raise ValueError(
            f"dtype: expected 'float32' with a file of faiss, which stores vectors as it is, got "
            f"{shown(dtype)}"
        )


def _joined(
    index: Index,
    passages: Iterable[Passage],
    processor: RagProcessor,
    *,
    dir: str | os.PathLike[str] | None,
) -> tuple[Index, PassageStore]:
    store = PassageStore.build(passages, processor, dir=dir)
    if len(index) != len(store):
        raise ValueError(
            f"index: expected one vector per passage, got {len(index)} vectors and {len(store)} "
            "passages"
        )
    index.passages_checksum = store.checksum()
    return index, store


def _blocks(embeddings: Any) -> list[np.ndarray[Any, Any]]:
    """Return vectors as arrays, those of a file mapped."""
    if isinstance(embeddings, str | os.PathLike) or not isinstance(embeddings, Sequence):
        embeddings = [embeddings]
    arrays = [
        _mapped(Path(each)) if isinstance(each, str | os.PathLike) else _array(each)
        for each in embeddings
    ]
    if not arrays or any(each.ndim != 2 for each in arrays):
        raise ValueError(
            f"embeddings: expected arrays [n, D], got {[list(each.shape) for each in arrays]}"
        )
    return arrays


def _array(vectors: Any) -> np.ndarray[Any, Any]:
    if isinstance(vectors, Tensor):
        return vectors.float().numpy(force=True)
    return np.asarray(vectors)


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix != ".npy":
        raise ValueError(
            f"embeddings: expected files ending in .npy, {' or '.join(FAISS_SUFFIXES)}, got "
            f"{path}; {PICKLE_HINT}"
        )
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"embeddings: expected an array [n, D] in {path}: {error}") from error
