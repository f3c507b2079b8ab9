"""Questions and passages as the tests of doc_scores meet them: one is missing, one comes twice."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Codes, random_codes


def inputs(
    dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int, int] = (3, 4, 5, 9)
) -> tuple[Tensor, Tensor, Tensor]:
    n_examples, n_passages, width, n = sizes
    query = torch.randn(n_examples, width, dtype=dtype).requires_grad_()
    index = torch.randn(n, width, dtype=dtype)
    rows = torch.randint(n, (n_examples, n_passages))
    rows[0, -1] = -1
    rows[1, 0] = rows[1, 1]  # a duplicate
    return query, index, rows


def int8_inputs(
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int, int] = (3, 4, 5, 9),
    with_offset: bool = True,
) -> tuple[Tensor, Codes, Tensor]:
    n_examples, n_passages, width, n = sizes
    query = torch.randn(n_examples, width, dtype=dtype).requires_grad_()
    rows = torch.randint(n, (n_examples, n_passages))
    rows[0, -1] = -1
    return query, random_codes(n, width, with_offset), rows


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x)
