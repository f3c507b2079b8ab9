"""log p(y) without logits, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrag import reference
from fastrag.ops import backends
from fastrag.testing import assert_close

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels.linear_logp import linear_logp, splits  # noqa: E402

# n, H, V: one comment per regime
SHAPES = {
    "one": (1, 1, 1),
    "odd": (5, 19, 131),  # nothing divides anything, two tiles of V
    "several row blocks": (130, 16, 70),
    "several tiles": (3, 80, 517),
}
HEADS = {"plain": (False, 1.0, None), "softcap": (True, 0.7, 2.0)}


def whole(weight: Tensor) -> list[tuple[slice, Tensor]]:
    return [(slice(0, weight.shape[0]), weight)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("n_splits", [1, 3])
def test_values(shape, head, dtype: torch.dtype, n_splits: int) -> None:
    n, width, vocab = shape
    x, weight = torch.randn(n, width).to(dtype), torch.randn(vocab, width).to(dtype)
    has_bias, logit_scale, softcap = head
    bias = torch.randn(vocab).to(dtype) if has_bias else None
    gold = torch.randint(vocab, (n,))
    gold[0], gold[-1] = min(127, vocab - 1), vocab - 1

    def oracle(to: torch.dtype) -> tuple[Tensor, Tensor]:
        cast_bias = None if bias is None else bias.to(to)
        z = reference.logits(x.to(to), weight.to(to), cast_bias, softcap, logit_scale)
        return z.log_softmax(1).gather(1, gold.unsqueeze(1)).squeeze(1), z.logsumexp(1)

    logp, log_z = linear_logp(x, whole(weight), gold, bias, logit_scale, softcap, n_splits)
    plain, true = oracle(torch.float32), oracle(torch.float64)
    assert_close(logp, plain[0], true[0], scale=1.0)
    assert_close(log_z.sum(0), plain[1], true[1], name="log Z", scale=1.0)
    assert 1 <= splits(n, vocab, dtype) <= 64
    if vocab > 64:
        cut = [(slice(0, 64), weight[:64]), (slice(64, vocab), weight[64:])]
        again, _ = linear_logp(x, cut, gold, bias, logit_scale, softcap, n_splits)
        assert_close(again, logp, true[0], scale=1.0)


def test_strided_weight_forbidden_words_and_nan() -> None:
    x, weight = torch.randn(3, 8), torch.randn(200, 8)
    bias = torch.zeros(200)
    bias[:128] = -torch.inf
    gold = torch.tensor([130, 140, 199])
    expected = (x @ weight.t() + bias).log_softmax(1).gather(1, gold.unsqueeze(1)).squeeze(1)
    strided = weight.t().contiguous().t()
    logp, _ = linear_logp(x, whole(strided), gold, bias, 1.0, None, 2)
    torch.testing.assert_close(logp, expected)
    x[1, 3] = torch.nan
    found, _ = linear_logp(x, whole(weight), gold, bias, 1.0, None, 2)
    assert found[1].isnan() and torch.equal(found[[0, 2]], logp[[0, 2]])
