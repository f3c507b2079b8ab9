"""All calls into faiss, whose errors are turned into messages that name the factory.

faiss has a class for each kind of index, and an index may wrap another one (OPQ before an IVF, or a
refining index after it). The functions below descend to the index that they are about.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fastrag.messages import shown

# faiss warns if it is trained on fewer than 39 vectors for each list.
_ROWS_PER_LIST = 40
_TRAINING_ROWS = 32768
# The only size of the blocks of a fast scan from which faiss reconstructs rows.
_BLOCK_OF_FAST_SCAN = 32


def load() -> Any:
    """Import faiss.

    Raises:
        ImportError: faiss, or a library that it loads, is not installed; the message says how to
            install it.
    """
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu: RuntimeError without CUDA's libraries
        raise ImportError(
            "FaissIndex needs faiss: pip install 'fastrag-torch[faiss]', or [faiss-gpu] instead of "
            f"[faiss]; the import says: {error}"
        ) from error
    return faiss


@contextlib.contextmanager
def faiss_errors(expected: str) -> Iterator[None]:
    """Turn a RuntimeError of faiss into a ValueError that says what was expected."""
    try:
        yield
    except RuntimeError as error:
        # "Error in <function> at <file>:<line>: Error: '<condition>' failed: <reason>"
        text = " ".join(str(error).split())
        reason = text.rpartition("failed: ")[2].rpartition("Error: ")[2]
        raise ValueError(f"{expected}, got from faiss: {reason or text}") from error


def make(dim: int, factory: str, parameters: str | None) -> Any:
    """Make an empty index that searches by inner product.

    Raises:
        ValueError: faiss does not know the factory or a parameter, or the two do not fit together.
        ImportError: faiss is not installed.
    """
    faiss = load()
    if not isinstance(factory, str):
        raise ValueError(f"factory: expected a string such as 'IVF4096,PQ64', got {shown(factory)}")
    with faiss_errors(
        f"factory: expected one that faiss can build for width {dim}: {shown(factory)}"
    ):
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIDMap):
        raise ValueError(f"factory: expected rows numbered as they are added, got {shown(factory)}")
    check_kept(index, factory)
    with faiss_errors(f"factory: expected one that faiss can copy: {shown(factory)}"):
        clone(index)
    set_parameters(index, factory, parameters)
    return index


def set_parameters(index: Any, factory: str, parameters: str | None) -> None:
    """Tells an index how to search; None leaves it as it is.

    Raises:
        ValueError: faiss does not know a parameter.
    """
    if parameters:
        with faiss_errors(f"parameters: expected those of {shown(factory)}: {shown(parameters)}"):
            load().ParameterSpace().set_index_parameters(index, parameters)


def check_kept(index: Any, factory: str) -> None:
    """Check that faiss can reconstruct the rows of an index.

    For some classes, reconstruction returns unrelated numbers or ends the process.

    Raises:
        ValueError: faiss cannot reconstruct the rows.
    """
    faiss = load()
    if isinstance(index, faiss.IndexPreTransform):
        check_kept(faiss.downcast_index(index.index), factory)
    elif isinstance(index, faiss.IndexRefine):
        check_kept(faiss.downcast_index(index.refine_index), factory)
    elif isinstance(index, faiss.IndexIVFFastScan | faiss.IndexIVFFlatDedup):
        raise ValueError(
            f"factory: expected one whose rows faiss can reconstruct, got {factory!r}, of which it "
            f"searches an {type(index).__name__}; {factory + ',RFlat'!r} keeps the rows as well"
        )
    elif isinstance(index, faiss.IndexFastScan) and index.bbs != _BLOCK_OF_FAST_SCAN:
        raise ValueError(
            f"factory: expected one whose rows faiss can reconstruct, got {factory!r}, a fast scan "
            f"in blocks of {index.bbs} rows; {_BLOCK_OF_FAST_SCAN} is the default"
        )
    elif isinstance(index, faiss.IndexLattice):
        raise ValueError(
            f"factory: expected one whose rows faiss can save, got {factory!r}, a lattice"
        )
    elif isinstance(index, faiss.IndexIVF):
        check_kept(faiss.downcast_index(index.quantizer), factory)  # holds the lists' centroids


def clone(index: Any) -> Any:
    """Return a copy that shares no memory."""
    return load().clone_index(index)


def training_rows(index: Any) -> int:
    """Return a number of vectors that is enough for training."""
    ivf = load().try_extract_index_ivf(index)
    return max(_TRAINING_ROWS, 0 if ivf is None else _ROWS_PER_LIST * ivf.nlist)


def train(index: Any, sample: np.ndarray[Any, Any], factory: str) -> None:
    """Train an index.

    Raises:
        ValueError: too few vectors.
    """
    with faiss_errors(f"vectors: expected enough of them to train {factory!r}, {len(sample)} came"):
        index.train(np.ascontiguousarray(sample))


def enable_lookup(index: Any) -> None:
    """Make rows accessible by their number, for which an inverted file needs a direct map."""
    faiss = load()
    if isinstance(index, faiss.IndexRefine):
        enable_lookup(faiss.downcast_index(index.base_index))
        enable_lookup(faiss.downcast_index(index.refine_index))
        return
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.direct_map.type == faiss.DirectMap.NoMap:
        ivf.make_direct_map()


def search(
    index: Any, query: np.ndarray[Any, Any], k: int, parameters: Any, factory: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and rows `[B, k]`, best first; missing hits have score -inf and row -1.

    Equal scores are sorted by row, because faiss leaves their order open.
    """
    with faiss_errors(f"search: expected {factory!r} to search for {k} rows"):
        found = index.search(np.ascontiguousarray(query), k, params=parameters)
    scores, rows = (torch.from_numpy(array) for array in found)
    scores = scores.masked_fill(rows < 0, -torch.inf)
    order = rows.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return scores.gather(1, order), rows.gather(1, order)


def excluding(index: Any, exclude: np.ndarray[Any, Any], factory: str) -> Any:
    """Return search parameters that exclude rows; exclude is `[N]` bool.

    Raises:
        ValueError: faiss cannot exclude rows from a search of this kind.
    """
    faiss = load()
    bits = np.packbits(~exclude, bitorder="little")
    return _excluding(faiss, index, faiss.IDSelectorBitmap(bits), factory)


def _excluding(faiss: Any, index: Any, selector: Any, factory: str) -> Any:
    if isinstance(index, faiss.IndexPreTransform):
        inner = _excluding(faiss, faiss.downcast_index(index.index), selector, factory)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _excluding(faiss, faiss.downcast_index(index.base_index), selector, factory)
        return faiss.IndexRefineSearchParameters(base_index_params=inner, k_factor=index.k_factor)
    if isinstance(index, faiss.IndexIVFPQ):
        return faiss.IVFPQSearchParameters(
            sel=selector,
            nprobe=index.nprobe,
            max_codes=index.max_codes,
            scan_table_threshold=index.scan_table_threshold,
            polysemous_ht=index.polysemous_ht,
        )
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(
            sel=selector, nprobe=index.nprobe, max_codes=index.max_codes
        )
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return faiss.SearchParameters(sel=selector)
    raise ValueError(
        f"remove, exclude: expected a factory whose search can leave rows out (Flat, SQ, IVF, "
        f"HNSW), got {factory!r}"
    )


def check_updatable(index: Any, factory: str) -> None:
    """Check that rows can be overwritten.

    Raises:
        ValueError: faiss cannot overwrite rows of this kind of index.
    """
    faiss = load()
    if isinstance(index, faiss.IndexPreTransform):
        check_updatable(faiss.downcast_index(index.index), factory)
    elif isinstance(index, faiss.IndexRefine):
        check_updatable(faiss.downcast_index(index.base_index), factory)
        check_updatable(faiss.downcast_index(index.refine_index), factory)
    elif isinstance(index, faiss.IndexIVFFastScan) or not isinstance(
        index, faiss.IndexIVF | faiss.IndexFlatCodes
    ):
        raise ValueError(
            f"update: expected a factory whose rows can be overwritten (Flat, SQ, PQ, IVF), got "
            f"{factory!r}; `replace` builds the whole index again"
        )


def overwrite(index: Any, rows: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]) -> None:
    """Overwrite rows of an index that `check_updatable` accepts."""
    faiss = load()
    if isinstance(index, faiss.IndexPreTransform):
        for i in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(i)).apply(vectors)
        overwrite(faiss.downcast_index(index.index), rows, vectors)
    elif isinstance(index, faiss.IndexRefine):
        overwrite(faiss.downcast_index(index.base_index), rows, vectors)
        overwrite(faiss.downcast_index(index.refine_index), rows, vectors)
    elif isinstance(index, faiss.IndexIVF):
        enable_lookup(index)
        index.update_vectors(rows, vectors)
    else:
        codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
        codes.reshape(index.ntotal, index.code_size)[rows] = index.sa_encode(vectors)


def reconstruct(index: Any, rows: np.ndarray[Any, Any], factory: str) -> np.ndarray[Any, Any]:
    """Return the vectors `[n, D]` of rows as faiss reconstructs them.

    Raises:
        ValueError: faiss cannot reconstruct them.
    """
    with faiss_errors(f"vectors: expected a factory whose rows can be reconstructed: {factory!r}"):
        return np.asarray(index.reconstruct_batch(rows))


def write(index: Any, sink: Callable[[bytes], object]) -> None:
    """Pass the bytes of an index to `sink`, piece by piece."""
    faiss = load()
    faiss.write_index(index, faiss.PyCallbackIOWriter(sink))


def read(data: np.ndarray[Any, Any]) -> Any:
    """Read an index from the bytes that `write` produced, into memory of its own.

    Raises:
        ValueError: the bytes are not an index.
    """
    faiss = load()
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        piece = data[at : at + n].tobytes()
        at += len(piece)
        return piece

    with _read_errors():
        return faiss.read_index(faiss.PyCallbackIOReader(take))


def read_in_place(data: np.ndarray[Any, Any]) -> Any:
    """Read an index that uses the memory of `data`, usually a mapped file, instead of a copy.

    `data` must outlive the index, and the index must not be changed: faiss would end the process.
    faiss copies the codes of a fast scan, and a version that is too old to map copies everything.

    Raises:
        ValueError: the bytes are not an index.
    """
    faiss = load()
    if not hasattr(faiss, "ZeroCopyIOReader"):
        return read(data)
    with _read_errors():
        return faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), data.size))


def read_file(path: str | os.PathLike[str]) -> Any:
    """The index for inner products in a file of faiss.

    Raises:
        ValueError: it is not one.
    """
    faiss = load()
    with faiss_errors(f"path: expected an index that this faiss reads in {path}"):
        index = faiss.read_index(os.fspath(path))
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"path: expected an index for inner products (metric_type {faiss.METRIC_INNER_PRODUCT})"
            f" in {path}, got metric_type {index.metric_type}"
        )
    return index


def factory_of(index: Any) -> str:
    """The factory that would build such an index.

    Raises:
        ValueError: faiss cannot tell.
    """
    from faiss.contrib.factory_tools import reverse_index_factory

    try:
        return str(reverse_index_factory(index))
    except (NotImplementedError, AttributeError, KeyError) as error:
        raise ValueError(
            f"factory: expected the factory of the {type(index).__name__} in the file, which faiss "
            "cannot tell, got None"
        ) from error


def _read_errors() -> contextlib.AbstractContextManager[None]:
    return faiss_errors("expected an index that this faiss reads")


def require_gpu(device: torch.device) -> None:
    """Check that this build of faiss can use a device.

    Raises:
        ValueError: it cannot.
    """
    faiss = load()
    n_gpus = faiss.get_num_gpus()  # also defined, and 0, in a build for CPUs
    if device.type != "cuda" or (device.index or 0) >= n_gpus:
        raise ValueError(
            f"device: expected cpu, or cuda with a build of faiss for it (faiss-gpu), which finds "
            f"{n_gpus} GPUs here, got {device}"
        )


def on_gpu(index: Any, device: torch.device) -> Any:
    """Return a copy of an index on a GPU."""
    faiss = load()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
