"""Row statistics, gradients and the smoothed mixture in the interpreter, against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastrag.ops import backends
from fastrag.testing import assert_close

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.kernels import mixture_pass, row_pass  # noqa: E402

BLOCK = row_pass.BLOCK_V
# n, V, pitch: one comment per regime
SHAPES = {
    "one": (1, 1, 64),
    "below a block": (3, 131, 192),
    "a block": (2, BLOCK, BLOCK),
    "a block and one": (2, BLOCK + 1, BLOCK + 64),
    "three blocks": (2, 2 * BLOCK + 77, 2 * BLOCK + 128),
}
HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.3, None),
    "softcap": (True, 0.7, 2.0),
    "saturated": (False, 1.0, 0.05),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
Head = tuple[Tensor | None, float, float | None]


def inputs(
    shape: tuple[int, int, int], head: tuple[bool, float, float | None], dtype=torch.float32
) -> tuple[Tensor, Tensor, Head]:
    """Rows in a padded buffer whose padding is NaN; labels at both ends of the vocabulary."""
    n, vocab, pitch = shape
    raw = torch.full((n, pitch), torch.nan)[:, :vocab]
    raw.copy_(3.0 * torch.randn(n, vocab))
    gold = torch.randint(vocab, (n,))
    gold[0], gold[-1] = min(vocab, BLOCK) - 1, vocab - 1
    has_bias, logit_scale, softcap = head
    return raw, gold, (torch.randn(vocab).to(dtype) if has_bias else None, logit_scale, softcap)


def log_softmax(raw: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    bias, logit_scale, softcap = head
    z = raw.to(dtype)
    z = logit_scale * (z if bias is None else z + bias.to(dtype))
    return (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(1)


def picked(logp: Tensor, gold: Tensor) -> Tensor:
    return logp.gather(1, gold.unsqueeze(1)).squeeze(1)


def copy_of(raw: Tensor) -> Tensor:
    """In a buffer of the same pitch."""
    return torch.full((raw.shape[0], raw.stride(0)), torch.nan)[:, : raw.shape[1]].copy_(raw)


def with_padding(raw: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The whole rows, and a bias of their width; their padding is NaN."""
    bias, *rest = head
    if bias is not None:
        wide = torch.full((raw.stride(0),), torch.nan)
        wide[: len(bias)] = bias
        bias = wide
    return torch.as_strided(raw, (raw.shape[0], raw.stride(0)), raw.stride()), (bias, *rest)


@shapes
@heads
@pytest.mark.parametrize("with_mean", [False, True], ids=["gold", "gold and mean"])
def test_statistics(shape, head, with_mean: bool) -> None:
    raw, gold, head = inputs(shape, head)
    logp, _, mean = row_pass.row_statistics(raw, gold, *head, with_mean=with_mean)
    plain, true = (log_softmax(raw, head, dtype) for dtype in (torch.float32, torch.float64))
    assert_close(logp, picked(plain, gold), picked(true, gold), scale=1.0)
    assert (mean is not None) == with_mean
    if mean is not None:
        assert_close(mean, plain.mean(1), true.mean(1), scale=1.0)


@shapes
@heads
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient(shape, head, smoothing: float, dtype: torch.dtype) -> None:
    raw, gold, head = inputs(shape, head)
    weight = torch.randn(len(gold))

    def oracle(to: torch.dtype) -> Tensor:
        leaf = raw.to(to).requires_grad_()
        logp = log_softmax(leaf, head, to)
        loss = -torch.lerp(picked(logp, gold), logp.mean(1), smoothing) * weight.to(to)
        return torch.autograd.grad(loss.sum(), leaf)[0]

    _, log_z, _ = row_pass.row_statistics(raw, gold, *head)
    args = (raw, gold, *head, log_z, weight, smoothing, raw.shape[1])
    out = torch.full((len(gold), raw.stride(0)), torch.nan, dtype=dtype)[:, : raw.shape[1]]
    row_pass.row_gradient(*args, out)
    assert_close(out, oracle(torch.float32).to(dtype), oracle(torch.float64), scale=1e-3)
    assert (
        torch.as_strided(out, (len(gold), raw.stride(0)), out.stride())[:, raw.shape[1] :]
        .isnan()
        .all()
    )
    if dtype == torch.float32:
        row_pass.row_gradient(*args, raw)
        assert torch.equal(raw, out)


@shapes
@heads
def test_padding(shape, head) -> None:
    """Rows that come with their padding give what the words alone give, to the bit."""
    raw, gold, head = inputs(shape, head)
    n, vocab, pitch = shape
    wide, wide_head = with_padding(raw, head)
    expected = row_pass.row_statistics(raw, gold, *head, with_mean=True)
    found = row_pass.row_statistics(wide, gold, *wide_head, vocab_size=vocab, with_mean=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    settings = (expected[1], torch.randn(n), 0.1, vocab)
    for dtype in (torch.float32, torch.float16):
        out, wide_out = (torch.full((n, width), torch.nan, dtype=dtype) for width in (vocab, pitch))
        row_pass.row_gradient(raw, gold, *head, *settings, out)
        row_pass.row_gradient(wide, gold, *wide_head, *settings, wide_out)
        assert torch.equal(wide_out[:, :vocab], out)


@heads
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
def test_gradient_of_a_slice(head, smoothing: float) -> None:
    """Slices of the vocabulary together give what all of it gives, to the bit."""
    raw, gold, (bias, *rest) = inputs(SHAPES["three blocks"], head)
    weight, vocab = torch.randn(len(gold)), raw.shape[1]
    _, log_z, _ = row_pass.row_statistics(raw, gold, bias, *rest)
    whole = torch.empty_like(raw)
    row_pass.row_gradient(raw, gold, bias, *rest, log_z, weight, smoothing, vocab, whole)
    for part in (slice(0, BLOCK + 3), slice(BLOCK + 3, vocab)):
        words = raw[:, part].contiguous()
        label = torch.where((gold >= part.start) & (gold < part.stop), gold - part.start, -1)
        cut = (bias if bias is None else bias[part], *rest, log_z, weight, smoothing, vocab)
        row_pass.row_gradient(words, label, *cut, words)
        assert torch.equal(words, whole[:, part])


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offset(offset: float) -> None:
    raw, gold, head = inputs(SHAPES["a block and one"], HEADS["plain"])
    raw += offset
    logp, _, mean = row_pass.row_statistics(raw, gold, *head, with_mean=True)
    true = log_softmax(raw, head, torch.float64)
    torch.testing.assert_close(logp.double(), picked(true, gold), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.double(), true.mean(1), rtol=1e-6, atol=1e-6)


def test_forbidden_words() -> None:
    """A logit of -inf has probability 0, be it the whole of the first block."""
    raw, gold, head = inputs(SHAPES["three blocks"], HEADS["plain"])
    raw[:, :BLOCK] = -torch.inf
    gold[:] = BLOCK + 5
    logp, log_z, _ = row_pass.row_statistics(raw, gold, *head)
    torch.testing.assert_close(logp, picked(raw.log_softmax(1), gold))
    out = torch.empty_like(raw)
    row_pass.row_gradient(raw, gold, *head, log_z, torch.ones(2), 0.0, raw.shape[1], out)
    assert (out[:, :BLOCK] == 0).all() and out.isfinite().all()


def test_nan_stays_in_its_row() -> None:
    raw, gold, head = inputs(SHAPES["three blocks"], HEADS["softcap"])
    expected = row_pass.row_statistics(raw, gold, *head, with_mean=True)
    raw[0, BLOCK + 3] = torch.nan
    found = row_pass.row_statistics(raw, gold, *head, with_mean=True)
    assert all(x[..., 0].isnan().any() for x in found)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[..., 1], b[..., 1])


# G, K, V, pitch
MIXTURES = {
    "one passage": (2, 1, 131, 192),
    "odd": (3, 5, 131, 192),
    "several blocks": (1, 3, 1100, 1152),
    "many passages": (1, 70, 37, 64),
}


@heads
@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixture(shape, head, dtype: torch.dtype) -> None:
    """Values, and the gradient of -u ((1 - e) M_y + e mean_v M_v), with an absent passage."""
    n_positions, n_passages, vocab, pitch = shape
    raw, _, head = inputs((n_positions * n_passages, vocab, pitch), head)
    gold = torch.randint(vocab, (n_positions,)).repeat_interleave(n_passages)
    scores = torch.randn(n_positions, n_passages)
    if n_passages > 1:
        scores[0, 1] = -torch.inf
    prior, upstream, e = scores.log_softmax(1), torch.randn(n_positions), 0.1

    def oracle(to: torch.dtype) -> tuple[Tensor, ...]:
        leaf = raw.to(to).requires_grad_()
        logp = log_softmax(leaf, head, to).view(n_positions, n_passages, vocab)
        joint = prior.to(to).unsqueeze(2) + logp
        mixture = joint.logsumexp(1)
        y = gold[::n_passages]
        loss = -torch.lerp(picked(mixture, y), mixture.mean(1), e) * upstream.to(to)
        post = joint.softmax(1)
        w = post.gather(2, y.view(-1, 1, 1).expand(-1, n_passages, 1)).squeeze(2)
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
        return mixture.mean(1).detach(), post.mean(2).detach(), w.detach(), grad

    plain, true = oracle(torch.float32), oracle(torch.float64)
    _, log_z, _ = row_pass.row_statistics(raw, gold, *head)
    stats = (*head, *log_z, prior)
    smooth, share = mixture_pass.mixture_statistics(raw, *stats)
    assert_close(smooth, plain[0], true[0], name="smooth", scale=1.0)
    assert_close(share, plain[1], true[1], name="share", scale=0.1)
    w = true[2].float()
    u = upstream.unsqueeze(1)
    weights = ((1 - e) * u * w, u * torch.lerp(w, share, e), upstream * e / vocab)
    out = torch.full((len(gold), pitch), torch.nan, dtype=dtype)[:, :vocab]
    mixture_pass.mixture_gradient(raw, gold, *stats, *weights, out)
    assert_close(out, plain[3].to(dtype), true[3], name="gradient", scale=1e-3)
    wide, wide_head = with_padding(raw, head)
    wide_stats = (*wide_head, *log_z, prior)
    found = mixture_pass.mixture_statistics(wide, *wide_stats, vocab_size=vocab)
    assert all(torch.equal(a, b) for a, b in zip(found, (smooth, share), strict=True))
    wide_out = torch.empty(wide.shape, dtype=dtype)
    mixture_pass.mixture_gradient(wide, gold, *wide_stats, *weights, wide_out)
    assert torch.equal(wide_out[:, :vocab], out)
    if dtype == torch.float32:
        in_place = copy_of(raw)
        mixture_pass.mixture_gradient(in_place, gold, *stats, *weights, in_place)
        assert torch.equal(in_place, out)


def test_more_passages_than_the_largest_block() -> None:
    from fastrag.ops.marginal_nll import TRITON_MAX_MIXED

    assert mixture_pass.blocks(TRITON_MAX_MIXED)["BLOCK_K"] == TRITON_MAX_MIXED
    with pytest.raises(ValueError, match="expected K of at most 256, got 257"):
        mixture_pass.blocks(257)


# What the launchers compile for an odd V: accesses to memory of each, those of 16 bytes first.
COUNT_ACCESSES = """
import re
from fastrag.kernels import aot

for module in ("row_pass", "mixture_pass"):
    for config in aot.all_configs(module):
        block_k = config.constants.get("BLOCK_K", 4)
        if config.constants["HAS_SOFTCAP"] or config.constants.get("WITH_MEAN") or block_k > 4:
            continue
        ptx = aot.build(config, 80).asm["ptx"]
        wide = [len(re.findall(rf"{op}\\.global\\.v4\\.b32", ptx)) for op in ("ld", "st")]
        print(config.kernel.fn.__name__, *wide)
"""


def test_memory_is_read_and_written_by_16_bytes() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT_ACCESSES]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in found} == {
        f"_{what}_{of}_kernel" for what in ("row", "mixture") for of in ("statistics", "gradient")
    }
    for name, loads, stores in found:
        # 16 float32 logits a thread, and 16 gradients of 2 or 4 bytes.
        assert int(loads) >= 4, name
        assert int(stores) >= (2 if "gradient" in name else 0), name
