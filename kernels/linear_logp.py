"""log p(y) of rows from hidden states and head, without a gradient.

    z_iv = c tanh(s (x_i . W_v + b_v) / c)         log p(y_i) = z_iy - logsumexp_v z_iv

Only the forward: a gradient needs the logits again (`row_pass`). The epilogue of the matrix product
keeps the running maximum and sum of each row, so the logits [n, V] only exist in registers.

Memory traffic, w bytes per number: w H (1 / BLOCK_V + 1 / BLOCK_M) bytes per logit are read, mostly
from L2, and 12 bytes per row and split are written. A product followed by a pass over its result
would write and read 8 bytes per logit.

Each program processes one block of rows and one split of the vocabulary; a second kernel merges the
splits in order. No atomics: the same input gives the same bits. Products of half-precision operands
are accumulated in float32; float32 operands are not rounded to TF32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.row_pass import LOG2E, fold_logits, head_flags
from fastrag.kernels.tuning import choose
from torch import Tensor

# Programs wanted, so that a few rows still fill a GPU; and the most splits that are joined.
_WANTED_PROGRAMS = 264
_MAX_SPLITS = 64
_BLOCK_JOIN = 64


def blocks(dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Return the candidates: tensor cores for half operands, plain FMA for float32."""
    if dtype == torch.float32:
        sizes = [(64, 64, 16, 8, 2), (64, 64, 16, 4, 2), (64, 64, 32, 8, 2), (128, 64, 16, 8, 2)]
    else:
        sizes = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3)]
        sizes += [(256, 128, 64, 8, 3), (64, 256, 64, 8, 3)]
    names = ("BLOCK_M", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages")
    return tuple(dict(zip(names, numbers, strict=True)) for numbers in sizes)


@triton.jit
def _linear_logp_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    gold_ptr,
    peak_ptr,
    total_ptr,
    hit_ptr,
    N,
    V,
    H,
    first,
    split_size,
    stride_weight_v,
    stride_weight_h,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # One program owns BLOCK_M rows and the split_size words of one split, tile after tile. `first`
    # is the word in which this slice of the weight, V rows of it, begins.
    pid_m = tl.program_id(0)
    pid_s = tl.program_id(1)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_m = offs_m < N
    gold = tl.load(gold_ptr + offs_m, mask=mask_m, other=-1)
    # In 32 bits the comparisons are cheap; a label of another slice must not meet a copied word.
    gold = tl.where(gold - first < V, gold - first, -1).to(tl.int32)  # [BLOCK_M]
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    hit = tl.zeros((BLOCK_M,), dtype=tl.float32)  # z of the label, if it is in this split
    # Behind the last row and the last word stand copies of them: a mask would cost registers.
    x_ptrs = x_ptr + tl.minimum(offs_m, N - 1)[:, None] * H + offs_h[None, :]
    begin = pid_s * split_size
    for start in range(begin, min(begin + split_size, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        weight_ptrs = (
            weight_ptr
            + tl.minimum(offs_v, V - 1).to(tl.int64)[None, :] * stride_weight_v
            + offs_h.to(tl.int64)[:, None] * stride_weight_h
        )
        raw = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for h in range(0, H, BLOCK_H):
            if EVEN_H:
                x = tl.load(x_ptrs + h)  # [BLOCK_M, BLOCK_H]
                weight = tl.load(weight_ptrs)  # [BLOCK_H, BLOCK_V]
            else:
                mask_h = h + offs_h < H
                x = tl.load(x_ptrs + h, mask=mask_h[None, :], other=0.0)
                weight = tl.load(weight_ptrs, mask=mask_h[:, None], other=0.0)
            raw = tl.dot(x, weight, raw, input_precision="ieee")  # [BLOCK_M, BLOCK_V]
            weight_ptrs += BLOCK_H * stride_weight_h
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first + offs_v, mask=mask_v, other=0.0).to(tl.float32)
            raw += bias[None, :]
        z = fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP)
        at_gold = offs_v[None, :] == gold[:, None]
        hit += tl.sum(tl.where(at_gold, z, 0.0), axis=1)
        z = tl.where(mask_v[None, :], z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=1))
        # Until a logit is finite: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        center = tl.where(higher == float("-inf"), 0.0, higher)
        part = tl.sum(tl.exp2((z - center[:, None]) * LOG2E), axis=1)
        total = total * tl.exp2((peak - center) * LOG2E) + part
        peak = higher

    offs_out = pid_s.to(tl.int64) * N + offs_m
    tl.store(peak_ptr + offs_out, peak, mask=mask_m)
    tl.store(total_ptr + offs_out, total, mask=mask_m)
    tl.store(hit_ptr + offs_out, hit, mask=mask_m)


@triton.jit
def _join_kernel(
    peak_ptr,
    total_ptr,
    hit_ptr,
    logp_ptr,
    log_z_ptr,
    N,
    S,
    BLOCK_N: tl.constexpr,
):
    # One program owns BLOCK_N rows and joins their S splits.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    peak = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    hit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in range(0, S):
        offs = split * N + offs_n
        part_peak = tl.load(peak_ptr + offs, mask=mask_n, other=0.0)
        part_total = tl.load(total_ptr + offs, mask=mask_n, other=0.0)
        hit += tl.load(hit_ptr + offs, mask=mask_n, other=0.0)
        higher = tl.maximum(peak, part_peak)
        center = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - center) * LOG2E)
        total += part_total * tl.exp2((part_peak - center) * LOG2E)
        peak = higher
    center = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = tl.log(total)
    tl.store(logp_ptr + offs_n, (hit - center) - log_sum, mask=mask_n)
    tl.store(log_z_ptr + offs_n, center, mask=mask_n)
    tl.store(log_z_ptr + N + offs_n, log_sum, mask=mask_n)


def linear_logp(
    x: Tensor,
    slices: Iterable[tuple[slice, Tensor]],
    gold: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    n_splits: int,
) -> tuple[Tensor, Tensor]:
    """x [n, H] -> log p(gold) [n] and (max z, log sum exp(z - max z)) [2, n].

    slices: (rows of W, those rows in the dtype of x), in order.
    """
    n = x.shape[0]
    sizes = choose("linear_logp", blocks, x.device, dtype=x.dtype)
    parts = []
    with device_of(x):
        for part, weight in slices:
            found = x.new_empty(3, n_splits, n, dtype=torch.float32)
            tiles = triton.cdiv(weight.shape[0], sizes["BLOCK_V"])
            _linear_logp_kernel[(triton.cdiv(n, sizes["BLOCK_M"]), n_splits)](
                x,
                weight,
                x if bias is None else bias,  # never read without HAS_BIAS
                gold,
                *found,
                n,
                weight.shape[0],
                x.shape[1],
                part.start,
                triton.cdiv(tiles, n_splits) * sizes["BLOCK_V"],
                *weight.stride(),
                logit_scale,
                1.0 if softcap is None else softcap,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap is not None,
                EVEN_H=x.shape[1] % sizes["BLOCK_H"] == 0,
                **sizes,
            )
            parts.append(found)
        logp = x.new_empty(n, dtype=torch.float32)
        log_z = x.new_empty(2, n, dtype=torch.float32)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        _join_kernel[(triton.cdiv(n, _BLOCK_JOIN),)](
            *joined, logp, log_z, n, joined.shape[1], BLOCK_N=_BLOCK_JOIN, num_warps=2
        )
    return logp, log_z


def splits(n: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Return in how many parts the vocabulary is split for n rows."""
    sizes = blocks(dtype)[0]
    wanted = triton.cdiv(_WANTED_PROGRAMS, triton.cdiv(n, sizes["BLOCK_M"]))
    return max(1, min(wanted, _MAX_SPLITS, triton.cdiv(vocab_size, sizes["BLOCK_V"])))


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: a contiguous weight, and H a multiple of BLOCK_H."""
    join = AotConfig(_join_kernel, _TYPES, {"BLOCK_N": _BLOCK_JOIN}, 2)
    return [join, *_configs(slice(1))]


def aot_candidates() -> list[AotConfig]:
    """Return all candidates of the launcher."""
    return list(_configs(slice(None)))


_TYPES = {
    **dict.fromkeys(("peak_ptr", "total_ptr", "hit_ptr", "logp_ptr", "log_z_ptr"), "*fp32"),
    **dict.fromkeys(("N", "V", "H", "S", "first", "split_size", "stride_weight_v"), "i32"),
    **dict.fromkeys(("logit_scale", "softcap"), "fp32"),
    "gold_ptr": "*i64",
}


def _configs(some: slice) -> Iterator[AotConfig]:
    """Return the configurations for these candidates."""
    aligned = ("H", "stride_weight_v")
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        types = _TYPES | dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), f"*{name}")
        for sizes in blocks(dtype)[some]:
            block = {key: size for key, size in sizes.items() if key.startswith("BLOCK")}
            options = (sizes["num_warps"], sizes["num_stages"], aligned)
            for flags in head_flags():
                constants = {"stride_weight_h": 1, **flags, "EVEN_H": True, **block}
                yield AotConfig(_linear_logp_kernel, types, constants, *options)
