"""Scores of K passages for each question, and log p(z|x), in one launch; forward and backward.

    s[b,k] = q_b . d_bk / tau                          (-inf where the passage is missing)
    a[b,k] = s[b,k] - logsumexp_k s[b,k] = log p(z_k | x_b)      (Lewis et al. 2020, sec. 2.2)

    ds[b,k] = g_s[b,k] + g_a[b,k] - exp(a[b,k]) sum_j g_a[b,j]   (upstream g_s of s, g_a of a)
    dq_b = sum_k ds_bk d_bk / tau,   dd_bk = ds_bk q_b / tau

Passages are re-encoded, [B, K, D], or rows of the index matrix [N, D] gathered by `rows` [B, K]. If
they are int8 codes c with scale r and offset m, d = m + r c, and

    s[b,k] = (sum_i (q_bi r_i) c_bki + sum_i q_bi m_i) / tau
    dq_b   = (r sum_k ds_bk c_bk + m sum_k ds_bk) / tau           (no gradient to c, r, m)

Memory traffic, w bytes per stored number of a passage, u of a query: forward B D (w K + u) + 8 B K
read, 8 B K written; the backward to q reads the same vectors again and writes u B D. With int8,
w = 1, a quarter of float32, and 8 D more are read for scale and offset, mostly from cache. Not
materialised: the gathered [B, K, D], which a framework writes and reads again (3 times the traffic,
or 9 times with int8, where it writes float32 vectors), and any [B, K] between product and softmax.

Storage float32, float16, bfloat16 or int8, converted on load; products and sums in float32. Every
sum has a fixed order and there are no atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastrag.kernels.aot import AotConfig
from fastrag.kernels.launch import device_of
from torch import Tensor

# K is covered by one block of these: four code paths to compile and test rather than ten.
_BLOCKS_K = (8, 32, 128, 1024)
# Components of passage vectors in flight per program. Each may need a 64-bit address of its own
# (an index with odd strides), so 16 a thread is what fits the registers.
_TILE = 2048


def blocks(n_passages: int) -> dict[str, int]:
    """Return BLOCK_K, BLOCK_D and num_warps for K passages.

    Raises:
        ValueError: K is above the largest block.
    """
    fitting = [block for block in _BLOCKS_K if block >= n_passages]
    if not fitting:
        raise ValueError(f"doc_scores: expected K of at most {_BLOCKS_K[-1]}, got {n_passages}")
    block_k = fitting[0]
    block_d = max(4, _TILE // block_k)  # at least 16 bytes of a float32 row at a time
    return {"BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": block_k * block_d // 512}


@triton.jit
def _doc_scores_fwd_kernel(
    query_ptr,
    passage_ptr,
    rows_ptr,
    scale_ptr,
    offset_ptr,
    scores_ptr,
    prior_ptr,
    K,
    D,
    N,
    stride_query_b,
    stride_query_d,
    stride_passage_b,
    stride_passage_k,
    stride_passage_d,
    stride_rows_b,
    stride_rows_k,
    tau,
    HAS_ROWS: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns one question: all of its K scores, so the softmax needs no second launch.
    pid_b = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    mask_k = offs_k < K
    present = mask_k
    readable = mask_k
    offs_passage = pid_b * stride_passage_b + offs_k.to(tl.int64) * stride_passage_k  # [BLOCK_K]
    if HAS_ROWS:
        rows_ptrs = rows_ptr + pid_b * stride_rows_b + offs_k.to(tl.int64) * stride_rows_k
        row = tl.load(rows_ptrs, mask=mask_k, other=-1).to(tl.int64)  # [BLOCK_K]
        present = row >= 0
        readable = present
        if GATHER:
            readable = present & (row < N)
            offs_passage = row * stride_passage_k

    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    base = tl.zeros((BLOCK_D,), dtype=tl.float32)  # q . offset, the same for all passages
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d < D
        offs_query = pid_b * stride_query_b + (start + offs_d).to(tl.int64) * stride_query_d
        query = tl.load(query_ptr + offs_query, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        if HAS_OFFSET:
            base += query * tl.load(offset_ptr + start + offs_d, mask=mask_d, other=0.0)
        if HAS_SCALE:
            query *= tl.load(scale_ptr + start + offs_d, mask=mask_d, other=0.0)
        offs_column = (start + offs_d).to(tl.int64) * stride_passage_d
        offs_tile = offs_passage[:, None] + offs_column[None, :]
        mask_tile = readable[:, None] & mask_d[None, :]
        passage = tl.load(passage_ptr + offs_tile, mask=mask_tile, other=0)  # [BLOCK_K, BLOCK_D]
        acc += passage.to(tl.float32) * query[None, :]

    if HAS_OFFSET:
        acc += base[None, :]
    scores = tl.div_rn(tl.sum(acc, axis=1), tau)  # [BLOCK_K]
    scores = tl.where(present, scores, float("-inf"))
    if GATHER:
        # A row beyond the index would be read out of bounds; its example becomes NaN instead.
        scores = tl.where(present & (row >= N), float("nan"), scores)
    peak = tl.max(scores, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # no passage at all
    total = tl.sum(tl.exp(scores - peak), axis=0)
    log_sum = tl.log(tl.where(total == 0.0, 1.0, total))
    prior = tl.where(present, (scores - peak) - log_sum, float("-inf"))

    offs_out = pid_b * K + offs_k
    tl.store(scores_ptr + offs_out, scores, mask=mask_k)
    tl.store(prior_ptr + offs_out, prior, mask=mask_k)


@triton.jit
def _load_ds(dscores_ptr, dprior_ptr, prior_ptr, offs_k, mask_k, tau, HAS_DPRIOR: tl.constexpr):
    """Return ds / tau of one question, 0 for missing passages, and the mask of existing ones."""
    prior = tl.load(prior_ptr + offs_k, mask=mask_k, other=float("-inf"))
    present = prior != float("-inf")
    ds = tl.load(dscores_ptr + offs_k, mask=present, other=0.0).to(tl.float32)
    if HAS_DPRIOR:
        dprior = tl.load(dprior_ptr + offs_k, mask=present, other=0.0).to(tl.float32)
        ds += dprior - tl.exp(prior) * tl.sum(dprior, axis=0)
    return tl.where(present, tl.div_rn(ds, tau), 0.0), present


@triton.jit
def _doc_scores_dquery_kernel(
    dscores_ptr,
    dprior_ptr,
    prior_ptr,
    passage_ptr,
    rows_ptr,
    scale_ptr,
    offset_ptr,
    dquery_ptr,
    K,
    D,
    N,
    stride_passage_b,
    stride_passage_k,
    stride_passage_d,
    stride_rows_b,
    stride_rows_k,
    tau,
    GATHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_DPRIOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_D components of one question's gradient; each computes ds [K] again.
    pid_b = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = (pid_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_k = offs_k < K
    mask_d = offs_d < D
    offs_bk = pid_b * K + offs_k
    ds, present = _load_ds(dscores_ptr, dprior_ptr, prior_ptr, offs_bk, mask_k, tau, HAS_DPRIOR)

    readable = present
    offs_passage = pid_b * stride_passage_b + offs_k.to(tl.int64) * stride_passage_k  # [BLOCK_K]
    if GATHER:
        rows_ptrs = rows_ptr + pid_b * stride_rows_b + offs_k.to(tl.int64) * stride_rows_k
        row = tl.load(rows_ptrs, mask=present, other=0).to(tl.int64)  # [BLOCK_K]
        readable = present & (row < N)
        offs_passage = row * stride_passage_k
    offs_tile = offs_passage[:, None] + offs_d[None, :] * stride_passage_d
    mask_tile = readable[:, None] & mask_d[None, :]
    passage = tl.load(passage_ptr + offs_tile, mask=mask_tile, other=0)  # [BLOCK_K, BLOCK_D]
    dquery = tl.sum(ds[:, None] * passage.to(tl.float32), axis=0)  # [BLOCK_D]
    if HAS_SCALE:
        dquery *= tl.load(scale_ptr + offs_d, mask=mask_d, other=0.0)
    if HAS_OFFSET:
        dquery += tl.sum(ds, axis=0) * tl.load(offset_ptr + offs_d, mask=mask_d, other=0.0)
    tl.store(dquery_ptr + pid_b * D + offs_d, dquery, mask=mask_d)


@triton.jit
def _doc_scores_dpassage_kernel(
    dscores_ptr,
    dprior_ptr,
    prior_ptr,
    query_ptr,
    dpassage_ptr,
    K,
    D,
    stride_query_b,
    stride_query_d,
    tau,
    HAS_DPRIOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_D components of the gradients of one question's K fresh passages.
    pid_b = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = (pid_d * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_k = offs_k < K
    mask_d = offs_d < D
    offs_bk = pid_b * K + offs_k
    ds, _ = _load_ds(dscores_ptr, dprior_ptr, prior_ptr, offs_bk, mask_k, tau, HAS_DPRIOR)

    offs_query = pid_b * stride_query_b + offs_d * stride_query_d
    query = tl.load(query_ptr + offs_query, mask=mask_d, other=0.0)  # [BLOCK_D]
    dpassage = ds[:, None] * query.to(tl.float32)[None, :]  # [BLOCK_K, BLOCK_D]
    offs_tile = offs_bk[:, None] * D + offs_d[None, :]
    tl.store(dpassage_ptr + offs_tile, dpassage, mask=mask_k[:, None] & mask_d[None, :])


def doc_scores_fwd(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D]; passage_emb [B, K, D], or [N, D] with rows [B, K] -> s, log_prior.

    int8 passages come with a scale [D] and perhaps an offset [D], both float32.
    """
    n_examples, n_passages = passage_emb.shape[:2] if rows is None else rows.shape
    scores = query_emb.new_empty((n_examples, n_passages), dtype=torch.float32)
    log_prior = torch.empty_like(scores)
    with device_of(query_emb):
        _doc_scores_fwd_kernel[(n_examples,)](
            query_emb,
            passage_emb,
            rows if rows is not None else query_emb,  # never read without HAS_ROWS
            *_affine(scale, offset, query_emb),
            scores,
            log_prior,
            n_passages,
            query_emb.shape[1],
            passage_emb.shape[0],
            *query_emb.stride(),
            *_passage_strides(passage_emb),
            *(rows.stride() if rows is not None else (0, 0)),
            float(tau),
            HAS_ROWS=rows is not None,
            GATHER=passage_emb.dim() == 2,
            HAS_SCALE=scale is not None,
            HAS_OFFSET=offset is not None,
            **blocks(n_passages),
        )
    return scores, log_prior


def doc_scores_bwd(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query_emb and passage_emb [B, K, D], in their dtypes, if needed."""
    n_examples, n_passages = log_prior.shape
    gather = passage_emb.dim() == 2
    dquery = query_emb.new_empty(query_emb.shape if need_dq else 0)
    dpassage = passage_emb.new_empty(passage_emb.shape if need_dp else 0)
    if dscores is None:
        dscores = torch.zeros_like(log_prior)
    upstream = (
        dscores.contiguous(),
        log_prior if dlog_prior is None else dlog_prior.contiguous(),
        log_prior,
    )
    options = {"HAS_DPRIOR": dlog_prior is not None, **blocks(n_passages)}
    width = query_emb.shape[1]
    grid = (n_examples, triton.cdiv(width, options["BLOCK_D"]))
    with device_of(query_emb):
        if need_dq:
            _doc_scores_dquery_kernel[grid](
                *upstream,
                passage_emb,
                rows if gather else query_emb,  # never read without GATHER
                *_affine(scale, offset, query_emb),
                dquery,
                n_passages,
                width,
                passage_emb.shape[0],
                *_passage_strides(passage_emb),
                *(rows.stride() if rows is not None and gather else (0, 0)),
                float(tau),
                GATHER=gather,
                HAS_SCALE=scale is not None,
                HAS_OFFSET=offset is not None,
                **options,
            )
        if need_dp:
            _doc_scores_dpassage_kernel[grid](
                *upstream,
                query_emb,
                dpassage,
                n_passages,
                width,
                *query_emb.stride(),
                float(tau),
                **options,
            )
    return dquery, dpassage


def aot_configs() -> list[AotConfig]:
    """Return what the gate compiles: unit strides along D; queries in float32 or like the passages.

    The backward is compiled for equal dtypes alone, and for int8 with queries in float32: a
    conversion on load is all that others add.
    """
    configs = []
    for n_passages in _BLOCKS_K:
        for stored in ("fp32", "fp16", "bf16", "i8"):
            int8 = stored == "i8"
            dtype = "fp32" if int8 else stored  # of queries and gradients
            for has_offset in (False, True) if int8 else (False,):
                codes = {"HAS_SCALE": int8, "HAS_OFFSET": has_offset}
                # Queries of any dtype meet an index of any other: conversion on load.
                configs += [
                    _config(_doc_scores_fwd_kernel, n_passages, query, stored, **flags, **codes)
                    for query, flags in (
                        ("fp32", {"HAS_ROWS": True, "GATHER": True}),
                        (dtype, {"HAS_ROWS": True, "GATHER": False}),
                        (dtype, {"HAS_ROWS": False, "GATHER": False}),
                    )
                ]
                configs += [
                    _config(_doc_scores_dquery_kernel, n_passages, dtype, stored, **flags, **codes)
                    for flags in (
                        {"GATHER": gather, "HAS_DPRIOR": has_dprior}
                        for gather in (False, True)
                        for has_dprior in (False, True)
                    )
                ]
            if not int8:
                configs += [
                    _config(_doc_scores_dpassage_kernel, n_passages, dtype, dtype, HAS_DPRIOR=has)
                    for has in (False, True)
                ]
    return configs


def _config(
    kernel: triton.JITFunction, n_passages: int, query: str, passage: str, **flags: bool
) -> AotConfig:
    sizes = blocks(n_passages)
    num_warps = sizes.pop("num_warps")
    types = {
        **dict.fromkeys(("query_ptr", "dquery_ptr"), f"*{query}"),
        **dict.fromkeys(("passage_ptr", "dpassage_ptr"), f"*{passage}"),
        **dict.fromkeys(("scores_ptr", "prior_ptr", "dscores_ptr", "dprior_ptr"), "*fp32"),
        **dict.fromkeys(("scale_ptr", "offset_ptr"), "*fp32"),
        **dict.fromkeys(("K", "D", "stride_rows_b", "stride_rows_k"), "i32"),
        # The widest and least aligned that a caller can bring: small strides compile to less.
        **dict.fromkeys(("N", "stride_query_b", "stride_passage_b", "stride_passage_k"), "i64"),
        "rows_ptr": "*i64",
        "tau": "fp32",
    }
    constants = {"stride_query_d": 1, "stride_passage_d": 1, **flags, **sizes}
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return AotConfig(kernel, types, used, num_warps)


def _passage_strides(passage_emb: Tensor) -> tuple[int, ...]:
    """Return the strides of question, passage and component; 0 for questions of an index matrix."""
    strides = passage_emb.stride()
    return strides if passage_emb.dim() == 3 else (0, *strides)


def _affine(scale: Tensor | None, offset: Tensor | None, unread: Tensor) -> tuple[Tensor, ...]:
    """Return scale and offset for the kernels; `unread`, which they do not read, replaces None."""
    return tuple(unread if x is None else x.contiguous() for x in (scale, offset))
