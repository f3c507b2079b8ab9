"""The index: passage vectors, passage tokens, their files, and when they are refreshed."""

from fastrag.index.faiss_index import FaissIndex
from fastrag.index.flat import FlatIndex
from fastrag.index.passages import PassageStore
from fastrag.index.protocol import Index
from fastrag.index.refresh import RefreshPolicy, encode_passages
from fastrag.index.saved import open_index

__all__ = [
    "FaissIndex",
    "FlatIndex",
    "Index",
    "PassageStore",
    "RefreshPolicy",
    "encode_passages",
    "open_index",
]
