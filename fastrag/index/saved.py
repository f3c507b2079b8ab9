"""Description of a saved index of any kind, and its recall against an exact search."""

from __future__ import annotations

from typing import Any

import torch

from fastrag.index import inputs
from fastrag.index.base import Index
from fastrag.index.flat import FlatIndex
from fastrag.index.passages import PassageStore
from fastrag.index.storage import read_manifest

# Keys of PassageStore.origin, which describes the store and its index; older folders have none.
ORIGIN = ("encoder", "corpus", "built")

# Number of queries in one search.
_BATCH = 64


def describe(index: Index, passages: PassageStore | None = None) -> dict[str, Any]:
    """Describe the origin, content and storage of an index that was opened and not changed.

    Args:
        index: the index.
        passages: its passages, whose `origin` states the origin of both.

    Returns:
        Plain values by name; sizes in bytes.

    Raises:
        ValueError: the index was changed or never saved.
    """
    if index.source is None:
        raise ValueError("index: expected one as it was opened, got one that was changed")
    manifest = read_manifest(index.source, "fastrag index")
    origin = dict.fromkeys(ORIGIN, "not recorded") | (passages.origin if passages else {})
    if index.version > 1 and passages and "encoder" in passages.origin:
        origin["encoder"] += " at first; the index has changed since"
    template = passages.template if passages else None
    return {
        "encoder": origin["encoder"],
        "template": template.context if template else "not recorded",
        "passage": template.passage if template else "not recorded",
        "corpus": origin["corpus"],
        "built": origin["built"],
        "kind": type(index).__name__,
        **index.settings,
        "dim": index.dim,
        "rows": len(index),
        "live": index.n_live,
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "format": f"{manifest['format']} {manifest['version']}",
        "version": index.version,
        "checksum": index.checksum(),
    }


def exact_of(index: Index) -> FlatIndex:
    """Return an exact float32 index of the vectors that an index returns for its rows."""
    exact = FlatIndex(index.dim)
    n_rows = max(1, inputs.BLOCK_BYTES // (4 * index.dim))
    exact.add(index.vectors(rows) for rows in torch.arange(len(index)).split(n_rows))
    return exact


@torch.no_grad()
def recall(
    index: Index,
    exact: Index,
    k: int = 10,
    n_queries: int = 1000,
    seed: int = 0,
) -> float:
    """Measure the share of the exact k nearest rows that a search finds.

    The queries are random vectors of `exact`. The row of a query is excluded from its results,
    because every index finds a vector that it holds.

    Args:
        index: the index to measure.
        exact: an exact index of the same rows.
        k: hits per query.
        n_queries: number of queries, at most one for each row.
        seed: seed of the random choice.

    Returns:
        A number between 0 and 1.

    Raises:
        ValueError: the two differ in rows or width, or there are not k rows besides the query's.
    """
    if (len(index), index.dim) != (len(exact), exact.dim):
        raise ValueError(
            f"exact: expected {len(index)} vectors of width {index.dim}, got {len(exact)} of width "
            f"{exact.dim}"
        )
    removed = index.removed.cpu() | exact.removed.cpu()
    live = (~removed).nonzero().flatten()
    if not 1 <= k < len(live):
        raise ValueError(f"k: expected 1 to {len(live) - 1} for {len(live)} live rows, got {k}")
    drawn = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
    n_found = n_sought = 0
    for rows in live[drawn[:n_queries]].split(_BATCH):
        query = exact.vectors(rows)
        hits = []
        for each in (index, exact):
            wide = each.search(query, k + 1, exclude=removed if bool(removed.any()) else None)
            hits.append(inputs.drop_excluded(wide.scores, wide.rows, rows[:, None], k)[1])
        same = (hits[0][:, :, None] == hits[1][:, None, :]) & (hits[1][:, None, :] >= 0)
        n_found += int(same.any(dim=1).sum())
        n_sought += hits[1].numel()
    return n_found / n_sought
