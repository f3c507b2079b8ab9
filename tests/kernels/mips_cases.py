"""What the tests of the search share, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

import fastrag.functional as F
from tests.ops.codes import random_codes

STORED = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
Found = tuple[Tensor, Tensor]


def random_index(n: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, dict]:
    """Passages of random size in `dtype`, and the scale and offset of codes."""
    if dtype == torch.int8:
        stored = random_codes(n, dim, device=device)
        return stored.codes, stored.options()
    vectors = torch.randn(n, dim, device=device) * (0.5 + torch.rand(n, 1, device=device))
    return vectors.to(dtype), {}


def whole_numbers(n: int, dim: int, high: int = 3, device: str = "cpu") -> Tensor:
    """Every inner product is exact in any order, and ties abound."""
    return torch.randint(-high, high + 1, (n, dim), device=device).float()


def on_cpu(query: Tensor, index: Tensor, k: int, **options: Tensor | None) -> Found:
    """The answer of the C++ search, which is made of the same sums."""
    moved = {name: None if x is None else x.cpu() for name, x in options.items()}
    return F.mips_topk(query.cpu(), index.cpu(), k, **moved)


def same(found: Found, expected: Found) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def widened(index: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """The float32 that is stored; of codes scale * code + offset, rounded once."""
    if scale is None or offset is None:
        return index.float()
    return (index.double() * scale.double() + offset.double()).float()


def one_after_another(query: Tensor, vectors: Tensor, k: int, exclude: Tensor | None) -> Found:
    """The same sums without the extension, on any device; exclude is bool [N]."""
    scores = torch.zeros(len(query), len(vectors), device=query.device)
    for d in range(query.shape[1]):
        product = query[:, d, None].double() * vectors[None, :, d].double()  # exact
        scores = (product + scores).float()
    if exclude is not None:
        scores[:, exclude] = -torch.inf
    scores, rows = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    return scores[:, :k].cpu(), rows[:, :k].cpu()
