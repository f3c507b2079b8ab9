"""Softmax statistics of rows of logits, and the gradient of a cross-entropy with a weight per row.

    z_v = c tanh(s (r_v + b_v) / c)           r = x W^T as a GEMM left it; no softcap: z = s (r + b)
    log p(y) = z_y - max z - log sum_v exp(z_v - max z)
    mean_v log p(v) = mean_v z_v - max z - log sum_v exp(z_v - max z)

    dr_v = w (p_v - e / V - (1 - e) 1[v = y]) s (1 - tanh^2(s (r_v + b_v) / c))

This is the gradient of -w ((1 - e) log p(y) + e mean_v log p(v)). If w is the posterior of the
row's passage, it is the gradient of -log p(y|x) of Lewis et al. 2020, sec. 2.1. It can also be
computed for a slice of the vocabulary, with the statistics of the whole vocabulary; a label outside
the slice is -1.

Memory traffic per logit: statistics 4 bytes read; gradient 4 read and 2 (bf16, fp16) or 4 written.
Not materialised: z and p, which only exist in registers, and the tanh of the chain rule.

V is rarely a multiple of 4, and a mask that ends within 16 bytes splits an access into 4 or 8.
Therefore the launchers take rows with their padding, and a bias of the same width. The padding may
have any value, does not affect the statistics, and gets a meaningless gradient. Tensors without
padding work too, but more slowly.

Offsets are 64-bit. A NaN in a row makes its statistics NaN. Sums are in float32 and in a fixed
order; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.tuning import choose
from torch import Tensor

# 16 numbers a thread: of padded rows four loads of 16 bytes in flight, and registers for the rest.
BLOCK_V = 4096
# With num_warps; behind the first others that a GPU may like better.
_BLOCKS = ((BLOCK_V, 8), (8192, 16), (4096, 16), (2048, 4), (2048, 8), (1024, 4))
_BLOCKS_WITH_MEAN = ((2048, 4), (1024, 2))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(u):
    # (1 - e) / (1 + e) loses all digits near 0, where five terms of the series are exact.
    e = tl.exp2(-2.0 * LOG2E * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    u2 = u * u
    series = 1.0 + u2 * (-0.33333333 + u2 * (0.13333333 + u2 * (-0.05396825 + u2 * 0.02186949)))
    return tl.where(u2 < 0.0625, u * series, tl.where(u < 0.0, -far, far))


@triton.jit
def fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the logits from x W^T + bias."""
    z = raw * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def chain_factor(raw, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the derivative of fold_logits; 4 e / (1 + e)^2 is 1 - tanh^2 without cancellation."""
    factor = logit_scale
    if HAS_SOFTCAP:
        e = tl.exp2(-2.0 * LOG2E * tl.abs(raw * logit_scale / softcap))
        factor = logit_scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return factor


@triton.jit
def _row_statistics_kernel(
    raw_ptr,
    bias_ptr,
    gold_ptr,
    logp_ptr,
    mean_ptr,
    peak_ptr,
    log_sum_ptr,
    V,
    width,
    stride_raw,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns one row, V token ids of `width` numbers, and reads it once.
    pid = tl.program_id(0).to(tl.int64)
    raw_ptr += pid * stride_raw
    offs_v = tl.arange(0, BLOCK_V)
    peak = float("-inf")
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)  # sum of exp(z - peak) of each lane
    away = 0.0  # sum of z - peak
    for start in range(0, V, BLOCK_V):
        mask_v = start + offs_v < V
        in_row = start + offs_v < width
        raw = tl.load(raw_ptr + start + offs_v, mask=in_row, other=0.0)  # [BLOCK_V]
        if HAS_BIAS:
            raw += tl.load(bias_ptr + start + offs_v, mask=in_row, other=0.0).to(tl.float32)
        z = fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP)
        z = tl.where(mask_v, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=0))
        # Until a logit is finite: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        center = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2((peak - center) * LOG2E)
        total = total * rescale + tl.exp2((z - center) * LOG2E)
        if WITH_MEAN:
            before = tl.where(peak == float("-inf"), center, peak)
            away += start * (before - center)  # of what came before
            away += tl.sum(tl.where(mask_v, z - center, 0.0), axis=0)
        peak = higher

    peak = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = tl.log(tl.sum(total, axis=0))
    gold = tl.load(gold_ptr + pid)
    raw_gold = tl.load(raw_ptr + gold)
    if HAS_BIAS:
        raw_gold += tl.load(bias_ptr + gold).to(tl.float32)
    z_gold = fold_logits(raw_gold, logit_scale, softcap, HAS_SOFTCAP)
    # Centred before anything is subtracted: log p stays exact for logits around 1e4.
    tl.store(logp_ptr + pid, (z_gold - peak) - log_sum)
    tl.store(peak_ptr + pid, peak)
    tl.store(log_sum_ptr + pid, log_sum)
    if WITH_MEAN:
        tl.store(mean_ptr + pid, away / V - log_sum)


@triton.jit
def _row_gradient_kernel(
    raw_ptr,
    bias_ptr,
    gold_ptr,
    weight_ptr,
    peak_ptr,
    log_sum_ptr,
    draw_ptr,
    width,
    stride_raw,
    stride_draw,
    logit_scale,
    softcap,
    smoothing,
    share,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns BLOCK_V numbers of one row. No two of them meet, so that those of the padding
    # need no care; draw may be raw itself where the dtypes agree.
    pid = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offs_v < width
    weight = tl.load(weight_ptr + pid)
    peak = tl.load(peak_ptr + pid)
    scale = weight * tl.exp2(-LOG2E * tl.load(log_sum_ptr + pid))
    gold = tl.load(gold_ptr + pid)
    raw = tl.load(raw_ptr + pid * stride_raw + offs_v, mask=in_row, other=0.0)  # [BLOCK_V]
    if HAS_BIAS:
        raw += tl.load(bias_ptr + offs_v, mask=in_row, other=0.0).to(tl.float32)
    z = fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP)
    d = tl.exp2((z - peak) * LOG2E) * scale - weight * share
    # In float32: a probability near 1 would round to 1 in the operand dtype, and its gradient to 0.
    d -= tl.where(offs_v == gold.to(tl.int32), weight * (1.0 - smoothing), 0.0)
    d *= chain_factor(raw, logit_scale, softcap, HAS_SOFTCAP)
    offs_draw = pid * stride_draw + offs_v
    tl.store(draw_ptr + offs_draw, d.to(draw_ptr.dtype.element_ty), mask=in_row)


def row_statistics(
    raw: Tensor,
    gold: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    vocab_size: int | None = None,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """raw [n, width] float32, gold [n] -> log p(y) [n], log_z [2, n], mean_v log p(v) [n].

    bias [width]. vocab_size: V, by default all columns. log_z: max z and log sum exp(z - max z).
    """
    n, width = raw.shape
    logp, mean = raw.new_empty(2, n)
    log_z = raw.new_empty(2, n)
    with device_of(raw):
        _row_statistics_kernel[(n,)](
            raw,
            raw if bias is None else bias,
            gold,
            logp,
            mean,
            *log_z,
            width if vocab_size is None else vocab_size,
            width,
            raw.stride(0),
            logit_scale,
            1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            WITH_MEAN=with_mean,
            **choose("row_statistics", statistics_blocks, raw.device, with_mean=with_mean),
        )
    return logp, log_z, mean if with_mean else None


def row_gradient(
    raw: Tensor,
    gold: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    log_z: Tensor,
    weight: Tensor,
    smoothing: float,
    vocab_size: int,
    out: Tensor,
) -> None:
    """Write the gradient of raw [n, width] to out [n, width] of any dtype, or over raw itself.

    bias [width], log_z [2, n] of row_statistics. vocab_size: V, of which raw may hold a slice.
    """
    n, width = raw.shape
    sizes = choose("row_gradient", gradient_blocks, raw.device)
    with device_of(raw):
        _row_gradient_kernel[(n, triton.cdiv(width, sizes["BLOCK_V"]))](
            raw,
            raw if bias is None else bias,
            gold,
            weight,
            *log_z,
            out,
            width,
            raw.stride(0),
            out.stride(0),
            logit_scale,
            1.0 if softcap is None else softcap,
            smoothing,
            smoothing / vocab_size,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            **sizes,
        )


def statistics_blocks(with_mean: bool) -> tuple[dict[str, int], ...]:
    """Return the candidates; with most other blocks, the assembler spills the second sum."""
    blocks = (
        ((2048, 4), (1024, 2)) if with_mean else (sizes for sizes in _BLOCKS if sizes[0] < 8192)
    )
    return tuple(_block(*sizes) for sizes in blocks)


def gradient_blocks() -> tuple[dict[str, int], ...]:
    return tuple(_block(*sizes) for sizes in _BLOCKS)


def _block(block_v: int, num_warps: int) -> dict[str, int]:
    return {"BLOCK_V": block_v, "num_warps": num_warps}


def head_flags() -> list[dict[str, bool]]:
    """Return the heads that the gate compiles; no published model has both softcap and bias."""
    return [
        {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        for bias, softcap in ((False, False), (True, False), (True, True))
    ]


# Padded rows, as the loss has them: width and strides are multiples of 16, V need not be.
HEAD_TYPES = {
    **dict.fromkeys(("raw_ptr", "peak_ptr", "log_sum_ptr", "logp_ptr", "mean_ptr"), "*fp32"),
    **dict.fromkeys(("weight_ptr",), "*fp32"),
    **dict.fromkeys(("logit_scale", "softcap", "smoothing", "share"), "fp32"),
    **dict.fromkeys(("V", "K", "width", "stride_raw", "stride_draw"), "i32"),
    "gold_ptr": "*i64",
}


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: the bias in the dtype of the gradient, and every flag."""
    return list(_configs(1))


def aot_candidates() -> list[AotConfig]:
    """Return all candidates of the launchers."""
    return list(_configs(len(_BLOCKS)))


def _configs(n_blocks: int) -> Iterator[AotConfig]:
    """Return the configurations for the first n_blocks candidates."""
    aligned = ("width", "stride_raw", "stride_draw")
    for flags in head_flags():
        for with_mean in (False, True):
            types = HEAD_TYPES | {"bias_ptr": "*bf16"}
            for sizes in statistics_blocks(with_mean)[:n_blocks]:
                constants = {**flags, "WITH_MEAN": with_mean, "BLOCK_V": sizes["BLOCK_V"]}
                warps = sizes["num_warps"]
                yield AotConfig(_row_statistics_kernel, types, constants, warps, aligned=aligned)
        for dtype in ("fp32", "fp16", "bf16"):
            types = HEAD_TYPES | {"bias_ptr": f"*{dtype}", "draw_ptr": f"*{dtype}"}
            for sizes in gradient_blocks()[:n_blocks]:
                constants = {**flags, "BLOCK_V": sizes["BLOCK_V"]}
                warps = sizes["num_warps"]
                yield AotConfig(_row_gradient_kernel, types, constants, warps, aligned=aligned)
