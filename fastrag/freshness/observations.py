"""Observations of a training step: rows, their fresh vectors and the questions, at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrag.freshness.ledger import RowLedger
from fastrag.freshness.staleness import rank_correlation

if TYPE_CHECKING:
    from fastrag.nn.retrieved import Retrieved


class Observation(NamedTuple):
    """The rows of a step.

    Attributes:
        found: rows as often as they were retrieved, `[n]` int64.
        rows: rows that were retrieved, or encoded as candidates, each once, `[m]` int64.
        fresh: vectors of `rows` that the step has encoded, `[m, D]` float32; None: it has not, or
            not as an eval pass would.
        noisy: whether it has encoded them, but not as an eval pass would.
        query_emb: question vectors of the last forward pass, `[B, D]`; None: there was no question.
        correlations: rank correlation of stored to fresh scores, one value per question.
    """

    found: Tensor
    rows: Tensor
    fresh: Tensor | None
    noisy: bool
    query_emb: Tensor | None
    correlations: Tensor


class Fresh(NamedTuple):
    """Fresh vectors and what to do with them.

    Attributes:
        rows: `[n]` int64, each once.
        vectors: `[n, D]` float32.
        step: number of optimiser steps of the weights that made them.
        write: which of them go into the index, `[n]` bool.
        drawn: which of the rows were drawn uniformly, `[n]` bool.
    """

    rows: Tensor
    vectors: Tensor
    step: int
    write: Tensor
    drawn: Tensor


class Observations:
    """Collect what the forward passes of a step retrieved.

    On CUDA, copies to the host are begun at once and awaited at the end of the step, when the
    device is past them and busy with the rest of the step.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[list[Tensor | None], Any]] = []
        self._noisy = False

    def add(self, retrieved: Retrieved, *, usable: bool) -> None:
        """Add a forward pass; `usable`: its passage vectors are those of an eval pass."""
        rows, fresh, stale = retrieved.hits.rows, retrieved.passage_emb, retrieved.hits.vectors
        encoded = rows
        if retrieved.candidates is not None:  # encoded in eval mode, the K among them
            encoded, fresh, stale = retrieved.candidates.rows, retrieved.candidates.vectors, None
        elif not usable:
            self._noisy |= fresh is not None
            fresh = None
        tensors = [rows, encoded, fresh, retrieved.query_emb, stale]
        copies = [None if each is None else _begin_copy(each.detach()) for each in tensors]
        event = None
        if rows.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(rows.device))
        self._passes.append((copies, event))

    def take(self, *, of_all_ranks: bool) -> Observation:
        """Return the observation of the step, and start a new one.

        Args:
            of_all_ranks: join those of all ranks, so that all write the same into their indexes.
        """
        passes, self._passes = self._passes, []
        noisy, self._noisy = self._noisy, False
        for _, event in passes:
            if event is not None:
                event.synchronize()
        parts = [_reduced(*copies) for copies, _ in passes]
        if of_all_ranks:
            parts = _joined(parts)
        none = torch.empty(0, dtype=torch.int64)
        found, encoded = (torch.cat([none, *(each[i] for each in parts)]) for i in (0, 1))
        rows, where = encoded.unique(return_inverse=True)
        fresh = None
        if parts and all(each[2] is not None for each in parts):
            first = torch.full((len(rows),), len(encoded)).scatter_reduce_(
                0, where, torch.arange(len(encoded)), "amin"
            )
            fresh = torch.cat([each[2] for each in parts])[first]
        correlations = torch.cat([torch.empty(0), *(each[4] for each in parts)])
        query_emb = parts[-1][3] if parts else None
        return Observation(found, rows, fresh, noisy, query_emb, correlations)


def _begin_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _reduced(rows: Any, encoded: Any, fresh: Any, query_emb: Any, stale: Any) -> list[Any]:
    """Return retrieved rows, encoded rows, their vectors, questions and rank correlations."""
    there = encoded >= 0
    query_emb, correlations = query_emb.float(), torch.empty(0)
    result = [rows[rows >= 0], encoded[there], None, query_emb, correlations]
    if fresh is None:
        return result
    fresh = fresh.float()
    found = there.any(dim=0)  # not the column of a null passage
    if stale is not None and int(found.sum()) > 1:
        scores = [torch.einsum("bd,bkd->bk", query_emb, each.float()) for each in (stale, fresh)]
        whole = there[:, found].all(dim=1)
        correlations = rank_correlation(*(each[whole][:, found] for each in scores))
    return [*result[:2], fresh[there], query_emb, correlations]


def _joined(parts: list[list[Any]]) -> list[list[Any]]:
    """Return the forward passes of all ranks."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return parts
    gathered: list[Any] = [None] * distributed.get_world_size()
    gather: Callable[..., None] = distributed.all_gather_object
    gather(gathered, parts)
    return [part for rank in gathered for part in rank]


def newest(parts: list[Fresh], ledger: RowLedger) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, vectors and steps to write: of each row the newest, unless a newer is stored."""
    rows, steps, vectors = [], [], []
    for part in sorted(parts, key=lambda each: each.step):
        write = part.write & (ledger.ages(part.step, part.rows) >= 0)
        rows.append(part.rows[write])
        steps.append(torch.full_like(rows[-1], part.step, dtype=torch.int32))
        vectors.append(part.vectors[write])
    if not rows:
        none = torch.empty(0, dtype=torch.int64)
        return none, torch.empty(0, 0), none.int()
    all_rows = torch.cat(rows)
    unique, where = all_rows.unique(return_inverse=True)
    last = torch.zeros_like(unique).scatter_reduce_(
        0, where, torch.arange(len(all_rows)), "amax", include_self=False
    )
    return unique, torch.cat(vectors)[last], torch.cat(steps)[last]
