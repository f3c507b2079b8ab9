"""Checks of arguments that all kinds of index share."""

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
# Size of the blocks in which vectors are converted to float32; the array may be mapped from a file.
BLOCK_BYTES = 1 << 24
_DATASET_ROWS = 1024  # Arrow's own batches are about as large


class SizedBlocks(Iterator[Tensor]):
    """Blocks of vectors that can be read once, and the number of rows in all of them.

    Args:
        n_rows: number of rows.
        blocks: the blocks.
    """

    def __init__(self, n_rows: int, blocks: Iterator[Tensor]) -> None:
        self.n_rows = n_rows
        self._blocks = blocks

    def __next__(self) -> Tensor:
        return next(self._blocks)


def check_dim(dim: object) -> int:
    """Return the width of a vector as an int.

    Raises:
        ValueError: not an integer of at least 1.
    """
    return _count("dim", dim)


def named_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return a device by its name in torch. The machine need not have it.

    Raises:
        ValueError: torch has no such name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected one of torch, got {shown(device)}") from error


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that can hold a tensor on this machine.

    Raises:
        ValueError: torch has no such name or cannot use the device; the message states torch's
            reason.
    """
    named = named_device(device)
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that torch can use, got {named}: {why}") from error
    return named


def checked_blocks(
    vectors: Vectors | Iterable[Vectors],
    dim: int,
    device: torch.device,
    name: str = "vectors",
    first_row: int = 0,
) -> Iterator[Tensor]:
    """Yield vectors as float32 blocks `[n, D]` on a device, each of at most `BLOCK_BYTES`.

    Args:
        vectors: `[n, D]`, in memory or mapped from a file, or an iterable of such blocks.
        dim: D.
        device: device of the blocks.
        name: name of the argument in messages.
        first_row: row of the first vector, for messages.

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
    for given in vectors:
        _check_vectors(given, dim, name)
        for start in range(0, len(given), n_rows):
            block = _as_float32(given[start : start + n_rows], device)
            check_finite(block, first_row + start, name)
            yield block
        first_row += len(given)


def column_blocks(dataset: Any, column: str) -> Iterator[np.ndarray[Any, Any]]:
    """Yields a column of vectors of a `datasets` object as arrays `[n, D]`.

    Args:
        dataset: the object.
        column: name of the column.

    Raises:
        ValueError: cells that are not vectors of one width (the first row of the block is named).
    """
    numbers = dataset.with_format("numpy", columns=[column])
    for start in range(0, len(dataset), _DATASET_ROWS):
        stop = min(start + _DATASET_ROWS, len(dataset))
        try:
            vectors = numbers[start:stop][column]
        except AttributeError:  # datasets finds no array in a cell that is empty
            vectors = np.empty(0)
        if vectors.ndim != 2:
            raise ValueError(
                f"dataset: expected vectors of one width in the column {column!r}, got others in "
                f"rows {start} to {stop - 1}"
            )
        yield vectors


def check_finite(block: Tensor, first_row: int = 0, name: str = "vectors") -> None:
    """Check that all numbers of a block `[n, D]` are finite.

    Raises:
        ValueError: naming the first row that is not, counted from `first_row`.
    """
    # A sum avoids a mask as large as the block. If it is finite, so are all numbers; if it is not,
    # it may only have overflowed.
    if bool(block.sum().isfinite()):
        return
    finite = block.isfinite().all(dim=1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    bad = block[row][~block[row].isfinite()][0].item()
    raise ValueError(f"{name}: expected finite fp32 numbers, got {bad} in row {first_row + row}")


def whole_length(vectors: object) -> int | None:
    """Return the number of rows, or None if only reading an iterable of blocks would tell it."""
    if isinstance(vectors, SizedBlocks):
        return vectors.n_rows
    return len(vectors) if isinstance(vectors, Tensor | np.ndarray) and vectors.ndim else None


def checked_rows(rows: Any, n: int, device: torch.device) -> Tensor:
    """Return row numbers as a tensor `[n]` int64, checked against an index of n rows.

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
    """Return the blocks of `checked_blocks` as one tensor `[n, D]`."""
    blocks = checked_blocks(vectors, dim, device)
    if (n := whole_length(vectors)) is None:
        found = list(blocks)
        return torch.cat(found) if found else torch.zeros(0, dim, device=device)
    whole, stop = torch.empty(n, dim, dtype=torch.float32, device=device), 0
    for block in blocks:
        whole[stop : stop + len(block)] = block
        stop += len(block)
    return whole


def checked_update(rows: Tensor, vectors: Any, dim: int, device: torch.device) -> Tensor:
    """Return one float32 vector for each row, `[n, D]`.

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
    """Check that a replacement has as many rows as the index.

    Args:
        n: number of rows of the replacement, or of its blocks so far if they are already too many.
        expected: number of rows of the index.

    Raises:
        ValueError: the numbers differ.
    """
    if n != expected:
        more = " or more" if n > expected else ""
        raise ValueError(f"vectors: expected {expected} rows, got {n}{more}")


def check_query(query_emb: Any, dim: int, k: Any) -> int:
    """Check a query `[B, D]` and the number of hits; return the number as an int.

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
    """Return excluded rows on a device: `[B, E]` int64, or `[N]` bool.

    Raises:
        ValueError: another shape or dtype.
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
    """Keep the first k hits whose row is not excluded; `[B, k + E]` to `[B, k]`."""
    if exclude.shape[1] == 0:
        return scores, rows
    ordered = exclude.sort(dim=1).values
    at = torch.searchsorted(ordered, rows).clamp(max=ordered.shape[1] - 1)
    dropped = ordered.gather(1, at) == rows
    order = dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    scores = scores.masked_fill(dropped, -torch.inf).gather(1, order)
    return scores, rows.masked_fill(dropped, -1).gather(1, order)


def missing(n_queries: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the scores and rows of an empty index: -inf and -1."""
    scores = torch.full((n_queries, k), -torch.inf, dtype=torch.float32, device=device)
    return scores, torch.full((n_queries, k), -1, dtype=torch.int64, device=device)


def _count(name: str, value: Any) -> int:
    """Return an integer of at least 1, of Python or numpy, as an int."""
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
        # numpy converts any byte order. A float64 too large for float32 becomes inf, which
        # `check_finite` rejects.
        with np.errstate(over="ignore"):
            block = torch.from_numpy(np.array(block, dtype=np.float32))
    return block.detach().to(device, torch.float32)
