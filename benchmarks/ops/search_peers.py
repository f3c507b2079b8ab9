"""Peers of mips: exact search by inner product, k rows of a matrix for each query.

Each is a function of query_emb [B, D], index_emb [N, D] and k that returns a call, which returns
scores [B, k] and rows [B, k].

Those that run only on a GPU are written from the packages' documented signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import HALF, Call, Shape, needs

Answer = tuple[Tensor, Tensor]
Make = Callable[[Tensor, Tensor, int], Call]

# Rows of a chunk, the fastest of some sizes; on a GPU as many as have a gigabyte of scores.
CHUNK_ROWS = 65536
TILE_SCORES = 1 << 28
# faiss searches query by query if B D is below a threshold, by default 128000; with this one it
# multiplies matrices for any batch.
TUNED_THRESHOLD = 20
# provider -> levels of faiss's Panorama, which reads the dimensions of a row level by level
PANORAMA = {"panorama-8": 8, "panorama-16": 16}
MOST_TRAINING_ROWS = 65536
FAISS_QUANTIZER = {torch.bfloat16: "QT_bf16", torch.float16: "QT_fp16"}


def by_columns(query_emb: Tensor, index_emb: Tensor, k: int) -> Answer:
    """Take (X q^T).topk along its columns."""
    scores, rows = (index_emb @ query_emb.t()).topk(min(k, len(index_emb)), dim=0)
    return scores.t(), rows.t()


def by_rows(query_emb: Tensor, index_emb: Tensor, k: int) -> Answer:
    """Take (q X^T).topk along its rows."""
    return (query_emb @ index_emb.t()).topk(min(k, len(index_emb)), dim=1)


def by_rows_wide(query_emb: Tensor, index_emb: Tensor, k: int) -> Answer:
    """Take the same of scores in float32, for a GPU."""
    scores = torch.mm(query_emb.to(index_emb.dtype), index_emb.t(), out_dtype=torch.float32)
    return scores.topk(min(k, len(index_emb)), dim=1)


Top = Callable[[Tensor, Tensor, int], Answer]


def whole(top: Top) -> Make:
    return lambda query_emb, index_emb, k: lambda: top(query_emb, index_emb, k)


def chunked(top: Top, n_rows: Callable[[int], int] = lambda n_queries: CHUNK_ROWS) -> Make:
    """Search chunks of n_rows(B) rows for the best of each, and then for the best of those."""

    def make(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
        size = n_rows(len(query_emb))

        def call() -> Answer:
            found = []
            for first in range(0, len(index_emb), size):
                scores, rows = top(query_emb, index_emb[first : first + size], k)
                found.append((scores, rows + first))
            every_score, every_row = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
            scores, place = every_score.topk(k, dim=1)
            return scores, every_row.gather(1, place)

        return call

    return make


by_tiles = chunked(by_rows_wide, lambda n_queries: TILE_SCORES // n_queries)


def by_numpy(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
    import numpy as np

    query, index = query_emb.numpy(), index_emb.numpy()

    def call() -> Answer:
        scores = query @ index.T
        rows = np.argpartition(scores, -k, axis=1)[:, -k:]
        best = np.take_along_axis(scores, rows, 1)
        order = np.argsort(-best, axis=1)
        pair = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])

    return call


def faiss_flat(threshold: int | None) -> Make:
    """Build an IndexFlatIP, which copies the rows."""

    def make(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
        import faiss

        if threshold is not None:
            faiss.cvar.distance_compute_blas_threshold = threshold
        return _faiss_call(faiss.IndexFlatIP(index_emb.shape[1]), query_emb, index_emb, k)

    return make


def faiss_quantizer(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
    """Build an IndexScalarQuantizer, which stores the numbers of index_emb as they are."""
    import faiss

    kind = getattr(faiss.ScalarQuantizer, FAISS_QUANTIZER[index_emb.dtype])
    index = faiss.IndexScalarQuantizer(index_emb.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    return _faiss_call(index, query_emb, index_emb, k)


def faiss_panorama(n_levels: int) -> Make:
    """Build `PCA{D},FlatIPPanorama{n_levels}` without the mean that faiss's PCA subtracts.

    With it, the inner products are those of other vectors, and the answers wrong.
    """

    def make(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
        import faiss

        n_rows, width = index_emb.shape
        factory = f"PCA{width},FlatIPPanorama{n_levels}"
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.omp_set_num_threads(torch.get_num_threads())
        index.train(index_emb[:: -(-n_rows // MOST_TRAINING_ROWS)].numpy())
        faiss.downcast_VectorTransform(index.chain.at(0)).have_bias = False
        return _faiss_call(index, query_emb, index_emb, k)

    return make


def no_panorama() -> str:
    if reason := needs("faiss")():
        return reason
    import faiss

    return "" if hasattr(faiss, "IndexFlatIPPanorama") else "this faiss has no IndexFlatIPPanorama"


def _faiss_call(index: Any, query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    for first in range(0, len(index_emb), CHUNK_ROWS):
        index.add(index_emb[first : first + CHUNK_ROWS].float().numpy())
    query = query_emb.numpy()

    def call() -> Answer:
        scores, rows = index.search(query, k)
        return torch.from_numpy(scores), torch.from_numpy(rows)

    return call


def faiss_gpu(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
    import faiss
    import faiss.contrib.torch_utils  # lets faiss take tensors

    resources = faiss.StandardGpuResources()
    query = query_emb.to(index_emb.dtype)
    return lambda: faiss.knn_gpu(resources, query, index_emb, k, metric=faiss.METRIC_INNER_PRODUCT)


def no_faiss_gpu() -> str:
    if reason := needs("faiss")():
        return reason
    import faiss

    return "" if hasattr(faiss, "StandardGpuResources") else "this faiss is built for a CPU"


def by_usearch(query_emb: Tensor, index_emb: Tensor, k: int) -> Call:
    from usearch.index import MetricKind, search

    query, index, n_threads = query_emb.numpy(), index_emb.numpy(), torch.get_num_threads()

    def call() -> Answer:
        found = search(index, query, k, MetricKind.IP, exact=True, threads=n_threads)
        # its distance is 1 - score
        scores = torch.from_numpy(1.0 - found.distances).view(len(query), k)
        return scores, torch.from_numpy(found.keys.astype("int64")).view(len(query), k)

    return call


def no_flashlib() -> str:
    return needs("flashlib")() or "its flash_knn orders by distance, not by inner product"


def takes_all_scores(copies: int) -> Callable[[str, Shape, torch.device], tuple[int, int]]:
    """Return the memory of a search that holds the float32 scores of all rows `copies` times."""

    def memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
        n_rows, _, _, n_queries = shape
        return 0, 4 * copies * n_rows * n_queries

    return memory


def keeps_a_copy(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    n_rows, width, *_ = shape
    return (2 if mode in HALF else 4) * n_rows * width, 1 << 28
