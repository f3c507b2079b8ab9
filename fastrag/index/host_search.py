"""Search on a GPU of vectors in host memory, which each search copies to the GPU block by block.

While the GPU searches one block, the next is copied to it from page-locked memory, and the host
copies the one after that into page-locked memory. Memory: two blocks on the host, kept between
searches because locking pages takes long; on the GPU, two blocks and the workspace of the search of
one, only during a search.
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
# Tensor descriptors can read only rows that start at a multiple of 16 bytes.
_ROW_ALIGNMENT = 16


class HostSearch:
    """Search an index in host memory on a GPU, with the results of a search on the CPU.

    Searches run one after the other, because they share the page-locked memory. A copy (also
    through `copy.deepcopy`) has memory of its own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = threading.Lock()
        self._copies: Copies | None = None  # made by the first search, because it locks memory

    @classmethod
    def of(
        cls, search_device: torch.device | str | None, device: torch.device | str
    ) -> HostSearch | None:
        """Return a HostSearch for vectors on `device`; None if they are searched on `device`.

        Raises:
            ValueError: torch does not know `search_device`, or it is neither `device` nor, for
                vectors on the CPU, a GPU of this machine.
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
        """Return the results of `functional.mips_topk`.

        A call that the GPU kernels do not support runs on the CPU. `index_emb` has been read
        completely when this returns.

        Args:
            query: `[B, D]` float32, on the GPU.
            index_emb: `[N, D]` on the host, N > 0; may be mapped from a file.
            k: number of rows.
            exclude: as for `mips_topk`, on any device.
            factors: scale and offset of int8 codes, on the host.

        Returns:
            scores and rows `[B, k]`, on the GPU or on the host.
        """
        unfit = {"triton": functools.partial(unfit_for_triton, index_emb, k, exclude)}
        name = backends.choose("mips_topk", self.device, torch.float32, unfit)
        if name != "triton" or len(query) == 0:
            host = index_emb.device
            exclude = None if exclude is None else exclude.to(host)
            return functional.mips_topk(query.to(host), index_emb, k, exclude=exclude, **factors)
        from fastrag.ops import triton_mips

        moved = {name: x.to(self.device) for name, x in factors.items()}
        exclude = None if exclude is None else exclude.to(self.device)
        with self._turn, contextlib.closing(self._blocks(index_emb)) as blocks:
            return triton_mips.search_blocks(query, blocks, k, exclude, **moved)

    def _blocks(self, index_emb: Tensor) -> Generator[tuple[slice, Tensor], None, None]:
        """Yield blocks of rows on the GPU; a block is valid until the next one is requested."""
        self._copies = copies = self._copies or Copies(self.device)
        n, dim = index_emb.shape
        pitch = math.ceil(dim * index_emb.itemsize / _ROW_ALIGNMENT) * _ROW_ALIGNMENT  # bytes
        parts = workspace.even_slices(n, max(1, BLOCK_BYTES // pitch))
        sizes = [pitch * (part.stop - part.start) for part in parts]
        rooms = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes[:SLOTS]]
        with copies.ordered():
            for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                slot = i % SLOTS
                staging, room = copies.staging(slot, size), rooms[slot][:size]
                _as_rows(staging, pitch, index_emb).copy_(index_emb[part])
                copies.send(slot, staging, room)
                yield part, _as_rows(room, pitch, index_emb)
                copies.searched(slot)


def _numbered(device: torch.device) -> torch.device:
    """Return the device with its number; "cuda" without a number means the current GPU."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _as_rows(memory: Tensor, pitch: int, like: Tensor) -> Tensor:
    """View bytes as rows `[n, D]` with the dtype and width of `like`, `pitch` bytes apart."""
    return memory.view(like.dtype).view(-1, pitch // like.itemsize)[:, : like.shape[1]]


def page_locked(n_bytes: int) -> Tensor:
    """Allocate host memory from which a GPU can copy asynchronously."""
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


class Copies:
    """Copy blocks of bytes to a GPU through two slots while the GPU searches earlier blocks.

    The caller gets memory from `staging` and fills it, calls `send`, launches the search of the
    block, and calls `searched`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._sent = [torch.cuda.Event() for _ in range(SLOTS)]
        self._searched = [torch.cuda.Event() for _ in range(SLOTS)]
        self._staging = [torch.empty(0, dtype=torch.uint8) for _ in range(SLOTS)]

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Run the copies of a search after all earlier work of the GPU and before all later work.

        Memory of the GPU that the search allocates may have been used, and may be used, by others.
        """
        self._stream.wait_stream(self._launches())
        try:
            yield
        finally:
            self._launches().wait_stream(self._stream)

    def staging(self, slot: int, n_bytes: int) -> Tensor:
        """Return page-locked memory of a slot after its earlier content has been sent."""
        self._sent[slot].synchronize()
        if len(self._staging[slot]) < n_bytes:
            room = 1 << (n_bytes - 1).bit_length()  # an index may grow
            self._staging[slot] = page_locked(room)
        return self._staging[slot][:n_bytes]

    def send(self, slot: int, staging: Tensor, room: Tensor) -> None:
        """Copy a slot's memory to the GPU after the earlier block in `room` has been searched."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._searched[slot])
            room.copy_(staging, non_blocking=True)
            self._sent[slot].record(self._stream)
        self._launches().wait_event(self._sent[slot])

    def searched(self, slot: int) -> None:
        """Record that all kernels that read the slot's block have been launched."""
        self._searched[slot].record(self._launches())

    def _launches(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)
