"""The marginal distribution of the next token in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrag.ops import backends
from fastrag.testing import assert_close

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels.mixture_logp import BLOCK_V, mixture_logp, splits  # noqa: E402

# G, K, V, width: one comment per regime
SHAPES = {
    "one": (1, 1, 1, 64),
    "odd": (3, 5, 131, 192),  # below a block, one split
    "splits": (2, 3, 2 * BLOCK_V + 77, 2 * BLOCK_V + 128),
    "unequal splits": (1, 2, 17 * BLOCK_V + 1, 17 * BLOCK_V + 64),  # more blocks than splits
    "no padding": (1, 3, BLOCK_V + 5, BLOCK_V + 5),
    "many passages": (1, 70, 37, 64),
}
HEADS = {
    "plain": (None, 1.0, None),
    "bias": (torch.float32, 1.3, None),
    "half bias, softcap": (torch.float16, 0.7, 2.0),
}
Head = tuple[Tensor | None, float, float | None]


def inputs(shape: tuple[int, ...], head: tuple[torch.dtype | None, float, float | None]):
    """Logits and bias whose padding is NaN, and a prior without the second passage."""
    n_questions, n_passages, vocab, width = shape
    raw = torch.full((n_questions * n_passages, width), torch.nan)
    raw[:, :vocab] = 3.0 * torch.randn(len(raw), vocab)
    scores = torch.randn(n_questions, n_passages)
    if n_passages > 1:
        scores[0, 1] = -torch.inf
    bias_dtype, *rest = head
    bias = None
    if bias_dtype is not None:
        bias = torch.full((width,), torch.nan, dtype=bias_dtype)
        bias[:vocab] = torch.randn(vocab)
    return raw, scores.log_softmax(1), (bias, *rest)


def oracle(raw: Tensor, prior: Tensor, head: Head, vocab: int, dtype: torch.dtype):
    bias, logit_scale, softcap = head
    z = raw[:, :vocab].to(dtype)
    z = logit_scale * (z if bias is None else z + bias[:vocab].to(dtype))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.view(*prior.shape, vocab)
    joint = prior.to(dtype).unsqueeze(2) + z.log_softmax(2)
    return joint.logsumexp(1), z.logsumexp(2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_values(shape, head) -> None:
    raw, prior, head = inputs(shape, head)
    vocab = shape[2]
    found = mixture_logp(raw, prior, *head, vocab_size=vocab)
    plain, true = (oracle(raw, prior, head, vocab, d) for d in (torch.float32, torch.float64))
    for name, got, base, right in zip(("mixture", "log Z"), found, plain, true, strict=True):
        assert got.shape == right.shape
        assert_close(got, base, right, name=name, scale=1.0)


def test_large_logits_forbidden_words_and_nan() -> None:
    raw, _, head = inputs(SHAPES["splits"], HEADS["plain"])
    vocab = SHAPES["splits"][2]
    prior = torch.tensor([[0.0, -torch.inf, -torch.inf], [-1.0, -2.0, -0.7]]).log_softmax(1)
    raw += 1e4
    raw[:, :BLOCK_V] = -torch.inf  # a whole split
    expected, expected_log_z = oracle(raw, prior, head, vocab, torch.float64)
    found, log_z = mixture_logp(raw, prior, *head, vocab_size=vocab)
    # log p is the difference to log Z of 1e4, which is taken before anything is rounded.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(log_z.double(), expected_log_z, rtol=1e-6, atol=0.0)
    assert found[:, :BLOCK_V].isneginf().all()
    raw[4, vocab - 1] = torch.nan
    broken, _ = mixture_logp(raw, prior, *head, vocab_size=vocab)
    assert broken[1].isnan().all() and broken[0].equal(found[0])


@pytest.mark.parametrize("n", [1, 20, 300])
@pytest.mark.parametrize("vocab", [1, BLOCK_V, 5 * BLOCK_V + 1, 50265, 256_000])
def test_splits_cover_the_vocabulary(n: int, vocab: int) -> None:
    n_splits, size = splits(n, vocab)
    assert 1 <= n_splits <= 16 and size % BLOCK_V == 0
    assert (n_splits - 1) * size < vocab <= n_splits * size


def test_the_operation_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs with an odd vocabulary and mixed dtypes, and refuses larger K by name."""
    from fastrag.ops import mixture_logp as op

    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    for dtypes in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        hidden, weight = torch.randn(2, 3, 16).to(dtypes[0]), torch.randn(77, 16).to(dtypes[1])
        prior, bias = torch.randn(2, 3).log_softmax(1), torch.randn(77).to(dtypes[1])
        found = op.mixture_logp(hidden, weight, prior, bias, 3.0, 0.25)
        expected = op.torch_mixture_logp(hidden, weight, prior, bias, 3.0, 0.25)
        for got, right in zip(found, expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    with pytest.raises(backends.BackendError, match="expected K of at most 256, got 257"):
        op.mixture_logp(torch.randn(1, 257, 8), torch.randn(5, 8), prior, None, None, 1.0)
