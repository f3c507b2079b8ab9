"""Encode the passages of a store into the vectors of an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastrag.index.inputs import SizedBlocks
from fastrag.index.passage_writer import BLOCK_ROWS
from fastrag.index.progress import PassageBar
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index.passages import PassageStore


class PassageEncoder(Protocol):
    """Interface of an encoder for `encode_passages`; `fastrag.nn.TextEncoder` has it."""

    training: bool

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


def encode_passages(
    encoder: PassageEncoder,
    store: PassageStore,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
    *,
    rows: Tensor | None = None,
    dim: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Encode passages of a store with the encoder in eval mode and without gradients.

    Each batch holds passages of similar length, so little is spent on padding. The training mode of
    the encoder and of each of its parts is restored, also after an exception.

    Args:
        encoder: maps `input_ids`, `attention_mask` `[B, L]` to `[B, D]`.
        store: the passages; stream `"encoder"`.
        batch_size: passages per forward pass.
        device: device of the encoder's inputs; `None`: the device of its parameters, or the CPU if
            it has none.
        progress: show a progress bar.
        rows: encode only these rows `[n]`, in this order; `None`: all rows.
        dim: required width of the vectors; `None`: any.
        on_batch: called after each batch with its number of passages.

    Returns:
        `[n, D]` fp32 on the CPU, in the order of the rows.

    Raises:
        ValueError: `batch_size` below 1, no rows, or an encoder that returns another shape.
    """
    rows = torch.arange(len(store)) if rows is None else rows.to("cpu", torch.int64)
    if rows.ndim != 1 or rows.numel() == 0:
        raise ValueError(f"rows: expected [n] with n > 0, got {list(rows.shape)}")
    with PassageBar("encode", len(rows), 0, progress) as bar:

        def count(n_passages: int, n_tokens: int) -> None:
            bar.update(n_passages, n_tokens)
            if on_batch is not None:
                on_batch(n_passages)

        return _encode(encoder, store, rows, batch_size, device, dim, count)


class EncodedBlocks(SizedBlocks):
    """The vectors of the passages of a store in row order, encoded block by block when asked for.

    Iterate once. Within a block, passages of similar length are encoded together.

    Args:
        encoder: as for `encode_passages`.
        store: the passages; stream `"encoder"`.
        batch_size: passages per forward pass.
        block_size: passages per block.
        start: first row.
        device: as for `encode_passages`.
        dim: required width of the vectors; `None`: any.
        progress: show a progress bar.

    Raises:
        ValueError: when iterated, as `encode_passages`.

    Example:
        >>> blocks = EncodedBlocks(encoder, store)              # doctest: +SKIP
        >>> index.replace(blocks)                               # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: PassageEncoder,
        store: PassageStore,
        batch_size: int = 256,
        *,
        block_size: int = BLOCK_ROWS,
        start: int = 0,
        device: torch.device | str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> None:
        def blocks() -> Iterator[Tensor]:
            n = len(store)
            with PassageBar("encode", n, start, progress) as bar:
                for first in range(start, n, block_size):
                    rows = torch.arange(first, min(first + block_size, n))
                    yield _encode(encoder, store, rows, batch_size, device, dim, bar.update)

        super().__init__(len(store) - start, blocks())


@torch.no_grad()
def _encode(
    encoder: PassageEncoder,
    store: PassageStore,
    rows: Tensor,
    batch_size: int,
    device: torch.device | str | None,
    dim: int | None,
    on_batch: Callable[[int, int], None],
) -> Tensor:
    """Encode rows `[n]`; `on_batch` is called with the passages and tokens of each batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = _device_of(encoder) if device is None else torch.device(device)
    lengths = store.lengths("encoder", rows)
    order = lengths.argsort(descending=True, stable=True)
    training = encoder.training
    # A user may hold parts of a training encoder in eval mode.
    parts = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    modes = {part: part.training for part in parts}
    encoder.eval()
    out = torch.empty(0)
    try:
        for batch in order.split(batch_size):
            with stage("refresh/gather"):
                ids, mask = encoder_inputs(store, rows[batch].to(store.device), device)
            with stage("refresh/encode"):
                vectors = encoder(ids, mask).float().cpu()
            if vectors.ndim != 2 or vectors.shape[0] != len(batch):
                raise ValueError(f"encoder: expected [{len(batch)}, D], got {list(vectors.shape)}")
            if not out.numel():
                if dim not in (None, vectors.shape[1]):
                    raise ValueError(
                        f"encoder: expected vectors of the index's width {dim}, got width "
                        f"{vectors.shape[1]}"
                    )
                out = torch.empty(len(rows), vectors.shape[1], dtype=torch.float32)
            out[batch] = vectors
            on_batch(len(batch), int(lengths[batch].sum()))
    finally:
        encoder.train(training)
        for part, mode in modes.items():
            part.training = mode
    return out


def encoder_inputs(
    store: PassageStore, rows: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask` of passages, both `[n, L]` int64, on a device."""
    ids, lengths = store.gather(rows, "encoder")
    ids, lengths = ids.to(device), lengths.to(device)
    mask = torch.arange(ids.shape[-1], device=device) < lengths[:, None]
    return ids, mask.long()


def _device_of(encoder: PassageEncoder) -> torch.device:
    if isinstance(encoder, torch.nn.Module):
        for parameter in encoder.parameters():
            return parameter.device
    return torch.device("cpu")
