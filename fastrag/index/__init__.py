"""The index: passage vectors, passage tokens, their files, and when they are refreshed."""

from fastrag.index.base import Hits, Index
from fastrag.index.faiss_index import FaissIndex
from fastrag.index.flat import FlatIndex
from fastrag.index.passages import PassageStore
from fastrag.index.refresh import RefreshPolicy, encode_passages

__all__ = [
    "FaissIndex",
    "FlatIndex",
    "Hits",
    "Index",
    "PassageStore",
    "RefreshPolicy",
    "encode_passages",
]
