"""The index: passage vectors, passage tokens and their files."""

from fastrag.index.base import Hits, Index
from fastrag.index.bm25 import BM25Index
from fastrag.index.encoding import encode_passages
from fastrag.index.faiss_index import FaissIndex
from fastrag.index.flat import FlatIndex
from fastrag.index.passages import PassageStore

__all__ = [
    "BM25Index",
    "FaissIndex",
    "FlatIndex",
    "Hits",
    "Index",
    "PassageStore",
    "encode_passages",
]
