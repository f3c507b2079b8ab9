"""The marginal distribution of the next token, from the states that predict it under K passages.

    log p(v) = log sum_k p(z_k) softmax(z_k)_v,    z = softcap tanh(scale (x W^T + b) / softcap)

For decoding: no gradient, all token ids, one position. Logits and sums are float32 at least.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrag.ops import backends, workspace
from fastrag.ops.marginal_nll import TRITON_MAX_MIXED

# On a GPU, the vendor's product of few rows.
backends.register(
    "head_products",
    cpp="fastrag.ops.cpp:head_products",
    torch="fastrag.ops.mixture_logp:torch_head_products",
    triton="fastrag.ops.mixture_logp:torch_head_products",
)
backends.register(
    "mixture_logp",
    cpp="fastrag.ops.cpp:mixture_logp",
    torch="fastrag.ops.mixture_logp:torch_mixture_logp",
    triton="fastrag.ops.triton_decoding:mixture_logp",
)


def mixture_logp(
    hidden: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """hidden [n, K, H], weight [V, H], log_prior [n, K] -> log p(v) [n, V], log_z [n, K].

    log_z[k] = log sum_v exp(z_kv), so that log p(v|z_k) = z_kv - log_z[k].
    """
    run = _implementation("mixture_logp", hidden, weight)
    found: tuple[Tensor, Tensor] = run(hidden, weight, log_prior, bias, softcap, logit_scale)
    return found


def head_products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """hidden [n, H], weight [V, H] -> x W^T [n, V], and log_z [n] of the logits z."""
    run = _implementation("head_products", hidden, weight)
    found: tuple[Tensor, Tensor] = run(hidden, weight, bias, softcap, logit_scale)
    return found


def chosen_logit(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """hidden [n, K, T, H], weight [V, H], tokens [n, T] -> their logits z [n, K, T]."""
    dtype = workspace.accumulate_dtype(hidden.dtype)
    x, w = hidden.to(dtype), weight[tokens].to(dtype)  # [n, K, T, H], [n, T, H]
    z = (x * w.unsqueeze(1)).sum(dim=3)
    picked = None if bias is None else bias[tokens].to(dtype).unsqueeze(1)
    return head_of(z, picked, softcap, logit_scale)


def head_of(z: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """Return the logits of products x W^T, which may be changed."""
    if bias is not None:
        z = z.add_(bias)
    if logit_scale != 1.0:
        z = z.mul_(logit_scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def torch_mixture_logp(
    hidden: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    z = head_of(_products(hidden.flatten(0, 1), weight), bias, softcap, logit_scale)
    z = z.unflatten(0, hidden.shape[:2])
    log_z = z.logsumexp(dim=2)
    shift = log_prior.to(z.dtype) - log_z
    return z.add_(shift.unsqueeze(2)).logsumexp(dim=1), log_z


def torch_head_products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    z0 = _products(hidden, weight)
    plain = bias is None and softcap is None and logit_scale == 1.0
    z = z0 if plain else head_of(z0.clone(), bias, softcap, logit_scale)
    return z0, z.logsumexp(dim=1)


def _implementation(op: str, hidden: Tensor, weight: Tensor) -> Any:
    unfit = {
        "cpp": functools.partial(_unfit_for_cpp, hidden, weight),
        "triton": functools.partial(_unfit_for_triton, hidden),
    }
    return backends.load(op, backends.choose(op, hidden.device, hidden.dtype, unfit))


def _unfit_for_triton(hidden: Tensor) -> str:
    if hidden.dim() == 3 and hidden.shape[1] > TRITON_MAX_MIXED:
        return f"expected K of at most {TRITON_MAX_MIXED}, got {hidden.shape[1]}"
    return ""


def _unfit_for_cpp(hidden: Tensor, weight: Tensor) -> str:
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it multiplies float32, got {hidden.dtype} and {weight.dtype}"
    return backends.strided(weight)


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, H], weight [V, H] -> x W^T [n, V], in float32 at least."""
    dtype = workspace.accumulate_dtype(x.dtype)
    if x.dtype == weight.dtype != dtype and x.device.type == "cuda":
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return linear(x.to(dtype), weight.to(dtype))
