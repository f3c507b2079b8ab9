"""The marginal distribution of the next token, from the states that predict it under K passages.

    log p(v) = log sum_k p(z_k) softmax(z_k)_v,    z = softcap tanh(scale (x W^T + b) / softcap)

For decoding: no gradient, all token ids, one position. Logits and sums are float32 at least.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastrag.ops import backends, workspace

backends.register(
    "products",
    cpp="fastrag.ops.cpp:products",
    torch="fastrag.ops.mixture_logp:products",
    triton="fastrag.ops.mixture_logp:products",  # the vendor's product of few rows
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
    unfit = {"cpp": functools.partial(_unfit_for_cpp, hidden, weight)}
    backend = backends.choose("products", hidden.device, hidden.dtype, unfit)
    z: Tensor = backends.load("products", backend)(hidden.flatten(0, 1), weight)
    z = head_of(z, bias, softcap, logit_scale).unflatten(0, hidden.shape[:2])
    log_z = z.logsumexp(dim=2)
    shift = log_prior.to(z.dtype) - log_z
    return z.add_(shift.unsqueeze(2)).logsumexp(dim=1), log_z


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


def _unfit_for_cpp(hidden: Tensor, weight: Tensor) -> str:
    if hidden.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it multiplies float32, got {hidden.dtype} and {weight.dtype}"
    return backends.strided(weight)


def products(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, H], weight [V, H] -> x W^T [n, V], in float32 at least."""
    dtype = workspace.accumulate_dtype(x.dtype)
    if x.dtype == weight.dtype != dtype and x.device.type == "cuda":
        return torch.mm(x, weight.t(), out_dtype=dtype)
    return linear(x.to(dtype), weight.to(dtype))
