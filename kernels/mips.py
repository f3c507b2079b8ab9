"""The scan of an exact inner product search: the best score of each group of passages.

    maxima[b, g] ~ 2^-e_b max over live n of group g of q_b . x_n       groups of GROUP rows each

The k best passages are in the k best groups, so a search reads the index once and keeps B N / GROUP
numbers instead of B N scores (float32: 86 GB at 1024 queries and 21 million passages). The scan
approximates the score that `mips_rescore` defines. The tensor cores get the query as 2^-e q, which
is below 2, as one number or as the sum of two numbers of the operand dtype:

    2^-e q = high + low + rest,   |rest| <= 2^-17 |2^-e q| + 2^-25    each element, sqrt(D) of these
    |2^e maxima - score| <= reach_b = error_bound(...) * (bound of sum_d |q_d x_d|)

where error_bound counts every rounding: the split, TF32 (10 bits of either factor are kept), the
sum on tensor cores (taken to lose 2^-22 of the sum of magnitudes with each product, which is twice
what an accumulator of 24 bits that truncates can lose) and the sum of the score itself.
The sum of magnitudes is bounded by |q| max|x|, or for int8 codes c, x = m + r c, of which
|c| <= 128 is known, by 128 sum|q r| + sum|q m|; their scan is over q r . c.

Memory traffic, w bytes per stored number: w N D read once for all queries of a tile (further tiles
find the passages in L2), 4 B N / GROUP written. Not materialised: the scores.

A group with a score that is not finite has maximum inf, so that it is scored again. Removed
passages are ignored. Offsets are 64-bit. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.tuning import choose
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows of a group. Smaller groups cost more maxima and save rescoring, which grows with k.
GROUPS = (128, 64)
# The most queries of a regime; tiles for the last serve any more.
QUERIES = (16, 64, 128, 256, 1024)
_BLOCK_NORM = {"BLOCK_N": 32, "BLOCK_D": 128}
_BLOCK_PREPARE = 256
_LEAST_NORMAL = 2.0**-126
_TMA_ALIGNMENT = 16  # bytes, of the first row and of the pitch
STORAGES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Tile:
    """Queries times passages that one program multiplies, and how."""

    block_b: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    swap: bool = False  # passages in the rows of the product

    def constants(self) -> dict[str, Any]:
        blocks = {"BLOCK_B": self.block_b, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}
        return {"SWAP": self.swap, **blocks}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tile_for(
    stored: torch.dtype,
    n_queries: int,
    has_low: bool,
    use_tma: bool,
    device: torch.device | None = None,
) -> Tile:
    """Return the tile for an index of dtype `stored` on `device`, by descriptors or by pointers."""
    most = next((n for n in QUERIES if n_queries <= n), QUERIES[-1])
    regime = {"stored": stored, "n_queries": most, "has_low": has_low, "use_tma": use_tma}
    return choose("group_max", tiles, device, **regime)


def tiles(stored: torch.dtype, n_queries: int, has_low: bool, use_tma: bool) -> tuple[Tile, ...]:
    """Return the candidates for up to n_queries, one of QUERIES; by pointers there is one.

    Up to 64 queries memory is the limit, and two programs share a multiprocessor so that one loads
    while the other compares. Tensor cores take few queries as columns, of which 8 are enough. int8
    codes become operands in registers, where only the rows of a product may come from. Pointers
    take registers, hence the narrower blocks.
    """
    int8, fp32 = stored == torch.int8, stored == torch.float32
    if not use_tma:
        if n_queries <= 16:
            return (Tile(16, 128, 32, 4, 4, swap=True),)
        if n_queries <= 64:
            return (Tile(64, 128, 32, 4, 4, swap=int8),)
        return (Tile(128, 128, 32, 8, 4, swap=True),)
    block_d = 32 if fp32 else 64  # 128 bytes, the widest swizzle
    if n_queries <= 16:
        some = [(16, 128, block_d, 4, n, True) for n in (4, 3, 6)]
        some += [(16, 256, block_d, warps, 3, True) for warps in (4, 8)]
        some += [(16, 128, 2 * block_d, 4, 3, True)]
    elif n_queries <= 64:
        first = (64, 128, block_d, 4, 3 if has_low else 4, int8)
        some = [first, (64, 128, block_d, 8, first[4], int8), (64, 128, block_d, 4, 5, int8)]
        some += [(64, 256, block_d, 8, n, int8) for n in (3, 4)]
        some += [(64, 128, block_d, 4, first[4], True)]
    elif int8:
        some = [(128, 128, block_d, 8, n, True) for n in (3, 4)]
        some += [(64, 128, block_d, 4, 4, True), (64, 256, block_d, 8, 3, True)]
    else:
        some = [(128, 256, block_d, 8, 3 if has_low else 4, False)]
        some += [(128, 256, block_d, 8, 3, False), (128, 128, block_d, 8, 4, False)]
        some += [
            (256, 128, block_d, 8, 2 if has_low else 3, False),
            (64, 256, block_d, 8, 4, False),
        ]
        some += [(128, 128, block_d, 4, 4, False)]
    return tuple(Tile(*sizes) for sizes in dict.fromkeys(some))


def operand_dtype(stored: torch.dtype) -> torch.dtype:
    """Return the dtype of tensor-core operands; int8 codes are exact in bfloat16."""
    return torch.bfloat16 if stored == torch.int8 else stored


def error_bound(stored: torch.dtype, dim: int, has_low: bool) -> float:
    """Return the error bound of a maximum, relative to the sum of magnitudes of its D products."""
    n_terms = 2 if has_low else 1
    split = 2.0**-17 + dim**0.5 * 2.0**-25
    if stored == torch.float32:
        split += 2.0**-9
    scan = (n_terms * dim + 8) * 2.0**-22
    score = (dim + 8) * 2.0**-23
    # The norms, computed in float32, are themselves a little off.
    return 1.01 * (split + scan + score)


@triton.jit
def stored_values(
    x,
    scale_ptr,
    offset_ptr,
    offs_d,
    mask_d,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """Return the float32 numbers [N, D] that stored numbers represent."""
    x = x.to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_d, mask=mask_d, other=0.0)
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + offs_d, mask=mask_d, other=0.0)
            x = tl.fma(tl.broadcast_to(scale[None, :], x.shape), x,
                       tl.broadcast_to(offset[None, :], x.shape))  # fmt: skip
        else:
            x = x * scale[None, :]
    return x


@triton.jit
def _power_below(peak):
    """Return 1 / p and p for the largest power of two p <= peak, limited to normal numbers."""
    power = peak.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, 1 << 23), 253 << 23)
    inverse = (254 << 23) - power
    return inverse.to(tl.float32, bitcast=True), power.to(tl.float32, bitcast=True)


@triton.jit
def _prepare_kernel(
    query_ptr,
    scale_ptr,
    offset_ptr,
    high_ptr,
    low_ptr,
    unit_ptr,
    base_ptr,
    norm_ptr,
    size_ptr,
    B,
    D,
    stride_query_b,
    stride_high_b,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns one row of the operands, of which those from B on are zeros.
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    query_ptr += pid.to(tl.int64) * stride_query_b
    offs_high = pid.to(tl.int64) * stride_high_b
    peak_query = tl.zeros((BLOCK_D,), dtype=tl.float32)
    peak = tl.zeros((BLOCK_D,), dtype=tl.float32)
    size = tl.zeros((BLOCK_D,), dtype=tl.float32)
    base = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = (start + offs_d < D) & (pid < B)
        query = tl.load(query_ptr + start + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        peak_query = tl.maximum(peak_query, tl.abs(query))
        if HAS_OFFSET:
            part = query * tl.load(offset_ptr + start + offs_d, mask=mask_d, other=0.0)
            base += part
            size += tl.abs(part)
        if HAS_SCALE:
            query *= tl.load(scale_ptr + start + offs_d, mask=mask_d, other=0.0)
            size += 128.0 * tl.abs(query)
        peak = tl.maximum(peak, tl.abs(query))
    unit_query, power_query = _power_below(tl.max(peak_query, axis=0))
    unit, _ = _power_below(tl.max(peak, axis=0))
    square = tl.zeros((BLOCK_D,), dtype=tl.float32)  # of what cannot overflow, nor vanish
    for start in range(0, stride_high_b, BLOCK_D):
        mask_d = (start + offs_d < D) & (pid < B)
        query = tl.load(query_ptr + start + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        square += (query * unit_query) * (query * unit_query)
        if HAS_SCALE:
            query *= tl.load(scale_ptr + start + offs_d, mask=mask_d, other=0.0)
        query *= unit
        high = query.to(high_ptr.dtype.element_ty)
        mask_out = start + offs_d < stride_high_b
        tl.store(high_ptr + offs_high + start + offs_d, high, mask=mask_out)
        if HAS_LOW:
            low = (query - high.to(tl.float32)).to(high_ptr.dtype.element_ty)
            tl.store(low_ptr + offs_high + start + offs_d, low, mask=mask_out)
    if pid < B:
        norm = tl.sqrt(tl.sum(square, axis=0)) * power_query
        tl.store(unit_ptr + pid, unit)
        tl.store(base_ptr + pid, tl.sum(base, axis=0))
        tl.store(norm_ptr + pid, norm)
        if HAS_SCALE:
            norm = tl.sum(size, axis=0)
        tl.store(size_ptr + pid, norm)


@triton.jit
def _norm_kernel(
    index_ptr,
    scale_ptr,
    offset_ptr,
    exact_ptr,
    found_ptr,
    N,
    D,
    stride_index_n,
    stride_exact_n,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_N rows and writes the largest of their squared norms.
    pid = tl.program_id(0).to(tl.int64)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d < D
        mask = mask_n[:, None] & mask_d[None, :]
        ptrs = index_ptr + offs_n[:, None] * stride_index_n + start + offs_d[None, :]
        x = tl.load(ptrs, mask=mask, other=0)  # [BLOCK_N, BLOCK_D]
        x = stored_values(x, scale_ptr, offset_ptr, start + offs_d, mask_d, HAS_SCALE, HAS_OFFSET)
        if HAS_EXACT:
            ptrs = exact_ptr + offs_n[:, None] * stride_exact_n + start + offs_d[None, :]
            x = tl.load(ptrs, mask=mask, other=0.0) - x
        total += tl.where(mask, x * x, 0.0)
    square = tl.sum(total, axis=1)  # [BLOCK_N]
    # A row with NaN is reported by the search, or removed; it bounds nothing.
    square = tl.where(square == square, square, 0.0)
    tl.store(found_ptr + pid, tl.max(square, axis=0))


@triton.jit
def _group_max_kernel(
    high,
    low,
    index,
    removed_ptr,
    maxima_ptr,
    B,
    N,
    D,
    stride_high_b,
    stride_index_n,
    stride_maxima_b,
    HAS_LOW: tl.constexpr,
    HAS_REMOVED: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_B queries and BLOCK_N passages. Programs that share passages are
    # neighbours, so that all but the first find them in L2. With USE_TMA high, low and index are
    # descriptors, else pointers.
    pid = tl.program_id(0)
    n_tiles_b = tl.cdiv(B, BLOCK_B)
    pid_b = pid % n_tiles_b
    pid_n = pid // n_tiles_b
    offs_b = pid_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    if not USE_TMA:
        # Behind the last passage stand copies of it: a mask would cost registers.
        offs_row = tl.minimum(offs_n, N - 1).to(tl.int64) * stride_index_n
        row_ptrs = index + offs_row[:, None] + offs_d[None, :]
        offs_high = offs_b.to(tl.int64)[:, None] * stride_high_b + offs_d[None, :]
    if SWAP:
        score = tl.zeros((BLOCK_N, BLOCK_B), dtype=tl.float32)
    else:
        score = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        if USE_TMA:
            x = index.load([pid_n * BLOCK_N, d])  # [BLOCK_N, BLOCK_D], zeros behind column D
            q = high.load([pid_b * BLOCK_B, d])  # [BLOCK_B, BLOCK_D]
        else:
            if EVEN_D:
                x = tl.load(row_ptrs + d)
            else:
                x = tl.load(row_ptrs + d, mask=(d + offs_d < D)[None, :], other=0)
            q = tl.load(high + offs_high + d)
        x = x.to(q.dtype)
        if SWAP:
            score = tl.dot(x, q.T, score, input_precision="tf32")
        else:
            score = tl.dot(q, x.T, score, input_precision="tf32")
        if HAS_LOW:
            q = low.load([pid_b * BLOCK_B, d]) if USE_TMA else tl.load(low + offs_high + d)
            if SWAP:
                score = tl.dot(x, q.T, score, input_precision="tf32")
            else:
                score = tl.dot(q, x.T, score, input_precision="tf32")

    live = offs_n < N
    if HAS_REMOVED:
        live = live & (tl.load(removed_ptr + offs_n, mask=live, other=1) == 0)
    # Both NaN and -inf, which would hide a passage, become inf.
    score = tl.where(score > float("-inf"), score, float("inf"))
    N_GROUPS: tl.constexpr = BLOCK_N // GROUP
    offs_g = pid_n * N_GROUPS + tl.arange(0, N_GROUPS)
    mask_b = offs_b < B
    mask_g = offs_g < tl.cdiv(N, GROUP)
    offs_out = offs_b.to(tl.int64) * stride_maxima_b
    if SWAP:
        score = tl.where(live[:, None], score, float("-inf"))
        best = tl.max(tl.reshape(score, (N_GROUPS, GROUP, BLOCK_B)), axis=1)
        out_ptrs = maxima_ptr + offs_out[None, :] + offs_g[:, None]
        tl.store(out_ptrs, best, mask=mask_b[None, :] & mask_g[:, None])
    else:
        score = tl.where(live[None, :], score, float("-inf"))
        best = tl.max(tl.reshape(score, (BLOCK_B, N_GROUPS, GROUP)), axis=2)
        out_ptrs = maxima_ptr + offs_out[:, None] + offs_g[None, :]
        tl.store(out_ptrs, best, mask=mask_b[:, None] & mask_g[None, :])


@dataclass(frozen=True)
class Operand:
    """Queries as the scan takes them, and what its error depends on."""

    high: Tensor  # [B rounded up, D rounded up]
    low: Tensor | None
    unit: Tensor  # [B], 2^-e
    base: Tensor  # [B], q . offset, which the maxima lack
    norm: Tensor  # [B], |q|
    size: Tensor  # [B], the sum of magnitudes: of int8 its bound, else |q|, to be multiplied by |x|


def prepare(
    query: Tensor,
    stored: torch.dtype,
    scale: Tensor | None,
    offset: Tensor | None,
    has_low: bool,
    tile: Tile,
) -> Operand:
    """query [B, D] of any floating dtype, for a scan with `tile` of an index of dtype `stored`."""
    n, dim = query.shape
    rows = triton.cdiv(n, tile.block_b) * tile.block_b
    width = triton.cdiv(dim, tile.block_d) * tile.block_d
    high = query.new_empty(rows, width, dtype=operand_dtype(stored))
    low = torch.empty_like(high) if has_low else None
    numbers = query.new_empty(4, n, dtype=torch.float32)
    with device_of(query):
        _prepare_kernel[(rows,)](
            query,
            query if scale is None else scale,  # never read without HAS_SCALE
            query if offset is None else offset,
            high,
            high if low is None else low,
            *numbers,
            n,
            dim,
            query.stride(0),
            width,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            HAS_LOW=has_low,
            BLOCK_D=_BLOCK_PREPARE,
            num_warps=4,
        )
    return Operand(high, low, *numbers)


def max_norm(
    index: Tensor, scale: Tensor | None, offset: Tensor | None, exact: Tensor | None = None
) -> Tensor:
    """Return the largest |x| of the index [N, D], or the largest |exact - x|. `[]` float32."""
    n, dim = index.shape
    n_programs = triton.cdiv(n, _BLOCK_NORM["BLOCK_N"])
    found = index.new_empty(n_programs, dtype=torch.float32)
    with device_of(index):
        _norm_kernel[(n_programs,)](
            index,
            found if scale is None else scale,
            found if offset is None else offset,
            found if exact is None else exact,
            found,
            n,
            dim,
            index.stride(0),
            0 if exact is None else exact.stride(0),
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            HAS_EXACT=exact is not None,
            **_BLOCK_NORM,
            num_warps=4,
        )
    # What squares of tiny elements lose is less than the least normal number each.
    return (found.amax() + dim * _LEAST_NORMAL).sqrt()


def fits_tma(index: Tensor) -> bool:
    """Return whether descriptors can read the rows of the index, on a GPU that has descriptors."""
    pitch = index.stride(0) * index.element_size()
    aligned = index.data_ptr() % _TMA_ALIGNMENT == 0 and pitch % _TMA_ALIGNMENT == 0
    return aligned and index.stride(0) >= index.shape[1]


def group_maxima(
    operand: Operand,
    index: Tensor,
    removed: Tensor | None,
    group: int,
    tile: Tile,
    use_tma: bool,
    out: Tensor,
) -> None:
    """index [N, D], removed bool [N] -> out [B, N / group rounded up], in units of 2^e."""
    n, dim = index.shape
    high, low = operand.high, operand.low
    if use_tma:
        block = [tile.block_b, tile.block_d]
        first = TensorDescriptor.from_tensor(high, block)
        second = first if low is None else TensorDescriptor.from_tensor(low, block)
        passages = TensorDescriptor.from_tensor(index, [tile.block_n, tile.block_d])
    else:
        first, second, passages = high, high if low is None else low, index
    grid = triton.cdiv(out.shape[0], tile.block_b) * triton.cdiv(n, tile.block_n)
    with device_of(index):
        _group_max_kernel[(grid,)](
            first,
            second,
            passages,
            out if removed is None else removed.view(torch.uint8),
            out,
            out.shape[0],
            n,
            dim,
            high.stride(0),
            index.stride(0),
            out.stride(0),
            HAS_LOW=low is not None,
            HAS_REMOVED=removed is not None,
            USE_TMA=use_tma,
            EVEN_D=dim % tile.block_d == 0,
            GROUP=group,
            **tile.constants(),
            **tile.options(),
        )


NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8"}
_HAVE_TMA, _HAVE_NOT = (90, 100), (80, 86)


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: every tile and storage, with tombstones.

    Of bfloat16 also queries in one term, smaller groups, and a D that is no multiple of BLOCK_D.
    """
    return [*_small_configs(), *_scan_configs()]


def _small_configs() -> Iterator[AotConfig]:
    pointers = ("scale_ptr", "offset_ptr", "exact_ptr", "found_ptr", "query_ptr")
    numbers = ("unit_ptr", "base_ptr", "norm_ptr", "size_ptr")
    types = {
        **dict.fromkeys((*pointers, *numbers), "*fp32"),
        **dict.fromkeys(("B", "N", "D", "stride_query_b", "stride_high_b"), "i32"),
        **dict.fromkeys(("stride_index_n", "stride_exact_n"), "i64"),
    }
    aligned = ("D", "stride_query_b", "stride_high_b", "stride_index_n", "stride_exact_n")
    for stored in STORAGES:
        codes = dict.fromkeys(("HAS_SCALE", "HAS_OFFSET"), stored == torch.int8)
        operand = f"*{NAMES[operand_dtype(stored)]}"
        yield AotConfig(
            _prepare_kernel,
            types | {"high_ptr": operand, "low_ptr": operand},
            {**codes, "HAS_LOW": stored != torch.float32, "BLOCK_D": _BLOCK_PREPARE},
            num_warps=4,
            aligned=aligned,
        )
        yield AotConfig(
            _norm_kernel,
            types | {"index_ptr": f"*{NAMES[stored]}"},
            {**codes, "HAS_EXACT": True, **_BLOCK_NORM},
            num_warps=4,
            aligned=aligned,
        )


def _scan_configs() -> Iterator[AotConfig]:
    bf16, most = torch.bfloat16, 128
    for use_tma in (True, False):
        for n_queries in (16, 64, most):
            for stored in STORAGES:
                yield _scan_config(stored, stored != torch.float32, n_queries, use_tma)
        yield _scan_config(bf16, False, most, use_tma)
        yield _scan_config(bf16, True, most, use_tma, group=GROUPS[1], has_removed=False)
    for n_queries in (16, 64, most):
        yield _scan_config(bf16, True, n_queries, use_tma=False, even=False)


def aot_candidates() -> list[AotConfig]:
    """Return all candidates of `tile_for`."""
    some = {}
    for stored in STORAGES:
        for has_low in {stored != torch.float32, stored == torch.int8}:
            for n_queries in QUERIES:
                for tile in tiles(stored, n_queries, has_low, use_tma=True):
                    some[stored, has_low, tile] = n_queries
    return [
        _scan_config(stored, has_low, n_queries, use_tma=True, tile=tile)
        for (stored, has_low, tile), n_queries in some.items()
    ]


def _scan_config(
    stored: torch.dtype,
    has_low: bool,
    n_queries: int,
    use_tma: bool,
    *,
    group: int = GROUPS[0],
    has_removed: bool = True,
    even: bool = True,
    tile: Tile | None = None,
) -> AotConfig:
    tile = tile or tiles(stored, n_queries, has_low, use_tma)[0]
    operand = NAMES[operand_dtype(stored)]
    index, query = f"*{NAMES[stored]}", f"*{operand}"
    if use_tma:
        index = f"tensordesc<{NAMES[stored]}[{tile.block_n}, {tile.block_d}]>"
        query = f"tensordesc<{operand}[{tile.block_b}, {tile.block_d}]>"
    types = {
        **dict.fromkeys(("high", "low"), query),
        **dict.fromkeys(("B", "N", "D", "stride_high_b"), "i32"),
        **dict.fromkeys(("stride_index_n", "stride_maxima_b"), "i64"),
        "index": index,
        "removed_ptr": "*u8",
        "maxima_ptr": "*fp32",
    }
    flags = {"HAS_LOW": has_low, "HAS_REMOVED": has_removed, "USE_TMA": use_tma, "EVEN_D": even}
    aligned = ("stride_high_b", "stride_maxima_b", *(("D", "stride_index_n") if even else ()))
    return AotConfig(
        _group_max_kernel,
        types,
        {**flags, "GROUP": group, **tile.constants()},
        tile.num_warps,
        tile.num_stages,
        aligned,
        _HAVE_TMA if use_tma else _HAVE_NOT if even else (),
    )
