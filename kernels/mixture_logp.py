"""The marginal distribution of the next token, from the logits that K passages give it.

    M_v = log sum_k exp(a_k + z_kv - log Z_k)          (Lewis et al. 2020, sec. 2.5, RAG-Token)
    z_kv = c tanh(s (r_kv + b_v) / c)                  log Z_k = logsumexp_v z_kv

Only the forward, for decoding: r = x W^T comes from a GEMM of few rows. A row of it is split among
programs, because K rows of one question do not fill a GPU; the second kernel joins the sums of the
splits, in a fixed order, when it reads the logits again.

Memory traffic: per logit, 8 bytes read, the second time mostly from L2, and 4 / K written; per row
and split, 8 bytes written. Not materialised: z, the K distributions, and their sum with the prior.

Rows and bias are padded as in `row_pass`. A passage with a prior of -inf has no share; a NaN in a
row makes its question's distribution NaN. No atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from fastrag.kernels.mixture_pass import BLOCKS_K, blocks, log_softmax_tile, mixture_of, tiles
from fastrag.kernels.row_pass import HEAD_TYPES, LOG2E, fold_logits, head_flags
from torch import Tensor

BLOCK_V = 1024
_SUMS = {"BLOCK_V": BLOCK_V, "num_warps": 4}
# Programs wanted for the sums, and the most splits, which a program of the second kernel joins.
_WANTED_PROGRAMS = 264
_MAX_SPLITS = 16


@triton.jit
def _split_sums_kernel(
    raw_ptr,
    bias_ptr,
    peak_ptr,
    total_ptr,
    N,
    V,
    width,
    split_size,
    stride_raw,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns split_size token ids of one row, tile after tile.
    pid = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1)
    raw_ptr += pid * stride_raw
    offs_v = tl.arange(0, BLOCK_V)
    peak = float("-inf")
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)  # sum of exp(z - peak) of each lane
    begin = pid_s * split_size
    for start in range(begin, min(begin + split_size, V), BLOCK_V):
        in_row = start + offs_v < width
        raw = tl.load(raw_ptr + start + offs_v, mask=in_row, other=0.0)  # [BLOCK_V]
        if HAS_BIAS:
            raw += tl.load(bias_ptr + start + offs_v, mask=in_row, other=0.0).to(tl.float32)
        z = fold_logits(raw, logit_scale, softcap, HAS_SOFTCAP)
        z = tl.where(start + offs_v < V, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=0))
        # Until a logit is finite: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
        center = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - center) * LOG2E) + tl.exp2((z - center) * LOG2E)
        peak = higher
    tl.store(peak_ptr + pid_s.to(tl.int64) * N + pid, peak)
    tl.store(total_ptr + pid_s.to(tl.int64) * N + pid, tl.sum(total, axis=0))


@triton.jit
def _mixture_logp_kernel(
    raw_ptr,
    bias_ptr,
    peak_ptr,
    total_ptr,
    prior_ptr,
    mixture_ptr,
    log_z_ptr,
    N,
    K,
    S,
    width,
    stride_raw,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns BLOCK_V token ids of the K rows of a question; the first one stores log Z.
    pid = tl.program_id(0).to(tl.int64)
    pid_v = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    row = pid * K + offs_k
    offs_s = tl.arange(0, BLOCK_S)
    part = offs_s.to(tl.int64)[:, None] * N + row[None, :]
    mask_part = (offs_s < S)[:, None] & mask_k[None, :]
    peaks = tl.load(peak_ptr + part, mask=mask_part, other=float("-inf"))  # [BLOCK_S, BLOCK_K]
    totals = tl.load(total_ptr + part, mask=mask_part, other=0.0)
    peak = tl.max(peaks, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = tl.log(tl.sum(totals * tl.exp2((peaks - peak[None, :]) * LOG2E), axis=0))
    if pid_v == 0:
        tl.store(log_z_ptr + row, peak + log_sum, mask=mask_k)
    prior = tl.load(prior_ptr + row, mask=mask_k, other=float("-inf"))
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offs_v < width
    logp, _ = log_softmax_tile(
        raw_ptr + row[:, None] * stride_raw + offs_v[None, :],
        bias_ptr + offs_v,
        mask_k,
        in_row,
        peak,
        tl.where(mask_k, log_sum, 0.0),
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    mixture, _ = mixture_of(logp, prior)
    tl.store(mixture_ptr + pid * width + offs_v, mixture, mask=in_row)


def mixture_logp(
    raw: Tensor,
    log_prior: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """raw [G * K, width], log_prior [G, K] -> M [G, V] and log Z [G, K], in float32.

    bias [width]. vocab_size: V, by default all columns.
    """
    n, width = raw.shape
    n_questions, n_passages = log_prior.shape
    vocab_size = width if vocab_size is None else vocab_size
    n_splits, split_size = splits(n, vocab_size)
    peak, total = raw.new_empty(2, n_splits, n)
    mixture = raw.new_empty(n_questions, width)
    log_z = raw.new_empty(n_questions, n_passages)
    head = (raw.stride(0), logit_scale, 1.0 if softcap is None else softcap)
    flags = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None}
    sizes = blocks(n_passages, "mixture_logp", raw.device)
    bias = raw if bias is None else bias  # never read without HAS_BIAS
    with device_of(raw):
        _split_sums_kernel[(n, n_splits)](
            raw, bias, peak, total, n, vocab_size, width, split_size, *head, **flags, **_SUMS
        )
        _mixture_logp_kernel[(n_questions, triton.cdiv(width, sizes["BLOCK_V"]))](
            raw,
            bias,
            peak,
            total,
            log_prior,
            mixture,
            log_z,
            n,
            n_passages,
            n_splits,
            width,
            *head,
            **flags,
            BLOCK_S=_MAX_SPLITS,
            **sizes,
        )
    return mixture[:, :vocab_size], log_z


def splits(n: int, vocab_size: int) -> tuple[int, int]:
    """Return in how many parts the rows of n are split, and token ids in each part."""
    n_blocks = triton.cdiv(vocab_size, BLOCK_V)
    wanted = max(1, min(triton.cdiv(_WANTED_PROGRAMS, n), _MAX_SPLITS, n_blocks))
    blocks_each = triton.cdiv(n_blocks, wanted)
    return triton.cdiv(n_blocks, blocks_each), blocks_each * BLOCK_V


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: every block of K and every flag."""
    return list(_configs(slice(1)))


def aot_candidates() -> list[AotConfig]:
    """Return all candidates of the launcher."""
    return list(_configs(slice(None)))


def _configs(some: slice) -> Iterator[AotConfig]:
    """Return the configurations for these candidates."""
    pointers = ("total_ptr", "prior_ptr", "mixture_ptr", "log_z_ptr")
    shared = HEAD_TYPES | dict.fromkeys(pointers, "*fp32")
    shared |= dict.fromkeys(("N", "S", "split_size"), "i32")
    aligned = ("width", "stride_raw", "split_size")
    types = shared | {"bias_ptr": "*bf16"}
    for flags in head_flags():
        constants = {**flags, "BLOCK_V": BLOCK_V}
        yield AotConfig(_split_sums_kernel, types, constants, _SUMS["num_warps"], aligned=aligned)
        for block_k in BLOCKS_K:
            for sizes in tiles(block_k)[some]:
                block = {name: sizes[name] for name in ("BLOCK_K", "BLOCK_V")}
                constants = {**flags, "BLOCK_S": _MAX_SPLITS, **block}
                warps = sizes["num_warps"]
                yield AotConfig(_mixture_logp_kernel, types, constants, warps, aligned=aligned)
