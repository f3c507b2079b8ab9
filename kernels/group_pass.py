"""Marginal, posterior and row weights of groups of rows, in one launch instead of torch's fifteen.

    token     log M = log sum_k exp(a_k + l_k)                 w = softmax_k(a_k + l_k)
    sequence  log p(y|x) = log sum_k exp(a_k + sum_t l_kt)     w = softmax_k(a_k + sum_t l_kt)
                                                   (Lewis et al. 2020, sec. 2.1; a = log p(z|x))
    smoothed token  log M + e (mean_v M_v - log M)             target = w + e (mean_v r - w)

    d log-probability of a row = -u w             u: weight of the example, 0 for ignored labels
    d doc_scores = u (p - w) sequence, and summed over positions from `occupancy` = target for token

All arrays are [G, K], so this saves launches rather than bytes. Sums have a fixed order that is the
same for every k: passages with equal log-probabilities get the same posterior, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from torch import Tensor

# BLOCK_K, BLOCK_T and num_warps, the first that covers K.
_BLOCKS = ((8, 64, 1), (32, 32, 1), (128, 16, 4), (1024, 4, 8))
_BLOCK_ROWS = 256
MAX_PASSAGES = _BLOCKS[-1][0]


def blocks(n_passages: int) -> tuple[int, int, int]:
    """Return BLOCK_K, BLOCK_T and num_warps for K passages.

    Raises:
        ValueError: K is above the largest block.
    """
    fitting = [sizes for sizes in _BLOCKS if sizes[0] >= n_passages]
    if not fitting:
        raise ValueError(f"marginal_nll: expected K of at most {MAX_PASSAGES}, got {n_passages}")
    return fitting[0]


@triton.jit
def _marginal(joint):
    """Return log sum_k exp(joint) and log softmax_k(joint)."""
    peak = tl.max(joint, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    log_sum = tl.log(tl.sum(tl.exp(joint - peak), axis=0))
    # Not joint - (peak + log_sum): both may be far from 0, and their rounding would go into w.
    return peak + log_sum, (joint - peak) - log_sum


@triton.jit
def _token_group_kernel(
    logp_ptr,
    smooth_ptr,
    share_ptr,
    position_ptr,
    example_ptr,
    counted_ptr,
    prior_ptr,
    example_weight_ptr,
    bad_ptr,
    log_marginal_ptr,
    occupancy_ptr,
    log_post_ptr,
    token_logp_ptr,
    hit_ptr,
    target_ptr,
    spread_ptr,
    K,
    smoothing,
    spread,
    SMOOTHED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program owns one position: its K rows.
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    position = tl.load(position_ptr + pid)
    example = tl.load(example_ptr + pid)
    counted = tl.load(counted_ptr + pid) != 0
    bad = tl.load(bad_ptr + position) != 0
    logp = tl.load(logp_ptr + pid * K + offs_k, mask=mask_k, other=0.0)  # [BLOCK_K]
    logp = tl.where(bad, float("nan"), logp)
    prior = tl.load(prior_ptr + example * K + offs_k, mask=mask_k, other=float("-inf"))
    joint = tl.where(counted, prior + logp, 0.0)
    joint = tl.where(mask_k, joint, float("-inf"))
    log_marginal, log_post = _marginal(joint)
    posterior = tl.exp(log_post)
    upstream = tl.where(counted, tl.load(example_weight_ptr + example), 0.0)
    target = posterior
    if SMOOTHED:
        log_marginal += smoothing * (tl.load(smooth_ptr + pid) - log_marginal)
        share = tl.load(share_ptr + pid * K + offs_k, mask=mask_k, other=0.0)
        target += smoothing * (share - posterior)
        tl.store(target_ptr + pid * K + offs_k, upstream * target, mask=mask_k)
        tl.store(spread_ptr + pid, upstream * spread)
    hit = upstream * posterior * (1.0 - smoothing)
    tl.store(hit_ptr + pid * K + offs_k, hit, mask=mask_k)
    tl.store(log_marginal_ptr + position, tl.where(counted, log_marginal, 0.0))
    offs_out = position * K + offs_k
    tl.store(occupancy_ptr + offs_out, tl.where(counted, target, 0.0), mask=mask_k)
    tl.store(log_post_ptr + offs_out, log_post, mask=mask_k)
    tl.store(token_logp_ptr + offs_out, tl.where(counted, logp, 0.0), mask=mask_k)


@triton.jit
def _sequence_rows_kernel(
    logp_ptr,
    mean_ptr,
    row_ptr,
    position_ptr,
    counted_ptr,
    bad_ptr,
    token_logp_ptr,
    N,
    K,
    smoothing,
    SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program owns BLOCK_N rows.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    group = offs_n // K
    position = tl.load(position_ptr + group, mask=mask_n, other=0)
    counted = tl.load(counted_ptr + group, mask=mask_n, other=0) != 0
    bad = tl.load(bad_ptr + position, mask=mask_n, other=0) != 0
    logp = tl.load(logp_ptr + offs_n, mask=mask_n, other=0.0)
    if SMOOTHED:
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        logp += smoothing * (mean - logp)
    logp = tl.where(counted, tl.where(bad, float("nan"), logp), 0.0)
    row = tl.load(row_ptr + offs_n, mask=mask_n, other=0)
    tl.store(token_logp_ptr + row, logp, mask=mask_n)


@triton.jit
def _sequence_posterior_kernel(
    token_logp_ptr,
    prior_ptr,
    example_weight_ptr,
    active_ptr,
    nll_ptr,
    log_post_ptr,
    dscores_ptr,
    first,
    K,
    T,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program owns one example: its K rows of T log-probabilities.
    example = tl.program_id(0).to(tl.int64) + first
    offs_k = tl.arange(0, BLOCK_K)
    offs_t = tl.arange(0, BLOCK_T)
    mask_k = offs_k < K
    offs_tile = (example * K + offs_k)[:, None] * T + offs_t[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_T), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        mask_tile = mask_k[:, None] & (start + offs_t < T)[None, :]
        acc += tl.load(token_logp_ptr + offs_tile + start, mask=mask_tile, other=0.0)
    seq_logp = tl.sum(acc, axis=1)  # [BLOCK_K]

    active = tl.load(active_ptr + example) != 0
    offs_out = example * K + offs_k
    prior = tl.load(prior_ptr + offs_out, mask=mask_k, other=float("-inf"))
    joint = tl.where(active, prior + seq_logp, 0.0)
    joint = tl.where(mask_k, joint, float("-inf"))
    log_marginal, log_post = _marginal(joint)
    dscores = tl.where(active, tl.exp(prior) - tl.exp(log_post), 0.0)
    dscores *= tl.load(example_weight_ptr + example)
    tl.store(nll_ptr + example, tl.where(active, -log_marginal, 0.0))
    tl.store(log_post_ptr + offs_out, tl.where(active, log_post, prior), mask=mask_k)
    tl.store(dscores_ptr + offs_out, dscores, mask=mask_k)


@triton.jit
def _sequence_weights_kernel(
    log_post_ptr,
    example_weight_ptr,
    example_ptr,
    counted_ptr,
    weight_ptr,
    N,
    K,
    BLOCK_N: tl.constexpr,
):
    # One program owns BLOCK_N rows.
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    group = offs_n // K
    example = tl.load(example_ptr + group, mask=mask_n, other=0)
    counted = tl.load(counted_ptr + group, mask=mask_n, other=0) != 0
    log_post = tl.load(log_post_ptr + example * K + offs_n % K, mask=mask_n, other=0.0)
    upstream = tl.load(example_weight_ptr + example, mask=mask_n, other=0.0)
    weight = tl.where(counted, upstream * tl.exp(log_post), 0.0)
    tl.store(weight_ptr + offs_n, weight, mask=mask_n)


def token_group(
    logp: Tensor,
    mixture: tuple[Tensor, Tensor] | None,
    position: Tensor,
    example: Tensor,
    counted: Tensor,
    log_prior: Tensor,
    example_weight: Tensor,
    bad: Tensor,
    smoothing: float,
    spread: float,
    log_marginal: Tensor,
    occupancy: Tensor,
    log_post: Tensor,
    token_logp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp [G * K] -> hit [G, K], target [G, K] and spread [G], both empty without a mixture.

    Writes the entries `position` of log_marginal [P] and of occupancy, log_post and token_logp
    [P, K].
    """
    n_positions, n_passages = len(position), log_prior.shape[1]
    smoothed = mixture is not None
    hit = logp.new_empty(n_positions, n_passages)
    target = logp.new_empty((n_positions, n_passages) if smoothed else (0,))
    spreads = logp.new_empty(n_positions if smoothed else 0)
    block_k, _, num_warps = blocks(n_passages)
    with device_of(logp):
        _token_group_kernel[(n_positions,)](
            logp,
            *(mixture if mixture is not None else (logp, logp)),  # never read without SMOOTHED
            position,
            example,
            counted,
            log_prior,
            example_weight,
            bad,
            log_marginal,
            occupancy,
            log_post,
            token_logp,
            hit,
            target,
            spreads,
            n_passages,
            smoothing,
            spread,
            SMOOTHED=smoothed,
            BLOCK_K=block_k,
            num_warps=num_warps,
        )
    return hit, target, spreads


def sequence_rows(
    logp: Tensor,
    mean_logp: Tensor | None,
    chunk_rows: Tensor,
    position: Tensor,
    counted: Tensor,
    bad: Tensor,
    smoothing: float,
    token_logp: Tensor,
) -> None:
    """logp, mean_logp [n] -> token_logp[chunk_rows], 0 where the label does not count."""
    n_rows = len(chunk_rows)
    with device_of(logp):
        _sequence_rows_kernel[(triton.cdiv(n_rows, _BLOCK_ROWS),)](
            logp,
            logp if mean_logp is None else mean_logp,
            chunk_rows,
            position,
            counted,
            bad,
            token_logp,
            n_rows,
            n_rows // len(position),
            smoothing,
            SMOOTHED=mean_logp is not None,
            BLOCK_N=_BLOCK_ROWS,
            num_warps=4,
        )


def sequence_posterior(
    token_logp: Tensor,
    log_prior: Tensor,
    example_weight: Tensor,
    active: Tensor,
    first: int,
    last: int,
    nll: Tensor,
    log_post: Tensor,
    dscores: Tensor,
) -> None:
    """token_logp [B * K * T + 1] -> entries first to last of nll [B], log_post, dscores [B, K]."""
    n_examples, n_passages = log_prior.shape
    block_k, block_t, num_warps = blocks(n_passages)
    with device_of(log_prior):
        _sequence_posterior_kernel[(last - first,)](
            token_logp,
            log_prior,
            example_weight,
            active,
            nll,
            log_post,
            dscores,
            first,
            n_passages,
            (len(token_logp) - 1) // (n_examples * n_passages),
            BLOCK_K=block_k,
            BLOCK_T=block_t,
            num_warps=num_warps,
        )


def sequence_weights(
    log_post: Tensor, example_weight: Tensor, example: Tensor, counted: Tensor
) -> Tensor:
    """log_post [B, K], example, counted [G] -> example_weight * posterior of each row, [G * K]."""
    n_passages = log_post.shape[1]
    weight = log_post.new_empty(len(example) * n_passages)
    with device_of(log_post):
        _sequence_weights_kernel[(triton.cdiv(len(weight), _BLOCK_ROWS),)](
            log_post,
            example_weight,
            example,
            counted,
            weight,
            len(weight),
            n_passages,
            BLOCK_N=_BLOCK_ROWS,
            num_warps=4,
        )
    return weight


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: every block of K, with and without smoothing."""
    names = {name for kernel in _KERNELS for name in kernel.arg_names if name.endswith("_ptr")}
    types = {
        **dict.fromkeys(names, "*fp32"),
        **dict.fromkeys(("position_ptr", "example_ptr", "row_ptr"), "*i64"),
        **dict.fromkeys(("counted_ptr", "bad_ptr", "active_ptr"), "*i1"),
        **dict.fromkeys(("first", "K", "T", "N"), "i32"),
        **dict.fromkeys(("smoothing", "spread"), "fp32"),
    }
    rows = {"BLOCK_N": _BLOCK_ROWS}
    configs = [AotConfig(_sequence_weights_kernel, types, rows)]
    for smoothed in (False, True):
        flags = {"SMOOTHED": smoothed}
        configs.append(AotConfig(_sequence_rows_kernel, types, flags | rows))
        for block_k, _, num_warps in _BLOCKS:
            sizes = {"BLOCK_K": block_k}
            configs.append(AotConfig(_token_group_kernel, types, flags | sizes, num_warps))
    for block_k, block_t, num_warps in _BLOCKS:
        sizes = {"BLOCK_K": block_k, "BLOCK_T": block_t}
        configs.append(AotConfig(_sequence_posterior_kernel, types, sizes, num_warps))
    return configs


_KERNELS = (
    _token_group_kernel,
    _sequence_rows_kernel,
    _sequence_posterior_kernel,
    _sequence_weights_kernel,
)
