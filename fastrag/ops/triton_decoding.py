"""The triton backend of `mixture_logp`: a cuBLAS product of few rows, then two Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.kernels import mixture_logp as kernels
from fastrag.ops.chunks import add_product
from fastrag.ops.triton_chunks import padded, padded_bias


def mixture_logp(
    hidden: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """hidden [n, K, H], weight [V, H], log_prior [n, K] -> log p(v) [n, V], log_z [n, K]."""
    n_vocab = weight.shape[0]
    x = hidden.flatten(0, 1)
    if x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    raw = x.new_empty(len(x), padded(n_vocab), dtype=torch.float32)
    add_product(raw[:, :n_vocab], x, weight.t(), first=True)
    return kernels.mixture_logp(
        raw,
        log_prior.float().contiguous(),
        None if bias is None else padded_bias(bias),
        logit_scale,
        softcap,
        vocab_size=n_vocab,
    )
