"""Tensors on a CPU as the C++ kernels take them: the memory itself, without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from fastrag.ops import backends


def unfit(matrix: Tensor) -> str:
    """Why the kernels cannot read the rows of a matrix [N, D] in place; empty if they can."""
    n, dim = matrix.shape
    if (dim > 1 and matrix.stride(1) != 1) or (n > 1 and matrix.stride(0) < dim):
        return f"it reads rows in place, got an index with strides {matrix.stride()}"
    return ""


def matrix(
    index_emb: Tensor, scale: Tensor | None = None, offset: Tensor | None = None
) -> dict[str, Any]:
    """A matrix of any storage; numpy has no bfloat16, whose bits go as uint16."""
    stored = index_emb.detach()
    if stored.dtype == torch.bfloat16:
        stored = stored.view(torch.uint16)
    if scale is not None and offset is None:
        offset = torch.zeros_like(scale)
    return {"index_emb": stored.numpy(), "scale": array(scale), "offset": array(offset)}


def array(x: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    return None if x is None else x.detach().to(dtype or x.dtype).contiguous().numpy()


def capsule(x: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """As `array`, for the kernels that take DLPack too: a small call is mostly its ndarrays."""
    if x is None:
        return None
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    return to_dlpack(x.contiguous())


def options() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "isa": backends.forced_isa(),
    }
