"""Gradients of all rows from known log Z, one slice of the vocabulary after the other.

    z_s = x W_s^T                                    each slice s of the words
    draw_s = weight (softmax(z_s) - 1[v = y])        from log Z of each row
    dW_s = draw_s^T x                                written once, in its final dtype
    dX += draw_s W_s                                 [R, H], accumulated in the dtype of the maths

The logits are computed a second time: four GEMMs in all, while a chunk of rows that knows its
weights as long as its logits are alive needs three. But a chunk of rows reads and writes all of dW,
which costs more than a GEMM below some number of rows; and some weights are known only after all
statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.ops import workspace
from fastrag.ops.chunks import ChunkLogits, HeadGradients, add_product
from fastrag.ops.positions import Chunk
from fastrag.profiling import stage

# Rows of a chunk below which reading and writing dW for each chunk costs more than a fourth GEMM.
# With 790 TFLOP/s and 3 TB/s, a large GPU's, it costs 351 / rows of three GEMMs; on a CPU, whose
# arithmetic is slower by more than its memory is, both ways were found equal at about 10 rows.
LEAST_ROWS = {"cuda": 1024, "cpu": 12}


def is_better(n_rows: int, rows_per_chunk: int, device: torch.device) -> bool:
    """Whether n_rows in chunks of rows would cost more than the logits a second time."""
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
    """Add the gradients of -sum_i weight_i log p~_i(y_i) over the rows of `chunk`, which are all.

    log_z [2, n] and weight [n], as in ChunkLogits.
    """
    if not chunk.x.numel():
        return
    head = sums.head
    dx = None if sums.dhidden is None else torch.empty_like(chunk.x, dtype=head.dtype)
    # The logits, and for each word the conversion of its weight and its dW.
    row_bytes = open_chunk.row_bytes(head, 1, mixture=False) / head.n_words
    width_bytes = head.weight.shape[1] * (head.operand_dtype.itemsize + head.dtype.itemsize)
    word_bytes = len(chunk.x) * row_bytes + width_bytes
    limit = workspace.workspace_bytes(chunk.x.device)
    room = max(limit - chunk.x.nbytes - (0 if dx is None else dx.nbytes), limit // 2)
    for part in head.word_slices(int(room / word_bytes)):
        _add_slice(sums, open_chunk, part, chunk, log_z, weight, smoothing, dx)
    if dx is not None:
        sums.put_rows(dx, chunk.row)


# The logits of a slice are local to one call, so that they are gone before the next slice's exist.


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
    words = sums.head.words(part)
    inside = (chunk.gold >= part.start) & (chunk.gold < part.stop)
    with stage("vocab_major/logits"):
        logits = open_chunk(words, chunk.x, torch.where(inside, chunk.gold - part.start, -1))
    with stage("vocab_major/gradient"):
        logits.resume(log_z)
        draw = logits.gradient(weight, smoothing)
    with stage("vocab_major/products"):
        sums.add_words(part, draw, chunk.x)
        if dx is not None:
            add_product(dx, draw, words.weight, first=part.start == 0)
