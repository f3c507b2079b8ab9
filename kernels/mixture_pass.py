"""The marginal distribution of RAG-Token over the whole vocabulary, and the gradient of its mean.

    M_v = log sum_k exp(a_k + log p_kv)                (Lewis et al. 2020, sec. 2.1, RAG-Token)
    r_kv = exp(a_k + log p_kv - M_v)                   the share of passage k in it

    statistics  mean_v M_v and mean_v r_kv
    gradient    dz_kv = target_k p_kv - spread r_kv - hit_k 1[v = y], times the chain factor

Label smoothing e of the marginal distribution has hit = (1 - e) w, spread = e / V and target =
(1 - e) w + e mean_v r: d/dz of -((1 - e) M_y + e mean_v M_v).

The K rows of a position are consecutive and in one program; max z and log sum come from `row_pass`.
Memory traffic per logit: statistics 4 bytes read; gradient 4 read and 2 or 4 written. M and r only
exist in registers, and the gradient recomputes them. No atomics, and a fixed order of sums. Rows
and bias are padded as in `row_pass`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.row_pass import HEAD_TYPES, LOG2E, chain_factor, fold_logits, head_flags
from fastrag.kernels.tuning import choose
from torch import Tensor

BLOCKS_K = (4, 16, 64, 256)
# Logits per program and tile, and num_warps: 16 a thread; then others that a GPU may like better.
_TILES = ((2048, 4), (2048, 8), (1024, 4))
# A grid has at most 65535 programs along its second axis, each for so many token ids.
_LEAST_WORDS = 8
MAX_PASSAGES = BLOCKS_K[-1]


def blocks(
    n_passages: int, kernel: str = "mixture_gradient", device: torch.device | None = None
) -> dict[str, int]:
    """Return BLOCK_K, BLOCK_V and num_warps of a kernel for K passages.

    Raises:
        ValueError: K is above the largest block.
    """
    fitting = [block for block in BLOCKS_K if block >= n_passages]
    if not fitting:
        raise ValueError(f"marginal_nll: expected K of at most {MAX_PASSAGES}, got {n_passages}")
    return choose(kernel, tiles, device, block_k=fitting[0])


def tiles(block_k: int) -> tuple[dict[str, int], ...]:
    """Return the candidates for up to block_k passages."""
    return tuple(
        {"BLOCK_K": block_k, "BLOCK_V": tile // block_k, "num_warps": num_warps}
        for tile, num_warps in _TILES
        if tile // block_k >= _LEAST_WORDS
    )


@triton.jit
def log_softmax_tile(
    raw_ptrs,
    bias_ptrs,
    mask_k,
    in_row,
    peak,
    log_sum,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return log p of K rows and BLOCK_V token ids, and x W^T + bias of the same."""
    mask = mask_k[:, None] & in_row[None, :]
    raw = tl.load(raw_ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_V]
    if HAS_BIAS:
        raw += tl.load(bias_ptrs, mask=in_row, other=0.0).to(tl.float32)[None, :]
    z = fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP)
    return (z - peak[:, None]) - log_sum[:, None], raw


@triton.jit
def mixture_of(logp, prior):
    """Return M [BLOCK_V] and r [BLOCK_K, BLOCK_V]."""
    joint = logp + prior[:, None]
    peak = tl.max(joint, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    part = tl.exp2((joint - peak[None, :]) * LOG2E)
    total = tl.sum(part, axis=0)
    return peak + tl.log(total), part / total[None, :]


@triton.jit
def _mixture_statistics_kernel(
    raw_ptr,
    bias_ptr,
    peak_ptr,
    log_sum_ptr,
    prior_ptr,
    smooth_ptr,
    share_ptr,
    K,
    V,
    width,
    stride_raw,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns one position: its K rows, tile after tile.
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    mask_k = offs_k < K
    row = pid * K + offs_k
    peak = tl.load(peak_ptr + row, mask=mask_k, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=mask_k, other=0.0)
    prior = tl.load(prior_ptr + row, mask=mask_k, other=float("-inf"))
    raw_ptrs = raw_ptr + row[:, None] * stride_raw + offs_v[None, :]
    smooth = tl.zeros((BLOCK_V,), dtype=tl.float32)
    share = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        mask_v = start + offs_v < V
        logp, _ = log_softmax_tile(
            raw_ptrs + start,
            bias_ptr + start + offs_v,
            mask_k,
            start + offs_v < width,
            peak,
            log_sum,
            logit_scale,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        mixture, r = mixture_of(logp, prior)
        smooth += tl.where(mask_v, mixture, 0.0)
        share += tl.where(mask_v[None, :], r, 0.0)
    tl.store(smooth_ptr + pid, tl.sum(smooth, axis=0) / V)
    tl.store(share_ptr + row, tl.sum(share, axis=1) / V, mask=mask_k)


@triton.jit
def _mixture_gradient_kernel(
    raw_ptr,
    bias_ptr,
    gold_ptr,
    peak_ptr,
    log_sum_ptr,
    prior_ptr,
    hit_ptr,
    target_ptr,
    spread_ptr,
    draw_ptr,
    K,
    width,
    stride_raw,
    stride_draw,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns BLOCK_V token ids of the K rows of a position; draw may be raw itself.
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k = offs_k < K
    in_row = offs_v < width
    row = pid * K + offs_k
    peak = tl.load(peak_ptr + row, mask=mask_k, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=mask_k, other=0.0)
    prior = tl.load(prior_ptr + row, mask=mask_k, other=float("-inf"))
    hit = tl.load(hit_ptr + row, mask=mask_k, other=0.0)
    target = tl.load(target_ptr + row, mask=mask_k, other=0.0)
    # In 32 bits the comparisons are cheap.
    gold = tl.load(gold_ptr + row, mask=mask_k, other=-1).to(tl.int32)
    spread = tl.load(spread_ptr + pid)
    logp, raw = log_softmax_tile(
        raw_ptr + row[:, None] * stride_raw + offs_v[None, :],
        bias_ptr + offs_v,
        mask_k,
        in_row,
        peak,
        log_sum,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    _, r = mixture_of(logp, prior)
    d = target[:, None] * tl.exp2(logp * LOG2E) - spread * r
    d = tl.where(offs_v[None, :] == gold[:, None], d - hit[:, None], d)
    d *= chain_factor(raw, logit_scale, softcap, HAS_SOFTCAP)
    draw_ptrs = draw_ptr + row[:, None] * stride_draw + offs_v[None, :]
    tl.store(draw_ptrs, d.to(draw_ptr.dtype.element_ty), mask=mask_k[:, None] & in_row[None, :])


def mixture_statistics(
    raw: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    peak: Tensor,
    log_sum: Tensor,
    log_prior: Tensor,
    *,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """raw [G * K, width], log_prior [G, K] -> mean_v M [G] and mean_v r [G, K].

    bias [width]. vocab_size: V, by default all columns.
    """
    n_positions, n_passages = log_prior.shape
    smooth = raw.new_empty(n_positions)
    share = raw.new_empty(n_positions, n_passages)
    with device_of(raw):
        _mixture_statistics_kernel[(n_positions,)](
            raw,
            raw if bias is None else bias,
            peak,
            log_sum,
            log_prior,
            smooth,
            share,
            n_passages,
            raw.shape[1] if vocab_size is None else vocab_size,
            raw.shape[1],
            raw.stride(0),
            logit_scale,
            **_flags(bias, softcap),
            **blocks(n_passages, "mixture_statistics", raw.device),
        )
    return smooth, share


def mixture_gradient(
    raw: Tensor,
    gold: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    peak: Tensor,
    log_sum: Tensor,
    log_prior: Tensor,
    hit: Tensor,
    target: Tensor,
    spread: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of raw [G * K, width] to out, of any dtype, or over raw itself."""
    n_positions, n_passages = log_prior.shape
    sizes = blocks(n_passages, "mixture_gradient", raw.device)
    with device_of(raw):
        _mixture_gradient_kernel[(n_positions, triton.cdiv(raw.shape[1], sizes["BLOCK_V"]))](
            raw,
            raw if bias is None else bias,
            gold,
            peak,
            log_sum,
            log_prior,
            hit,
            target,
            spread,
            out,
            n_passages,
            raw.shape[1],
            raw.stride(0),
            out.stride(0),
            logit_scale,
            **_flags(bias, softcap),
            **sizes,
        )


def _flags(bias: Tensor | None, softcap: float | None) -> dict[str, Any]:
    return {
        "softcap": 1.0 if softcap is None else softcap,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
    }


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: every block of K, every flag, bias in the gradient's dtype."""
    return list(_configs(1))


def aot_candidates() -> list[AotConfig]:
    """Return all candidates of the launchers."""
    return list(_configs(len(_TILES)))


def _configs(n_tiles: int) -> Iterator[AotConfig]:
    """Return the configurations for the first n_tiles candidates."""
    pointers = ("prior_ptr", "hit_ptr", "target_ptr", "spread_ptr", "smooth_ptr", "share_ptr")
    shared = HEAD_TYPES | dict.fromkeys(pointers, "*fp32")
    aligned = ("width", "stride_raw", "stride_draw")
    for block_k in BLOCKS_K:
        for sizes in tiles(block_k)[:n_tiles]:
            warps = sizes["num_warps"]
            for flags in head_flags():
                constants = {**flags, "BLOCK_K": block_k, "BLOCK_V": sizes["BLOCK_V"]}
                types = shared | {"bias_ptr": "*bf16"}
                yield AotConfig(
                    _mixture_statistics_kernel, types, constants, warps, aligned=aligned
                )
                for dtype in ("fp32", "bf16"):
                    types = shared | {"bias_ptr": f"*{dtype}", "draw_ptr": f"*{dtype}"}
                    yield AotConfig(
                        _mixture_gradient_kernel, types, constants, warps, aligned=aligned
                    )
