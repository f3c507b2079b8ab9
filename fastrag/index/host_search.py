"""Vectors in host memory, searched on a GPU: they go there block by block, at every search.

While the GPU searches one block, the next is on its way from page-locked memory, and the host
copies the one after it there. Memory: two blocks on the host, kept between searches, as locking
pages takes long; two on the GPU and what the search of one needs, for as long as a search lasts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrag import functional
from fastrag.index import inputs
from fastrag.ops import backends, workspace
from fastrag.ops.mips_topk import unfit_for_triton

BLOCK_BYTES = 256 << 20
SLOTS = 2
# Rows on the GPU begin where tensor descriptors can read them.
_ROW_ALIGNMENT = 16


class HostSearch:
    """Searches an index in host memory on a GPU; the answer is that of a search on the CPU.

    Searches take turns, for they share the memory that rows pass through. A copy (also through
    `copy.deepcopy`) has memory of its own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = threading.Lock()
        self._copies: Copies | None = None  # made by the first search: a copy may never be used

    @classmethod
    def of(
        cls, search_device: torch.device | str | None, device: torch.device | str
    ) -> HostSearch | None:
        """What searches vectors on `device` elsewhere; None where they are searched in place.

        Raises:
            ValueError: `search_device` is unknown to torch, or neither where the vectors are nor,
                if these are on the CPU, a GPU of this machine.
        """
        if search_device is None:
            return None
        at = _numbered(torch.device(device))
        chosen = inputs.named_device(search_device, "search_device")
        if chosen.type == at.type and chosen.index in (None, at.index):
            return None
        if at.type != "cpu":
            raise ValueError(
                f"search_device: expected {at}, where the vectors are, got {chosen}; only vectors "
                "on the CPU are searched elsewhere"
            )
        n_gpus = torch.cuda.device_count()
        if chosen.type != "cuda" or (chosen.index or 0) >= n_gpus:
            raise ValueError(
                f"search_device: expected {at}, where the vectors are, or a CUDA device, of which "
                f"torch finds {n_gpus} here, got {chosen}"
            )
        return cls(_numbered(chosen))

    def __reduce__(self) -> tuple[Any, ...]:
        return (HostSearch, (self.device,))

    def search(
        self, query: Tensor, index_emb: Tensor, k: int, exclude: Tensor | None, **factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `functional.mips_topk`, which does what the kernels of the GPU cannot.

        All of `index_emb` has been read when it returns.

        Args:
            query: `[B, D]` float32, on the GPU.
            index_emb: `[N, D]` on the host, N > 0; may be mapped from a file.
            k: how many rows.
            exclude: as for `mips_topk`, on any device.
            factors: scale and offset of int8 codes, on the host.

        Returns:
            scores and rows `[B, k]`, on the GPU or on the host.
        """
        unfit = {"triton": functools.partial(unfit_for_triton, index_emb, k, exclude)}
        name = backends.choose("mips_topk", self.device, torch.float32, unfit)
        if name != "triton" or len(query) == 0:
            host = index_emb.device
            barred = None if exclude is None else exclude.to(host)
            return functional.mips_topk(query.to(host), index_emb, k, exclude=barred, **factors)
        from fastrag.ops import triton_mips

        moved = {name: x.to(self.device) for name, x in factors.items()}
        barred = None if exclude is None else exclude.to(self.device)
        with self._turn, contextlib.closing(self._blocks(index_emb)) as blocks:
            return triton_mips.search_blocks(query, blocks, k, barred, **moved)

    def _blocks(self, index_emb: Tensor) -> Generator[tuple[slice, Tensor], None, None]:
        """Rows of the index on the GPU, each block until the next is asked for."""
        self._copies = copies = self._copies or Copies(self.device)
        n, dim = index_emb.shape
        pitch = math.ceil(dim * index_emb.itemsize / _ROW_ALIGNMENT) * _ROW_ALIGNMENT  # bytes
        parts = workspace.even_slices(n, max(1, BLOCK_BYTES // pitch))
        sizes = [pitch * (part.stop - part.start) for part in parts]
        rooms = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes[:SLOTS]]
        with copies.beside_the_search():
            for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                slot = i % SLOTS
                staging, room = copies.staging(slot, size), rooms[slot][:size]
                _as_rows(staging, pitch, index_emb).copy_(index_emb[part])
                copies.send(slot, staging, room)
                yield part, _as_rows(room, pitch, index_emb)
                copies.searched(slot)


def _numbered(device: torch.device) -> torch.device:
    """The GPU that is current, where none is named."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _as_rows(memory: Tensor, pitch: int, like: Tensor) -> Tensor:
    """Bytes as rows `[n, D]` of the dtype and width of `like`, `pitch` bytes apart."""
    return memory.view(like.dtype).view(-1, pitch // like.itemsize)[:, : like.shape[1]]


def page_locked(n_bytes: int) -> Tensor:
    """Memory from which a GPU copies while the host does something else."""
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


class Copies:
    """Bytes that go from the host to a GPU through two slots, beside what the GPU computes.

    For each block: `staging`, which the caller fills; `send`; the launches of the caller, which
    find the block there; `searched`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]
        self._searched = [torch.cuda.Event() for _ in range(SLOTS)]
        self._staging = [torch.empty(0, dtype=torch.uint8) for _ in range(SLOTS)]

    @contextlib.contextmanager
    def beside_the_search(self) -> Iterator[None]:
        """No copy into memory that was given back before, and none after it is given back."""
        self._stream.wait_stream(self._launches())
        try:
            yield
        finally:
            self._launches().wait_stream(self._stream)

    def staging(self, slot: int, n_bytes: int) -> Tensor:
        """Page-locked memory, once all that was in it has been sent."""
        self._sent[slot].synchronize()
        if len(self._staging[slot]) < n_bytes:
            room = 1 << (n_bytes - 1).bit_length()  # an index may grow
            self._staging[slot] = page_locked(room)
        return self._staging[slot][:n_bytes]

    def send(self, slot: int, staging: Tensor, room: Tensor) -> None:
        """Copies to the GPU, once the block that was there has been searched."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._searched[slot])
            room.copy_(staging, non_blocking=True)
            self._sent[slot].record(self._stream)
        self._launches().wait_event(self._sent[slot])

    def searched(self, slot: int) -> None:
        """Whatever reads the block has been launched."""
        self._searched[slot].record(self._launches())

    def _launches(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)
