"""Exact maximum inner product search on a GPU: an approximate scan, then exact scores.

1. The scan (`kernels.mips`) reads the index once and keeps the best score of each group of rows.
2. The best k + `SLACK` groups are chosen; with the slack, step 4 is rarely needed.
3. The rows of these groups are scored again, in the order of summation that defines a score
   (`kernels.mips_rescore`), and the best k of them are taken.
4. If, by the proven error bound of the scan, another group may hold a better row, such groups are
   scored too. The device decides this, so the host does not wait.

The bound of step 4 needs the largest norm in the index, which takes another pass. It is kept until
torch's version counter shows a change of the index; a CUDA graph computes it at every replay. Call
`forget_norms` after a kernel outside torch has written to an index.

Memory: 4 N / group bytes for each query of a slice, within `FASTRAG_WORKSPACE_BYTES`; never scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastrag.kernels import mips as kernels
from fastrag.kernels import mips_rescore
from fastrag.kernels.mips_rescore import Passages
from fastrag.ops import backends, workspace
from fastrag.ops.keys import unpack
from fastrag.profiling import stage

# Number of groups beyond k that are chosen. TF32 has a larger error, so more groups are within it.
SLACK = 8
SLACK_FLOAT32 = 16
MAX_EXCLUDED = 256  # rows per query; each is compared with each row that is scored
# With fewer scores than this, computing and sorting all takes less time than launching a scan.
_LEAST_SCORES = 1 << 22
_TMA_CAPABILITY = (9, 0)
# Shared memory of a block that tiles read by descriptors need: 227 KiB, as on data centre GPUs.
# Consumer GPUs of compute capability 12 have descriptors but 99 KiB, enough for tiles read by
# pointers.
_TMA_SHARED = 227 << 10
# Rows of maxima wider than _WIDE are first reduced to the largest of each _BUNDLE numbers.
_WIDE, _BUNDLE = 1 << 14, 64
_KEPT_NORMS = 16


@dataclass(frozen=True)
class Plan:
    """Settings of one search. They do not affect the results if `error` is a valid bound."""

    group: int  # rows per group
    n_chosen: int  # number of groups that are always scored
    tile: kernels.Tile
    use_tma: bool
    has_low: bool  # whether a query is the sum of two vectors of the operand dtype
    error: float  # bound of the error of a maximum, relative to the sum of magnitudes


@dataclass(frozen=True)
class Found:
    """Results of a search before the keys are unpacked."""

    keys: Tensor  # [B, k], in descending order
    uncertain: Tensor  # [B] int32, not 0 if the query needed step 4


def unfit(index_emb: Tensor, k: int, exclude: Tensor | None) -> str:
    """Return why these kernels cannot search this index; "" if they can."""
    n, dim = index_emb.shape
    if index_emb.dtype not in kernels.STORAGES:
        return f"it has no scan of {index_emb.dtype}"
    if (dim > 1 and index_emb.stride(1) != 1) or n >= 2**31 - 2**16:
        return f"it reads fewer than 2**31 contiguous rows, got strides {index_emb.stride()}"
    if k > mips_rescore.MAX_K:
        return f"it finds at most {mips_rescore.MAX_K} rows, got k = {k}"
    if _n_excluded(exclude) > MAX_EXCLUDED:
        return f"it excludes at most {MAX_EXCLUDED} rows of a query"
    return ""


def pays(query_emb: Tensor, index_emb: Tensor, k: int, exclude: Tensor | None) -> bool:
    """Return whether a scan is faster than computing and sorting all scores."""
    n = index_emb.shape[0]
    scored = (k + _n_excluded(exclude) + SLACK) * mips_rescore.group_size(k)
    return query_emb.shape[0] * n >= _LEAST_SCORES and 4 * scored <= n


def search(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D], index_emb [N, D] -> scores [B, k] float32, rows [B, k].

    With `exact`, float32 [N, D], index_emb holds approximations of the rows of `exact`, and the
    results are those of a search of `exact`.
    """
    query = query_emb if query_emb.stride(-1) == 1 else query_emb.contiguous()
    norm = _kept_norm(index_emb, None, None, None) if index_emb.dtype != torch.int8 else None
    gap = None if exact is None else _kept_norm(index_emb, scale, offset, exact)
    passages = _passages(index_emb, scale, offset, exclude)
    plan = plan_for(query, index_emb, k, exclude)
    keys = [
        find(query[part], _of_queries(passages, part), k, plan, norm, exact, gap).keys
        for part in workspace.even_slices(len(query), _queries_at_once(index_emb, plan))
    ]
    return unpack(keys[0] if len(keys) == 1 else torch.cat(keys))


def plan_for(query: Tensor, index_emb: Tensor, k: int, exclude: Tensor | None = None) -> Plan:
    stored = index_emb.dtype
    has_low = stored == torch.int8 or (stored.itemsize == 2 and query.dtype == torch.float32)
    use_tma = _has_tma(index_emb.device) and kernels.fits_tma(index_emb)
    slack = SLACK_FLOAT32 if stored == torch.float32 else SLACK
    return Plan(
        group=mips_rescore.group_size(k),
        n_chosen=k + _n_excluded(exclude) + slack,
        tile=kernels.tile_for(
            stored,
            query.shape[0],
            has_low,
            use_tma,
            index_emb.device if index_emb.is_cuda else None,
        ),
        use_tma=use_tma,
        has_low=has_low,
        error=kernels.error_bound(stored, index_emb.shape[1], has_low),
    )


def find(
    query: Tensor,
    passages: Passages,
    k: int,
    plan: Plan,
    norm: Tensor | None,
    exact: Tensor | None = None,
    gap: Tensor | None = None,
) -> Found:
    """Run steps 1 to 4 for queries [B, D] with contiguous elements.

    norm: the largest |x| of the index, `[]` on its device; None for codes, whose range is known.
    gap: the largest distance between a row of the index and the same row of `exact`.
    """
    index, n_queries = passages.index, query.shape[0]
    with stage("mips_topk/prepare"):
        operand = kernels.prepare(
            query, index.dtype, passages.scale, passages.offset, plan.has_low, plan.tile
        )
    n_groups = math.ceil(index.shape[0] / plan.group)
    width = math.ceil(n_groups / _BUNDLE) * _BUNDLE
    maxima = query.new_empty(n_queries, width, dtype=torch.float32)
    maxima[:, n_groups:] = -torch.inf
    with stage("mips_topk/scan"):
        kernels.group_maxima(
            operand, index, passages.removed, plan.group, plan.tile, plan.use_tma, maxima
        )
    # No relative bound covers products that underflow in float32.
    reach = operand.size * (plan.error if norm is None else norm * plan.error)
    reach = reach + index.shape[1] * torch.finfo(torch.float32).tiny
    if exact is not None and gap is not None:
        # The two scores differ by the gap, and each has its own rounding.
        reach = reach + operand.norm * (gap * (1.01 + plan.error))
        passages = Passages(
            exact, None, None, passages.removed, passages.exclude, passages.first_row
        )

    n_chosen = min(plan.n_chosen, n_groups)
    with stage("mips_topk/choose"):
        top, groups = _top_groups(maxima, min(n_chosen + 1, n_groups))
    if n_chosen < n_groups:
        runner_up = top[:, n_chosen].contiguous()
    else:
        runner_up = top.new_full((n_queries,), -torch.inf)
    with stage("mips_topk/rescore"):
        keys = mips_rescore.rescore(query, passages, groups[:, :n_chosen].contiguous(), plan.group)
        keys = _best(keys, k)
    with stage("mips_topk/search_rest"):
        uncertain = mips_rescore.search_rest(
            query, passages, operand, maxima, runner_up, reach, keys, plan.group
        )
    return Found(keys, uncertain)


def search_blocks(
    query_emb: Tensor,
    blocks: Iterable[tuple[slice, Tensor]],
    k: int,
    exclude: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Search an index block by block, with the results of `search` on the whole index.

    blocks: slices of rows and their vectors `[n, D]`, on the device of the queries. The iterable
    may overwrite a block once the next one is requested, in the order of the current stream.
    """
    query = query_emb.contiguous()
    best = torch.full((len(query), k), mips_rescore.NOTHING, device=query.device)
    for part, block in blocks:
        keys = _search_block(query, block, k, exclude, scale, offset, part)
        best = _best(torch.cat([best, keys], 1), k)
    return unpack(best)


def _search_block(
    query: Tensor,
    block: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    part: slice,
) -> Tensor:
    if exclude is not None and exclude.dtype == torch.bool:
        exclude = exclude[part]
    passages = _passages(block, scale, offset, exclude, part.start)
    plan = plan_for(query, block, k, exclude)
    norm = None if block.dtype == torch.int8 else kernels.max_norm(block, None, None)
    slices = workspace.even_slices(len(query), _queries_at_once(block, plan))
    return torch.cat([find(query[s], _of_queries(passages, s), k, plan, norm).keys for s in slices])


def forget_norms() -> None:
    """Drop all norms that are kept.

    Example:
        >>> from fastrag.ops import triton_mips
        >>> triton_mips.forget_norms()
    """
    _norms.clear()


_norms: dict[tuple[object, ...], tuple[list[StorageWeakRef], Tensor]] = {}


def _kept_norm(
    index: Tensor, scale: Tensor | None, offset: Tensor | None, exact: Tensor | None
) -> Tensor:
    """Return `kernels.max_norm`, kept until the memory of an argument is freed or written."""
    sources = [x for x in (index, scale, offset, exact) if x is not None]
    stream = 0
    if index.is_cuda:
        stream = torch.cuda.current_stream(index.device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            return kernels.max_norm(index, scale, offset, exact)
    if any(x.is_inference() for x in sources):  # inference tensors have no version counter
        return kernels.max_norm(index, scale, offset, exact)
    key = (stream, index.device, *(_identity(x) for x in sources))
    for old in [k for k, (refs, _) in _norms.items() if any(ref.expired() for ref in refs)]:
        del _norms[old]
    if key not in _norms:
        while len(_norms) >= _KEPT_NORMS:
            del _norms[next(iter(_norms))]
        refs = [StorageWeakRef(x.untyped_storage()) for x in sources]
        _norms[key] = refs, kernels.max_norm(index, scale, offset, exact)
    return _norms[key][1]


def _identity(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version


def _n_excluded(exclude: Tensor | None) -> int:
    return 0 if exclude is None or exclude.dtype == torch.bool else exclude.shape[1]


def _passages(
    index: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    exclude: Tensor | None,
    first_row: int = 0,
) -> Passages:
    if index.dtype != torch.int8:
        scale = offset = None
    scale, offset, exclude = (
        None if x is None else x.contiguous() for x in (scale, offset, exclude)
    )
    removed = exclude if exclude is not None and exclude.dtype == torch.bool else None
    return Passages(
        index, scale, offset, removed, None if removed is not None else exclude, first_row
    )


def _of_queries(passages: Passages, part: slice) -> Passages:
    if passages.exclude is None:
        return passages
    return replace(passages, exclude=passages.exclude[part])


def _has_tma(device: torch.device) -> bool:
    if device.type != "cuda" or backends.interpreting():
        return False
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 0)  # torch's own stubs lack it
    return (found.major, found.minor) >= _TMA_CAPABILITY and shared >= _TMA_SHARED


def _queries_at_once(index: Tensor, plan: Plan) -> int:
    """Return for how many queries maxima and keys of the chosen groups fit the workspace."""
    n = index.shape[0]
    n_chosen = min(plan.n_chosen, math.ceil(n / plan.group))
    return workspace.rows_per_chunk(4 * n / plan.group + 16 * n_chosen * plan.group, index.device)


def _top_groups(maxima: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest maxima of each query and their groups; in two steps for wide rows."""
    if maxima.shape[1] <= _WIDE:
        top, groups = maxima.topk(n, dim=1)
        return top, groups
    bundled = maxima.view(maxima.shape[0], -1, _BUNDLE)
    bundles = bundled.amax(2).topk(min(n, bundled.shape[1]), dim=1).indices  # [B, n]
    some = bundled.gather(1, bundles[:, :, None].expand(-1, -1, _BUNDLE)).flatten(1)
    top, place = some.topk(n, dim=1)
    return top, bundles.gather(1, place // _BUNDLE) * _BUNDLE + place % _BUNDLE


def _best(keys: Tensor, k: int) -> Tensor:
    """Return the k largest keys of each query in descending order, padded with `NOTHING`."""
    best = keys.topk(min(k, keys.shape[1]), dim=1).values
    missing = k - best.shape[1]
    return torch.nn.functional.pad(best, (0, missing), value=mips_rescore.NOTHING)
