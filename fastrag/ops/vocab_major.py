"""Gradients of all rows from known log Z, one slice of the vocabulary after the other.

    z_s = x W_s^T                                    for each slice s of the vocabulary
    draw_s = weight (softmax(z_s) - 1[v = y])        from log Z of each row
    dW_s = draw_s^T x                                written once, in its final dtype
    dX += draw_s W_s                                 [R, H], accumulated in the dtype of the maths

The logits are computed a second time, so this needs four GEMMs. A chunk of rows needs three if the
weights of its rows are known while its logits exist. But each chunk reads and writes all of dW,
which costs more than a GEMM if the chunk has few rows, and some weights are known only after the
statistics of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.ops import workspace
from fastrag.ops.chunks import ChunkLogits, HeadGradients, add_product
from fastrag.ops.positions import Chunk
from fastrag.profiling import stage

# With fewer rows than this in a chunk, reading and writing dW for each chunk costs more than a
# fourth GEMM. On a large GPU (790 TFLOP/s, 3 TB/s) it costs 351 / rows of the time of three GEMMs.
# On a CPU, where arithmetic is slower relative to memory, both took equal time at about 10 rows.
LEAST_ROWS = {"cuda": 1024, "cpu": 12}


def is_better(n_rows: int, rows_per_chunk: int, device: torch.device) -> bool:
    """Return whether slices of the vocabulary are faster than chunks of rows for n_rows rows."""
    least = LEAST_ROWS.get(device.type, LEAST_ROWS["cpu"])
    return rows_per_chunk < min(n_rows, least)


def add_gradients(
    sums: HeadGradients,
    open_chunk: type[ChunkLogits],
    chunk: Chunk,
    log_z: Tensor,
    weight: Tensor,
    smoothing: float = 0.0,
) -> None:
    """Add the gradients of -sum_i weight_i log p~_i(y_i) over the rows of `chunk`.

    The chunk holds all rows that count. log_z [2, n] and weight [n] are as in ChunkLogits.
    """
    if not chunk.x.numel():
        return
    head = sums.head
    dx = None if sums.dhidden is None else torch.empty_like(chunk.x, dtype=head.dtype)
    # The bytes per token id: its logits, its converted weight, and its row of dW.
    row_bytes = open_chunk.row_bytes(head, 1, mixture=False) / head.n_ids
    width_bytes = head.weight.shape[1] * (head.operand_dtype.itemsize + head.dtype.itemsize)
    id_bytes = len(chunk.x) * row_bytes + width_bytes
    limit = workspace.workspace_bytes(chunk.x.device)
    room = max(limit - chunk.x.nbytes - (0 if dx is None else dx.nbytes), limit // 2)
    for part in head.vocab_slices(int(room / id_bytes)):
        _add_slice(sums, open_chunk, part, chunk, log_z, weight, smoothing, dx)
    if dx is not None:
        sums.put_rows(dx, chunk.chunk_rows)


# A function of its own, so that the logits of a slice are freed before the next slice's exist.
def _add_slice(
    sums: HeadGradients,
    open_chunk: type[ChunkLogits],
    part: slice,
    chunk: Chunk,
    log_z: Tensor,
    weight: Tensor,
    smoothing: float,
    dx: Tensor | None,
) -> None:
    head = sums.head.vocab_slice(part)
    inside = (chunk.gold >= part.start) & (chunk.gold < part.stop)
    with stage("vocab_major/logits"):
        logits = open_chunk(head, chunk.x, torch.where(inside, chunk.gold - part.start, -1))
    with stage("vocab_major/gradient"):
        logits.resume(log_z)
        draw = logits.gradient(weight, smoothing)
    with stage("vocab_major/products"):
        sums.add_vocab_slice(part, draw, chunk.x)
        if dx is not None:
            add_product(dx, draw, head.weight, first=part.start == 0)
