"""Exact maximum inner product search.

    scores[b,n] = q_b . x_n;  the k largest by (score descending, row ascending)
    int8 rows are codes c of vectors x = offset + scale c, scale and offset [D]

cpp, for CPU tensors except float64, sums each product in the order of its elements
(csrc/mips/mips.h), so a score has the same bits in every search. It stores no block of scores and
reads an index of half precision without conversion.

triton, for CUDA tensors, reads the index once and keeps the best score of each group of rows
(triton_mips). Its results have the same bits as those of cpp. Small searches run in torch.

torch searches block by block and packs score and row into one key (`keys`), so that the order in
which blocks are merged does not change the result. Only the scores of one block [B, n] exist at a
time; their rounding is that of the matrix product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastrag.messages import shown
from fastrag.ops import backends, checks, keys, workspace
from fastrag.profiling import stage

backends.register(
    "mips_topk",
    cpp="fastrag.ops.cpp:mips_topk",
    triton="fastrag.ops.triton_mips:search",
    torch="fastrag.ops.mips_topk:_torch_search",
)

# The scores of a block exist once as float32 and up to three times as int64 keys.
_BYTES_PER_SCORE = 4 + 3 * 8


def check_arguments(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not fit together."""
    checks.check_floating("query_emb", query_emb, "[B, D]")
    checks.check_storage("index_emb", index_emb, scale, offset)
    checks.check_tensor("index_emb", index_emb, "[N, D]", (None, query_emb.shape[1]))
    for name, x in (("scale", scale), ("offset", offset)):
        if x is not None:
            checks.check_tensor(name, x, "[D]", (query_emb.shape[1],))
    if index_emb.shape[0] == 0:
        raise ValueError(f"index_emb: expected at least one row, got {checks.show(index_emb)}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < 2**31:
        raise ValueError(f"k: expected a whole number of at least 1, below 2**31, got {shown(k)}")
    if exclude is not None:
        checks.check_tensor("exclude", exclude)
        if exclude.dtype == torch.bool:
            checks.check_tensor("exclude", exclude, "[N]", (index_emb.shape[0],))
        else:
            checks.check_integer("exclude", exclude, "[B, E]", (query_emb.shape[0], None))
    checks.check_device(
        query_emb=query_emb, index_emb=index_emb, exclude=exclude, scale=scale, offset=offset
    )


@torch.library.custom_op(
    "fastrag::mips_topk",
    mutates_args=(),
    schema="(Tensor query_emb, Tensor index_emb, int k, Tensor? exclude, Tensor? scale=None, "
    "Tensor? offset=None) -> (Tensor, Tensor)",
)
def mips_topk(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D], index_emb [N, D] -> scores [B, k] float32, rows [B, k] int64."""
    dtype = workspace.accumulate_dtype(torch.promote_types(query_emb.dtype, index_emb.dtype))
    query = query_emb.to(dtype)
    unfit = {
        "cpp": functools.partial(backends.strided, index_emb),
        "triton": functools.partial(unfit_for_triton, index_emb, k, exclude),
    }
    backend = backends.choose("mips_topk", query.device, dtype, unfit)
    if backend == "triton":
        from fastrag.ops.triton_mips import pays

        if pays(query_emb, index_emb, k, exclude):
            query = query_emb  # the kernels convert it themselves
        else:
            backend = "torch"
    with stage("mips_topk"):
        search = backends.load("mips_topk", backend)
        return search(query, index_emb, k, exclude, scale, offset)


@mips_topk.register_fake
def _(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (query_emb.shape[0], k)
    return (
        query_emb.new_empty(shape, dtype=torch.float32),
        query_emb.new_empty(shape, dtype=torch.int64),
    )


def unfit_for_triton(index_emb: Tensor, k: int, exclude: Tensor | None) -> str:
    """Return why the search on a GPU cannot take this call; "" if it can."""
    from fastrag.ops.triton_mips import unfit

    return unfit(index_emb, k, exclude)


def _torch_search(
    query: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_finite("query_emb", query)
    best = torch.full((query.shape[0], k), keys.NOTHING, dtype=torch.int64, device=query.device)
    row_bytes = max(1, query.shape[0]) * _BYTES_PER_SCORE
    row_bytes += index_emb.shape[1] * query.dtype.itemsize
    limit = workspace.rows_per_chunk(row_bytes, query.device)
    with workspace.without_autocast(query.device):
        for part in workspace.even_slices(index_emb.shape[0], limit):
            with stage("mips_topk/scan"):
                block = _vectors(index_emb[part].to(query.dtype), scale, offset)
                found = _keys(query, block, part, exclude)
            with stage("mips_topk/choose"):
                found = found.topk(min(k, found.shape[1]), dim=1, sorted=False).values
                best = torch.cat([best, found], 1).topk(k, dim=1).values
    return keys.unpack(best)


def check_finite(name: str, values: Tensor, first_row: int = 0) -> None:
    """Check that all values [n, D] are finite; on a GPU, where reading them would wait, do nothing.

    Raises:
        ValueError: a value is not finite; the message names the first such row.
    """
    if not checks.readable(values):
        return
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        row = first_row + int(bad.nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}")


def _vectors(stored: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is None:
        return stored
    scaled = stored.mul_(scale)
    return scaled if offset is None else scaled.add_(offset)


def _keys(query: Tensor, block: Tensor, part: slice, exclude: Tensor | None) -> Tensor:
    """Return the keys [B, n] of the rows `part`; `NOTHING` if a row is excluded."""
    n = part.stop - part.start
    scores = (query @ block.t()).float()
    if checks.readable(scores) and not bool(scores.isfinite().all()):
        check_finite("index_emb", block, part.start)
        raise ValueError(
            f"index_emb: expected inner products within float32 range, got an overflow in rows "
            f"{part.start} to {part.stop - 1}"
        )
    found = keys.pack(scores, torch.arange(part.start, part.stop, device=query.device))
    if exclude is None:
        return found
    if exclude.dtype == torch.bool:
        return found.masked_fill_(exclude[part], keys.NOTHING)
    # Rows of other blocks, and -1, go to an additional last column.
    inside = (exclude >= part.start) & (exclude < part.stop)
    column = torch.where(inside, exclude - part.start, n)
    padded = torch.nn.functional.pad(found, (0, 1))
    return padded.scatter_(1, column, keys.NOTHING)[:, :n]
