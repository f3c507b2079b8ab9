"""Rows far apart: their number and the pitch fit 32 bits, the product does not.

Pages that nobody touches cost nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrag.ops import backends

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels import mixture_pass, row_pass  # noqa: E402
from fastrag.kernels.linear_logp import linear_logp  # noqa: E402


def far_apart(rows: Tensor) -> Tensor:
    """The same three rows, the last of them 2**31 numbers behind the first."""
    pitch = 1 << 30
    storage = torch.UntypedStorage(rows.itemsize * (2 * pitch + 64))
    out = torch.tensor([], dtype=rows.dtype).set_(storage, 0, tuple(rows.shape), (pitch, 1))
    return out.copy_(rows)


@pytest.mark.parametrize("n_passages", [1, 3], ids=["three positions", "three passages"])
def test_mixture(n_passages: int) -> None:
    raw, gold = torch.randn(3, 5), torch.tensor([1, 1, 1])
    shape = (3 // n_passages, n_passages)
    prior = torch.randn(shape).log_softmax(1)
    results = []
    for z in (raw, far_apart(raw)):
        _, log_z, _ = row_pass.row_statistics(z, gold, None, 1.0, None)
        stats = (None, 1.0, None, *log_z, prior)
        smooth, share = mixture_pass.mixture_statistics(z, *stats)
        weights = (torch.ones(shape), torch.ones(shape), torch.ones(shape[0]))
        mixture_pass.mixture_gradient(z, gold, *stats, *weights, z)
        results.append((smooth, share, z))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows() -> None:
    raw, gold = torch.randn(3, 5), torch.tensor([0, 1, 2])
    results = []
    for z in (raw, far_apart(raw)):
        logp, log_z, mean = row_pass.row_statistics(z, gold, None, 1.0, None, with_mean=True)
        row_pass.row_gradient(z, gold, None, 1.0, None, log_z, torch.ones(3), 0.1, 5, z)
        results.append((logp, log_z, mean, z))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_linear_logp() -> None:
    x, weight, gold = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    results = []
    for w in (weight, far_apart(weight)):
        results.append(linear_logp(x, [(slice(0, 3), w)], gold, None, 1.0, None, 1))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
