"""Checks of what comes into an index, the same for every kind of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrag.messages import shown
from fastrag.ops import checks

Vectors = Tensor | np.ndarray[Any, Any]
# What is converted at a time of an array that may lie on the disk.
BLOCK_BYTES = 1 << 24


def check_dim(dim: object) -> int:
    """Returns D.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    return _count("dim", dim)


def named_device(device: torch.device | str, name: str = "device") -> torch.device:
    """What torch calls a device, which need not be here.

    Raises:
        ValueError: torch has no such name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected one of torch, got {shown(device)}") from error


def usable_device(device: torch.device | str) -> torch.device:
    """A device that can hold a tensor here.

    Raises:
        ValueError: torch has no such name, or cannot use it; its reason is told.
    """
    named = named_device(device)
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError) as error:  # the latter: a build of torch without CUDA
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that torch can use, got {named}: {why}") from error
    return named


def checked_blocks(
    vectors: Vectors | Iterable[Vectors], dim: int, device: torch.device, name: str = "vectors"
) -> Iterator[Tensor]:
    """Yields vectors as float32 blocks `[n, D]` on a device, each of at most `BLOCK_BYTES`.

    Args:
        vectors: `[n, D]`, in memory or mapped from a file, or an iterable of such blocks.
        dim: D.
        device: where the blocks go.
        name: what messages call them.

    Raises:
        ValueError: another width, not floating point, a NaN or an infinity (the row is named).
    """
    if isinstance(vectors, Tensor | np.ndarray):
        vectors = (vectors,)
    elif not isinstance(vectors, Iterable):
        raise ValueError(
            f"{name}: expected [n, D] or an iterable of blocks, got {type(vectors).__name__}"
        )
    n_rows = max(1, BLOCK_BYTES // (4 * dim))
    first_row = 0
    for given in vectors:
        _check_vectors(given, dim, name)
        for start in range(0, len(given), n_rows):
            block = _as_float32(given[start : start + n_rows], device)
            check_finite(block, first_row + start, name)
            yield block
        first_row += len(given)


def check_finite(block: Tensor, first_row: int = 0, name: str = "vectors") -> None:
    """Checks that all numbers of a block `[n, D]` are finite.

    Raises:
        ValueError: naming the first row that is not, counted from `first_row`.
    """
    # One sum instead of a mask as large as the block: it is finite only if all are, or overflows.
    if bool(block.sum().isfinite()):
        return
    finite = block.isfinite().all(dim=1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    bad = block[row][~block[row].isfinite()][0].item()
    raise ValueError(f"{name}: expected finite fp32 numbers, got {bad} in row {first_row + row}")


def whole_length(vectors: object) -> int | None:
    """Number of rows, where that is known beforehand."""
    return len(vectors) if isinstance(vectors, Tensor | np.ndarray) and vectors.ndim else None


def reject_one_shot(vectors: object, why: str, name: str = "vectors") -> None:
    """Refuses what can be walked through only once.

    Raises:
        ValueError: a generator or another iterator.
    """
    if isinstance(vectors, Iterator):
        raise ValueError(
            f"{name}: expected a tensor, an array or a list of blocks, as {why}, got a "
            f"{type(vectors).__name__}"
        )


def checked_rows(rows: Any, n: int, device: torch.device) -> Tensor:
    """Row numbers `[n]` int64 in the index, each once.

    Raises:
        ValueError: another shape or dtype, unknown or repeated rows.
    """
    try:
        rows = torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"rows: expected [n] int64, got {shown(rows)}") from error
    if rows.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    if rows.ndim != 1 or rows.dtype.is_floating_point or rows.dtype == torch.bool:
        raise ValueError(f"rows: expected [n] int64, got {list(rows.shape)} {rows.dtype}")
    rows = rows.to(device, torch.int64)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= n:
        raise ValueError(f"rows: expected 0 to {n - 1}, got {low if low < 0 else high}")
    if len(rows.unique()) != len(rows):
        values, counts = rows.unique(return_counts=True)
        raise ValueError(f"rows: expected each once, got {int(values[counts > 1][0])} again")
    return rows


def checked_whole(vectors: Vectors | Iterable[Vectors], dim: int, device: torch.device) -> Tensor:
    """All of `checked_blocks` in one `[n, D]`."""
    blocks = list(checked_blocks(vectors, dim, device))
    return torch.cat(blocks) if blocks else torch.zeros(0, dim, dtype=torch.float32, device=device)


def checked_update(rows: Tensor, vectors: Any, dim: int, device: torch.device) -> Tensor:
    """One float32 vector for each row, `[n, D]`.

    Raises:
        ValueError: as `checked_blocks`, or another number of vectors than of rows.
    """
    checked = checked_whole(vectors, dim, device)
    if len(rows) != len(checked):
        raise ValueError(
            f"vectors: expected [{len(rows)}, {dim}] for {len(rows)} rows, got "
            f"{list(checked.shape)}"
        )
    return checked


def check_length(n: int, expected: int) -> None:
    """Checks that a replacement has as many rows as the index, or is at its first row too many.

    Raises:
        ValueError: it has not.
    """
    if n != expected:
        more = " or more" if n > expected else ""
        raise ValueError(f"vectors: expected {expected} rows, got {n}{more}")


def check_query(query_emb: Any, dim: int, k: Any) -> int:
    """Checks a query `[B, D]` and how many hits it asks for, which is returned.

    Raises:
        ValueError: not floating point, another width, or k below 1.
    """
    if not isinstance(query_emb, Tensor) or not query_emb.dtype.is_floating_point:
        got = query_emb.dtype if isinstance(query_emb, Tensor) else type(query_emb).__name__
        raise ValueError(f"query_emb: expected a floating-point tensor, got {got}")
    if query_emb.ndim != 2 or query_emb.shape[1] != dim:
        raise ValueError(f"query_emb: expected [B, {dim}], got {list(query_emb.shape)}")
    return _count("k", k)


def checked_exclude(exclude: Any, n_queries: int, n: int, device: torch.device) -> Tensor:
    """Rows never to be returned: `[B, E]` int64, or `[N]` bool.

    Raises:
        ValueError: anything else.
    """
    checks.check_tensor("exclude", exclude)
    exclude = exclude.to(device)
    if exclude.dtype == torch.bool and exclude.shape == (n,):
        return exclude
    if exclude.dtype in (torch.int64, torch.int32) and (
        exclude.ndim == 2 and exclude.shape[0] == n_queries
    ):
        return exclude.to(torch.int64)
    raise ValueError(
        f"exclude: expected int64 [{n_queries}, E] or bool [{n}], got {exclude.dtype} "
        f"{list(exclude.shape)}"
    )


def drop_excluded(scores: Tensor, rows: Tensor, exclude: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keeps the first k hits whose row is not excluded; `[B, k + E]` to `[B, k]`."""
    if exclude.shape[1] == 0:
        return scores, rows
    barred = exclude.sort(dim=1).values
    at = torch.searchsorted(barred, rows).clamp(max=barred.shape[1] - 1)
    dropped = barred.gather(1, at) == rows
    order = dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    scores = scores.masked_fill(dropped, -torch.inf).gather(1, order)
    return scores, rows.masked_fill(dropped, -1).gather(1, order)


def missing(n_queries: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hits of an empty index: scores -inf, rows -1."""
    scores = torch.full((n_queries, k), -torch.inf, dtype=torch.float32, device=device)
    return scores, torch.full((n_queries, k), -1, dtype=torch.int64, device=device)


def _count(name: str, value: Any) -> int:
    """A whole number of at least 1, also one of numpy."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {shown(value)}")
    return count


def _check_vectors(vectors: Any, dim: int, name: str) -> None:
    if not isinstance(vectors, Tensor | np.ndarray):
        raise ValueError(f"{name}: expected a tensor or an array, got {type(vectors).__name__}")
    if isinstance(vectors, Tensor) and (vectors.layout != torch.strided or vectors.is_meta):
        raise ValueError(
            f"{name}: expected a dense tensor, got {vectors.layout} on {vectors.device}"
        )
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"{name}: expected [n, {dim}], got {list(vectors.shape)}")
    floating = (
        np.issubdtype(vectors.dtype, np.floating)
        if isinstance(vectors, np.ndarray)
        else vectors.dtype.is_floating_point
    )
    if not floating:
        raise ValueError(f"{name}: expected floating point, got {vectors.dtype}")


def _as_float32(block: Vectors, device: torch.device) -> Tensor:
    if isinstance(block, np.ndarray):
        # numpy converts any byte order; what does not fit becomes inf, and is refused as such.
        with np.errstate(over="ignore"):
            block = torch.from_numpy(np.array(block, dtype=np.float32))
    return block.detach().to(device, torch.float32)
