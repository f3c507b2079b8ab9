"""fastrag: end-to-end training of a retriever and a generator (Lewis et al. 2020).

Three depths of use, each complete in itself: the loss alone (`fastrag.functional`), the modules
(`RagLoss`, `RagModel`, `FlatIndex`), and whole training runs (`fastrag.train`, `fastrag train`).

Public names load on first use. ``import fastrag`` itself imports none of torch, triton and
transformers, and touches neither CUDA nor the network.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastrag import (
        data,
        eval,
        freshness,
        functional,
        generation,
        hf,
        index,
        info,
        nn,
        ops,
        profiling,
        reference,
        testing,
        train,
    )
    from fastrag.data import RagProcessor
    from fastrag.freshness import IndexRefresher, RefreshPolicy
    from fastrag.hf import patch_hf_rag, unpatch_hf_rag
    from fastrag.index import FaissIndex, FlatIndex, Hits, Index, PassageStore
    from fastrag.nn import (
        LMHead,
        PrefixCache,
        RagGeneration,
        RagLoss,
        RagModel,
        RagOutput,
        Reader,
        Retriever,
        SentenceEncoder,
        TextEncoder,
        adapt_generator,
    )

__version__ = "0.1.0"

__all__ = [
    "FaissIndex",
    "FlatIndex",
    "Hits",
    "Index",
    "IndexRefresher",
    "LMHead",
    "PassageStore",
    "PrefixCache",
    "RagGeneration",
    "RagLoss",
    "RagModel",
    "RagOutput",
    "RagProcessor",
    "Reader",
    "RefreshPolicy",
    "Retriever",
    "SentenceEncoder",
    "TextEncoder",
    "__version__",
    "adapt_generator",
    "data",
    "eval",
    "freshness",
    "functional",
    "generation",
    "hf",
    "index",
    "info",
    "nn",
    "ops",
    "patch_hf_rag",
    "profiling",
    "reference",
    "testing",
    "train",
    "unpatch_hf_rag",
]

_SUBMODULES = frozenset(
    {
        "data",
        "eval",
        "freshness",
        "functional",
        "generation",
        "hf",
        "index",
        "info",
        "nn",
        "ops",
        "profiling",
        "reference",
        "testing",
        "train",
    }
)

# public name -> the module that defines it
_LAZY = {
    "RagProcessor": "fastrag.data",
    "FaissIndex": "fastrag.index",
    "FlatIndex": "fastrag.index",
    "Hits": "fastrag.index",
    "Index": "fastrag.index",
    "PassageStore": "fastrag.index",
    "IndexRefresher": "fastrag.freshness",
    "RefreshPolicy": "fastrag.freshness",
    "LMHead": "fastrag.nn",
    "PrefixCache": "fastrag.nn",
    "RagGeneration": "fastrag.nn",
    "RagLoss": "fastrag.nn",
    "RagModel": "fastrag.nn",
    "RagOutput": "fastrag.nn",
    "Reader": "fastrag.nn",
    "Retriever": "fastrag.nn",
    "SentenceEncoder": "fastrag.nn",
    "TextEncoder": "fastrag.nn",
    "adapt_generator": "fastrag.nn",
    "patch_hf_rag": "fastrag.hf",
    "unpatch_hf_rag": "fastrag.hf",
}


def _find_kernels() -> None:
    """Make `fastrag.kernels` importable from a checkout, where it is the folder beside this one.

    An installed copy holds `fastrag/kernels` and needs nothing. The folder has no `__init__.py`,
    so that on `sys.path` it never hides a distribution called `kernels`; hence a known module is
    looked for, lest an unrelated neighbour of that name be taken for ours.
    """
    here = Path(__file__).resolve().parent
    checkout = here.parent
    if not (here / "kernels").exists() and (checkout / "kernels" / "doc_scores.py").exists():
        __path__.append(str(checkout))


_find_kernels()


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
