"""Losses of bfloat16 on processors that multiply bfloat16 themselves (`workspace.multiplies`).

The choice is forced here, so torch may emulate the products. Row passes are compared with those of
a float32 buffer that holds the same numbers, and losses with float64 as on every backend.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastrag import info
from fastrag.ops import backends, workspace
from fastrag.testing import assert_close, cpu_memory
from tests.ops import test_marginal_nll, test_token_logp
from tests.ops.cases import (
    LOSSES,
    MANY,
    both_marginals,
    grads,
    make,
    oracle,
    with_and_without_smoothing,
)

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")
BF16 = torch.bfloat16


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpp")
    monkeypatch.setattr(workspace, "multiplies", lambda dtype: dtype == BF16)


@pytest.fixture(params=[True, False], ids=["multiplied", "converted"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpp")
    monkeypatch.setattr(workspace, "multiplies", lambda dtype: request.param and dtype == BF16)
    return request.param


# ------------------------------------------------------------------------------------- row passes


def passes(z0: Tensor, gold: Tensor, prior: Tensor, weight: Tensor, **head: object) -> list[Tensor]:
    """Statistics, gradients and mixtures of a buffer, which is copied for each of them."""
    n, found = z0.shape[1], []

    def opened() -> tuple[Tensor, object]:
        buffer = z0.clone()
        bits = buffer.view(torch.uint16) if buffer.dtype == BF16 else buffer
        return buffer, _C.RowPass(bits.numpy(), gold.numpy(), **head)

    log_z = torch.empty(2, n)
    logp, mean = torch.empty(n), torch.empty(n)
    opened()[1].statistics(logp.numpy(), log_z.numpy(), mean.numpy())
    mixture, share = torch.empty(len(prior)), torch.empty_like(prior)
    arrays = [x.numpy() for x in (log_z, prior)]
    opened()[1].mixture_statistics(*arrays, mixture.numpy(), share.numpy())
    found += [log_z, logp, mean, mixture, share]
    for smoothing in (0.0, 0.1):
        buffer, each = opened()
        each.gradient(arrays[0], weight.view(-1).numpy(), smoothing)
        found.append(buffer)
    buffer, each = opened()
    parts = (0.9 * weight, weight, 0.01 * weight[:, 0].contiguous())
    each.mixture_gradient(*arrays, *(x.numpy() for x in parts))
    return [*found, buffer]


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_passes_round_once(isa: str, softcap: float) -> None:
    """The same bits as from a float32 buffer, whose gradient is rounded to nearest."""
    n_positions, n_passages, n_ids = 13, 3, 300
    z0 = (4.0 * torch.randn(n_ids, n_positions * n_passages)).to(BF16)
    gold = torch.randint(n_ids, (n_positions,)).repeat_interleave(n_passages)
    z0[gold[-1], -1] += 40.0  # a certain label, whose gradient is a small difference
    prior = torch.randn(n_positions, n_passages).log_softmax(1)
    weight = torch.rand(n_positions, n_passages)
    weight[3, 1] = torch.nan  # of a bad label
    head = {"bias": torch.randn(n_ids).numpy(), "logit_scale": 0.7, "softcap": softcap, "isa": isa}
    short, wide = (passes(z.contiguous(), gold, prior, weight, **head) for z in (z0, z0.float()))
    for a, b in zip(short, wide, strict=True):
        assert a.isfinite().float().mean() > 0.9
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------- losses


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("size", [1.0, 20.0], ids=["logits ~4", "logits ~80"])
@pytest.mark.usefixtures("multiplied")
def test_three_way(marginal: str, smoothing: float, head: str, size: float) -> None:
    test_marginal_nll.test_three_way(marginal, smoothing, BF16, head, size)


@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.usefixtures("multiplied")
def test_token_logp_three_way(head: str) -> None:
    test_token_logp.test_three_way(BF16, head)


@both_marginals
@with_and_without_smoothing
def test_any_workspace(marginal: str, smoothing: float, either_way: bool, workspace: str) -> None:
    """Chunks of rows, whose sums are float32, and slices of the vocabulary."""
    p = make((8, 4, 4, 16, 37), head="bias").to(BF16)
    loss = LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing, reduction="sum")
    exact = p.to(torch.float64)
    true = oracle(marginal, exact, smoothing)[0].sum()
    plain = oracle(marginal, p, smoothing)[0].sum()
    found, base, expected = grads(loss, p), grads(plain, p), grads(true, exact)
    for name in expected:
        assert_close(found[name], base[name], expected[name], name=name)


@both_marginals
def test_sums_over_chunks_are_rounded_once(marginal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workspace.WORKSPACE_VARIABLE, "4000")
    monkeypatch.setattr(workspace, "multiplies", lambda dtype: False)
    p = make((8, 4, 4, 16, 37), missing=False).to(BF16)
    q = p.to(torch.float32)
    found, exact = (
        grads(LOSSES[marginal](*each.args(), reduction="sum"), each)["weight"] for each in (p, q)
    )
    bound = 0.5 * torch.finfo(BF16).eps * exact.abs() + 1e-6 * exact.abs().max()
    assert found.dtype == BF16 and ((found.float() - exact).abs() <= bound).all()


@both_marginals
def test_float32_masters(marginal: str, either_way: bool) -> None:
    """Under autocast the gradient of the head is float32, no less exact than autocast's own."""
    p = make(MANY).to(torch.float32)
    exact, base = p.to(torch.float64), p.to(torch.float32)
    true = oracle(marginal, exact)[0].sum()
    hidden = p.hidden.to(BF16)
    with torch.autocast("cpu", BF16):
        loss = LOSSES[marginal](hidden, *p.args()[1:], reduction="sum")
        plain = oracle(marginal, base)[0].sum()
    expected, plain_grads = grads(true, exact), grads(plain, base)
    for name, grad in grads(loss, p).items():
        assert grad.dtype == torch.float32
        assert_close(grad, plain_grads[name], expected[name], name=name)


@both_marginals
@pytest.mark.parametrize("masters", [False, True])
def test_memory(
    marginal: str, masters: bool, either_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the gradients, logits and a slice of the head, never the head in another dtype."""
    monkeypatch.setattr(workspace, "WEIGHT_SLICE_BYTES", {"cpu": 1 << 16})
    p = make((2, 2, 4, 64, 16411)).to(BF16)
    if masters:
        p.weight = p.weight.detach().float().requires_grad_()
    logits = p.hidden[..., 0].numel() * len(p.weight) * (2 if either_way else 4)

    def step() -> dict[str, Tensor]:
        workspace.release()
        return grads(LOSSES[marginal](*p.args()), p)

    peak, _ = cpu_memory(step)
    power = 1 << (logits - 1).bit_length()  # of a new workspace
    assert peak <= power + p.weight.nbytes + (3 << 17)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True}, True),
        ({}, False),  # nothing is known
    ],
)
def test_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], found: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    decide = workspace.multiplies.__wrapped__  # without its cache
    assert decide(BF16) == found and not decide(torch.float16)


def test_training_descends(multiplied: None) -> None:
    p = make(MANY).to(BF16)
    losses = []
    for _ in range(8):
        loss = LOSSES["token"](*p.args())
        for x, grad in zip(p.leaves().values(), grads(loss, p).values(), strict=True):
            x.data -= 0.5 * grad
        losses.append(loss.item())
    assert all(b < a for a, b in pairwise(losses))


def test_info_names_the_products(either_way: bool) -> None:
    expected = "multiplied as it is" if either_way else "converted to float32"
    assert f"bfloat16 on cpu: {expected}" in info.info()
