"""The exact part of an inner product search: scores of chosen groups, a check, further groups.

    score[b, n] = fma(q_D-1, x_D-1, ... fma(q_1, x_1, fma(q_0, x_0, 0)))      float32

in the order of the elements, with one rounding for each, as in csrc/mips/mips.h, so a GPU and a CPU
compute the same bits. Triton multiplies float32 tiles in this order without tensor cores, with one
chain of fused multiply-adds for each number (input_precision "ieee"). A number that is stored as a
code is fma(scale, code, offset).

Score and row form a 64-bit key: the score in an order-preserving form above the complement of the
row. A larger key is a better passage, ties go to the lowest row, and no two keys are equal. A score
that is not finite becomes NaN, which sorts first. NOTHING is the key of no passage.

`rescore` writes the keys of the groups that the scan (`mips`) chose. Let the k-th score be the k-th
best among them, runner_up the maximum of the best group that was not chosen, and reach the error
bound of a maximum. The result is certain if

    2^e runner_up + base + reach < k-th score

If it is not certain, `search_rest` scores every group that could hold a better passage and writes
the new result; otherwise its programs end at once. The host does not wait to know which.

Memory traffic: w GROUP D bytes read and 8 GROUP written for each chosen group; in `search_rest` the
same for each further group, and 4 N / GROUP read for each query that is not certain. There are no
atomics, and the order of a merge does not change its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.mips import GROUPS, NAMES, STORAGES, Operand, stored_values
from torch import Tensor

NOTHING = torch.iinfo(torch.int64).min
_NOTHING = tl.constexpr(NOTHING)
_LAST_ROW = tl.constexpr(0xFFFFFFFF)
# One program sorts the keys, which have to fit its registers.
MAX_K = 1024
_BLOCK_D = 16  # the least inner size of a product
_BLOCK_GROUPS = 128
_LEAST_LIST = 128  # the assembler spills with shorter lists
# Many programs are needed for uncertain queries, and programs without work cost little.
_LISTS_BYTES = 16 << 20
_MAX_SPLITS = 256


@triton.jit
def _row_keys(
    query_ptr,
    index_ptr,
    scale_ptr,
    offset_ptr,
    removed_ptr,
    exclude_ptr,
    group,
    N,
    D,
    E,
    first_row,
    stride_index_n,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_REMOVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the keys [GROUP] of the passages of one group."""
    offs_d = tl.arange(0, BLOCK_D)
    row = (group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    live = row < N
    row_ptrs = index_ptr + tl.minimum(row, N - 1)[:, None] * stride_index_n + offs_d[None, :]
    score = tl.zeros((GROUP, 1), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = d + offs_d < D
        x = tl.load(row_ptrs + d, mask=mask_d[None, :], other=0)
        x = stored_values(x, scale_ptr, offset_ptr, d + offs_d, mask_d, HAS_SCALE, HAS_OFFSET)
        q = tl.load(query_ptr + d + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        score = tl.dot(x, q[:, None], score, input_precision="ieee")  # [GROUP, 1]
    if HAS_REMOVED:
        live = live & (tl.load(removed_ptr + row, mask=live, other=1) == 0)
    row += first_row
    for e in range(0, E):
        live = live & (row != tl.load(exclude_ptr + e))
    # Adding zero turns -0 into 0: the two are equal, so their keys must tie.
    score = tl.reshape(score, (GROUP,)) + 0.0
    score = tl.where(tl.abs(score) < float("inf"), score, float("nan"))
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FC00000)
    key = (bits.to(tl.int64) << 32) | (_LAST_ROW - row)
    return tl.where(live, key, _NOTHING)


@triton.jit
def _key_score(key):
    bits = (key >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    score = bits.to(tl.float32, bitcast=True)
    return tl.where(key == _NOTHING, float("-inf"), score)


@triton.jit
def _with_nothing(keys):
    """Pad keys with as many NOTHING, in any order."""
    nothing = tl.full(keys.shape, _NOTHING, dtype=tl.int64)
    return tl.reshape(tl.join(keys, nothing), (2 * keys.shape[0],))


@triton.jit
def _best_of_both(best, keys):
    """Return the larger half of a descending and an ascending list, in descending order."""
    # The smaller of each pair has at least a whole list of larger keys; the larger are bitonic.
    return tl.bitonic_merge(tl.maximum(best, keys), descending=True)


@triton.jit
def _rescore_kernel(
    query_ptr,
    index_ptr,
    scale_ptr,
    offset_ptr,
    removed_ptr,
    exclude_ptr,
    groups_ptr,
    keys_ptr,
    N,
    D,
    E,
    S,
    first_row,
    stride_query_b,
    stride_index_n,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_REMOVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns one of the S chosen groups of one query.
    pid = tl.program_id(0)
    pid_b = (pid // S).to(tl.int64)
    key = _row_keys(
        query_ptr + pid_b * stride_query_b,
        index_ptr,
        scale_ptr,
        offset_ptr,
        removed_ptr,
        exclude_ptr + pid_b * E,
        tl.load(groups_ptr + pid),
        N,
        D,
        E,
        first_row,
        stride_index_n,
        HAS_SCALE,
        HAS_OFFSET,
        HAS_REMOVED,
        GROUP,
        BLOCK_D,
    )
    tl.store(keys_ptr + pid.to(tl.int64) * GROUP + tl.arange(0, GROUP), key)


@triton.jit
def _rest_kernel(
    query_ptr,
    index_ptr,
    scale_ptr,
    offset_ptr,
    removed_ptr,
    exclude_ptr,
    maxima_ptr,
    runner_up_ptr,
    unit_ptr,
    base_ptr,
    reach_ptr,
    keys_ptr,
    flag_ptr,
    lists_ptr,
    K,
    N,
    D,
    E,
    n_splits,
    split_size,
    first_row,
    stride_query_b,
    stride_index_n,
    stride_maxima_b,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_REMOVED: tl.constexpr,
    GROUP: tl.constexpr,
    LIST: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns split_size groups of one query.
    pid = tl.program_id(0)
    pid_b = (pid // n_splits).to(tl.int64)
    split = pid % n_splits
    worst = _key_score(tl.load(keys_ptr + pid_b * K + K - 1))
    need = worst - tl.load(base_ptr + pid_b) - tl.load(reach_ptr + pid_b)
    need *= tl.load(unit_ptr + pid_b)
    runner_up = tl.load(runner_up_ptr + pid_b)
    # If the k-th score is NaN, so are all better ones, and the result is final.
    uncertain = (runner_up > float("-inf")) & (runner_up >= need)
    if split == 0:
        tl.store(flag_ptr + pid_b, uncertain.to(tl.int32))
    if uncertain:
        n_groups = tl.cdiv(N, GROUP)
        maxima_ptr += pid_b * stride_maxima_b
        best = tl.full((LIST,), _NOTHING, dtype=tl.int64)
        begin = split * split_size
        for start in range(begin, tl.minimum(begin + split_size, n_groups), BLOCK_G):
            offs_g = start + tl.arange(0, BLOCK_G)
            peak = tl.load(maxima_ptr + offs_g, mask=offs_g < n_groups, other=float("-inf"))
            peak = tl.max(peak, axis=0)
            if (peak > float("-inf")) & (peak >= need):
                for group in range(start, tl.minimum(start + BLOCK_G, n_groups)):
                    peak = tl.load(maxima_ptr + group)
                    if (peak > float("-inf")) & (peak >= need):
                        keys = _row_keys(
                            query_ptr + pid_b * stride_query_b,
                            index_ptr,
                            scale_ptr,
                            offset_ptr,
                            removed_ptr,
                            exclude_ptr + pid_b * E,
                            group,
                            N,
                            D,
                            E,
                            first_row,
                            stride_index_n,
                            HAS_SCALE,
                            HAS_OFFSET,
                            HAS_REMOVED,
                            GROUP,
                            BLOCK_D,
                        )
                        for _ in tl.static_range(DOUBLINGS):
                            keys = _with_nothing(keys)
                        best = _best_of_both(best, tl.sort(keys))
        tl.store(lists_ptr + pid.to(tl.int64) * LIST + tl.arange(0, LIST), best)


@triton.jit
def _join_rest_kernel(
    flag_ptr,
    lists_ptr,
    keys_ptr,
    K,
    n_splits,
    LIST: tl.constexpr,
):
    # One program owns one query, and merges the lists of its splits if it was not certain.
    pid = tl.program_id(0).to(tl.int64)
    if tl.load(flag_ptr + pid) != 0:
        offs = tl.arange(0, LIST)
        best = tl.full((LIST,), _NOTHING, dtype=tl.int64)
        lists_ptr += pid * n_splits * LIST
        for split in range(0, n_splits):
            keys = tl.load(lists_ptr + split * LIST + (LIST - 1) - offs)
            best = _best_of_both(best, keys)
        tl.store(keys_ptr + pid * K + offs, best, mask=offs < K)


@dataclass(frozen=True)
class Passages:
    """The rows [N, D] of an index, their storage and the excluded rows."""

    index: Tensor
    scale: Tensor | None  # [D], of int8
    offset: Tensor | None  # [D], of int8
    removed: Tensor | None  # bool [N], for no query
    exclude: Tensor | None  # int64 [B, E], not for this query; counted from first_row = 0
    first_row: int = 0

    @property
    def n_excluded(self) -> int:
        return 0 if self.exclude is None else self.exclude.shape[1]

    def pointers(self) -> tuple[Tensor, ...]:
        """Return index, scale, offset, removed and exclude, with the index in place of None."""
        some = self.index
        removed = None if self.removed is None else self.removed.view(torch.uint8)
        given = (self.scale, self.offset, removed, self.exclude)
        return (some, *(some if x is None else x for x in given))

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_SCALE": self.scale is not None,
            "HAS_OFFSET": self.offset is not None,
            "HAS_REMOVED": self.removed is not None,
        }


def rescore(query: Tensor, passages: Passages, groups: Tensor, group: int) -> Tensor:
    """query [B, D], groups int64 [B, S] -> keys of their passages, int64 [B, S * group]."""
    n_queries, n_chosen = groups.shape
    keys = groups.new_empty(n_queries, n_chosen * group)
    with device_of(query):
        _rescore_kernel[(n_queries * n_chosen,)](
            query,
            *passages.pointers(),
            groups,
            keys,
            *passages.index.shape,
            passages.n_excluded,
            n_chosen,
            passages.first_row,
            query.stride(0),
            passages.index.stride(0),
            **passages.flags(),
            GROUP=group,
            BLOCK_D=_BLOCK_D,
            num_warps=_warps(group),
        )
    return keys


def search_rest(
    query: Tensor,
    passages: Passages,
    operand: Operand,
    maxima: Tensor,
    runner_up: Tensor,
    reach: Tensor,
    keys: Tensor,
    group: int,
) -> Tensor:
    """Replace keys [B, k], the best of the chosen groups in descending order, by the best of all.

    maxima [B, groups] is from the scan, runner_up [B] its largest number that was not chosen (-inf
    for none), reach [B] the error bound. Returns [B] int32, 1 for queries that were not certain.
    """
    n_queries, k = keys.shape
    n_groups = triton.cdiv(passages.index.shape[0], group)
    size = list_size(k, group)
    most = min(_MAX_SPLITS, _LISTS_BYTES // (8 * size * n_queries))
    n_splits = max(1, min(most, triton.cdiv(n_groups, _BLOCK_GROUPS)))
    split_size = triton.cdiv(triton.cdiv(n_groups, n_splits), _BLOCK_GROUPS) * _BLOCK_GROUPS
    flag = keys.new_empty(n_queries, dtype=torch.int32)
    lists = keys.new_empty(n_queries, n_splits, size)
    with device_of(query):
        _rest_kernel[(n_queries * n_splits,)](
            query,
            *passages.pointers(),
            maxima,
            runner_up,
            operand.unit,
            operand.base,
            reach,
            keys,
            flag,
            lists,
            k,
            *passages.index.shape,
            passages.n_excluded,
            n_splits,
            split_size,
            passages.first_row,
            query.stride(0),
            passages.index.stride(0),
            maxima.stride(0),
            **passages.flags(),
            GROUP=group,
            LIST=size,
            DOUBLINGS=_doublings(size, group),
            BLOCK_G=_BLOCK_GROUPS,
            BLOCK_D=_BLOCK_D,
            **_rest_options(size),
        )
        _join_rest_kernel[(n_queries,)](
            flag, lists, keys, k, n_splits, LIST=size, num_warps=_warps(size)
        )
    return flag


def group_size(k: int) -> int:
    """Return the rows per group. For large k, smaller groups pay: fewer rows are scored again."""
    return GROUPS[0] if k <= 32 else GROUPS[1]


def list_size(k: int, group: int) -> int:
    """Return the length of the merged lists: a power of two, at least k and the group size."""
    return max(_LEAST_LIST, group, triton.next_power_of_2(k))


def _doublings(size: int, group: int) -> int:
    return (size // group).bit_length() - 1


def _warps(size: int) -> int:
    return 4 if size <= 256 else 8


def _rest_options(size: int) -> dict[str, int]:
    """Return launch options. One stage: sorting needs the registers that loads in flight take."""
    return {"num_warps": 8 if size <= _LEAST_LIST else 16, "num_stages": 1}


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: tombstones, both group sizes, the longest lists."""
    return list(_configs())


def _configs() -> Iterator[AotConfig]:
    floats = ("scale_ptr", "offset_ptr", "maxima_ptr", "runner_up_ptr", "unit_ptr", "base_ptr")
    integers = ("exclude_ptr", "groups_ptr", "keys_ptr", "lists_ptr")
    sizes = ("K", "N", "D", "E", "S", "n_splits", "split_size", "first_row", "stride_query_b")
    types = {
        **dict.fromkeys((*floats, "query_ptr", "reach_ptr"), "*fp32"),
        **dict.fromkeys(integers, "*i64"),
        **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(("stride_index_n", "stride_maxima_b"), "i64"),
        "removed_ptr": "*u8",
        "flag_ptr": "*i32",
    }
    aligned = ("D", "split_size", "stride_query_b", "stride_index_n", "stride_maxima_b")
    for stored in STORAGES:
        flags = dict.fromkeys(("HAS_SCALE", "HAS_OFFSET"), stored == torch.int8)
        flags |= {"HAS_REMOVED": True, "BLOCK_D": _BLOCK_D}
        rows = types | {"index_ptr": f"*{NAMES[stored]}"}
        for group in GROUPS:
            constants = {**flags, "GROUP": group}
            yield AotConfig(_rescore_kernel, rows, constants, _warps(group), aligned=aligned)
        for k in (1, 64, 256, MAX_K) if stored == torch.bfloat16 else (1,):
            group = group_size(k)
            size = list_size(k, group)
            constants = {**flags, "GROUP": group, "LIST": size, "BLOCK_G": _BLOCK_GROUPS}
            constants["DOUBLINGS"] = _doublings(size, group)
            options = _rest_options(size)
            yield AotConfig(_rest_kernel, rows, constants, aligned=aligned, **options)
            if k > 1:
                lists = {"LIST": size}
                yield AotConfig(_join_rest_kernel, types, lists, _warps(size))
