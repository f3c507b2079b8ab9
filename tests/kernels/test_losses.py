"""The losses in the interpreter, with FASTRAG_BACKEND=triton: group passes, then whole ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends, checks, vocab_major
from fastrag.testing import assert_close

triton = pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the launchers take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.ops.chunks import (  # noqa: E402
    Call,
    RowStats,
    SequenceSums,
    TokenSums,
    TorchGroupPass,
)
from fastrag.ops.positions import Positions  # noqa: E402
from fastrag.ops.triton_chunks import TritonChunkLogits  # noqa: E402

IGNORE = -100
LOSSES = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}
ORACLES = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}
# B, K, T, H, V: one comment per regime
SHAPES = {
    "one of each": (1, 1, 1, 3, 2),
    "odd": (3, 5, 3, 16, 131),  # nothing divides anything
    "many passages": (2, 33, 2, 4, 9),
}
CUT = (
    3,
    3,
    4,
    8,
    67,
)  # in few pieces, because the interpreter takes a millisecond for each row of one
# Bytes, and rows below which a chunk is not worth its dW, as in tests/ops/conftest.py.
WORKSPACES = {
    "whole": ("", 1),
    "some": ("6000", 1),
    "some token ids": ("12000", 10**6),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
smoothed = pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
marginals = pytest.mark.parametrize("marginal", LOSSES)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, head: str = "softcap"
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    n_examples, n_passages, n_tokens, width, vocab = shape
    hidden = torch.randn(n_examples, n_passages, n_tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (n_examples, n_tokens))
    scores = 2.0 * torch.randn(n_examples, n_passages)
    if n_tokens > 1:
        labels[0, -1] = IGNORE
    if n_passages > 1:
        scores[0, -1] = -torch.inf
    extra: dict[str, Any] = {}
    if head == "softcap":
        bias = torch.randn(vocab).to(dtype).requires_grad_()
        extra = {"bias": bias, "softcap": 2.0, "logit_scale": 0.7}
    return (hidden, weight, labels, scores.requires_grad_()), extra


def leaves(args: tuple[Tensor, ...], head: dict[str, Any]) -> dict[str, Tensor]:
    named = dict(zip(("hidden", "weight", "labels", "doc_scores"), args, strict=True))
    del named["labels"]
    return named | {name: x for name, x in head.items() if isinstance(x, Tensor)}


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(dtype).requires_grad_()
    return x


def check(op: Any, oracle: Any, args: tuple[Tensor, ...], head: dict[str, Any]) -> None:
    """Value and every gradient, against plain torch in the same dtype and in float64."""
    results = []
    for dtype in (torch.float64, args[0].dtype):
        cast_args = tuple(cast(x, dtype) for x in args)
        cast_head = {name: cast(x, dtype) for name, x in head.items()}
        loss = oracle(*cast_args, **cast_head)
        results.append((loss, torch.autograd.grad(loss, [*leaves(cast_args, cast_head).values()])))
    (true, true_grads), (plain, plain_grads) = results
    loss = op(*args, **head)
    assert loss.dtype == torch.float32
    assert_close(loss, plain.float(), true, name="loss", scale=1.0)
    names = leaves(args, head)
    found = torch.autograd.grad(loss, [*names.values()])
    for name, a, b, c in zip(names, found, plain_grads, true_grads, strict=True):
        scale = 0.1 if name == "doc_scores" else 1e-3
        assert_close(a, b.to(a.dtype), c, name=name, scale=scale)


@marginals
@smoothed
@shapes
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_marginal(marginal: str, smoothing: float, shape, head: str, dtype: torch.dtype) -> None:
    args, extra = problem(shape, dtype, head)

    def plain(*inputs: Tensor, **head: Any) -> Tensor:
        loss = ORACLES[marginal](*inputs, **head, label_smoothing=smoothing)[0]
        return reference.reduce(loss, inputs[2])

    def op(*inputs: Tensor, **head: Any) -> Tensor:
        return LOSSES[marginal](*inputs, **head, label_smoothing=smoothing)

    check(op, plain, args, extra)


@shapes
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_token_logp(shape, head: str, dtype: torch.dtype) -> None:
    args, extra = problem(shape, dtype, head)
    upstream = torch.randn(args[0].shape[:-1])

    def weighted(f: Any) -> Any:
        # doc_scores take no part; a zero keeps their gradient.
        def run(hidden: Tensor, weight: Tensor, labels: Tensor, scores: Tensor, **head: Any):
            logp = f(hidden, weight, labels, **head)
            return (logp * upstream.to(logp.dtype)).sum() + 0.0 * scores[:, 0].sum()

        return run

    check(weighted(F.token_logp), weighted(reference.token_logp), args, extra)


@marginals
@smoothed
@pytest.mark.parametrize("workspace", WORKSPACES.values(), ids=WORKSPACES.keys())
@pytest.mark.parametrize("listed", [False, True], ids=["all positions", "valid_rows"])
def test_blind(
    marginal: str,
    smoothing: float,
    workspace: tuple[str, int],
    listed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The walk of a GPU: chunks cut anywhere, positions that do not count, an empty example."""
    monkeypatch.setattr(checks, "readable", lambda x: False)
    size, least_rows = workspace
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", size)
    monkeypatch.setattr(vocab_major, "LEAST_ROWS", {"cpu": least_rows})
    args, head = problem(CUT)
    with torch.no_grad():
        args[3][1] = -torch.inf
        args[0][0, :, -1] = torch.nan  # ignored
    valid = (args[2] != IGNORE).view(-1).nonzero().squeeze(1).int()
    rows = torch.nn.functional.pad(valid, (0, 9), value=-1) if listed else None
    found = LOSSES[marginal](
        *args, **head, label_smoothing=smoothing, valid_rows=rows, return_posterior=True
    )
    grads = torch.autograd.grad(found[0], [*leaves(args, head).values()])
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    wanted = LOSSES[marginal](
        *args, **head, label_smoothing=smoothing, valid_rows=rows, return_posterior=True
    )
    expected = torch.autograd.grad(wanted[0], [*leaves(args, head).values()])
    for a, b in zip((*found, *grads), (*wanted, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@marginals
@smoothed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen head"])
def test_vector_gradient(
    marginal: str,
    smoothing: float,
    dtype: torch.dtype,
    frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """reduction="none": slices of the vocabulary in backward, whose sum is as the others are."""
    args, head = problem(CUT, dtype)
    if frozen:
        for x in (args[1], head["bias"]):
            x.requires_grad_(False)
    wanted = {name: x for name, x in leaves(args, head).items() if x.requires_grad}
    upstream = torch.tensor([0.5, 2.0, -1.0])

    def run(**how: Any) -> tuple[Tensor, ...]:
        nll = LOSSES[marginal](*args, **head, label_smoothing=smoothing, **how)
        loss = nll if nll.dim() == 0 else (nll * upstream).sum()
        return torch.autograd.grad(loss, [*wanted.values()])

    expected = run(reduction="sum", example_weight=upstream)
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", "12000")
    found = run(reduction="none")
    # Operands of half precision are rounded before they have the upstream gradient, or after.
    rtol = 2e-5 if dtype == torch.float32 else 2e-2
    for name, a, b in zip(wanted, found, expected, strict=True):
        close = (a - b).norm() <= rtol * b.norm()
        assert close, f"{name}: {float((a - b).norm() / b.norm())}"


@marginals
def test_nothing_counts(marginal: str) -> None:
    args, head = problem(SHAPES["odd"])
    args[2].fill_(IGNORE)
    loss = LOSSES[marginal](*args, **head)
    assert loss == 0
    for grad in torch.autograd.grad(loss, [*leaves(args, head).values()]):
        assert (grad == 0).all()


@marginals
@smoothed
def test_without_gradients(marginal: str, smoothing: float) -> None:
    """No logits are written then: same values to rounding."""
    args, head = problem(SHAPES["odd"], torch.float16)
    expected = LOSSES[marginal](*args, **head, label_smoothing=smoothing)
    with torch.no_grad():
        loss = LOSSES[marginal](*args, **head, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)


@marginals
@smoothed
def test_weight_of_another_dtype(
    marginal: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under autocast: half hidden states and float32 weight, converted by slices."""
    from fastrag.ops import workspace

    args, head = problem(SHAPES["odd"], torch.float16)
    weight = args[1].detach().float().requires_grad_()
    mixed = (args[0], weight, *args[2:])
    expected = LOSSES[marginal](*args, **head, label_smoothing=smoothing)
    wanted = torch.autograd.grad(expected, [*leaves(args, head).values()])
    monkeypatch.setattr(workspace, "WEIGHT_SLICE_BYTES", {"cpu": 2 * 16 * 64})
    loss = LOSSES[marginal](*mixed, **head, label_smoothing=smoothing)
    found = torch.autograd.grad(loss, [*leaves(mixed, head).values()])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-3, atol=1e-5)


def test_operands_keep_the_dtype_of_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    gradient = TritonChunkLogits.gradient

    def spy(self: TritonChunkLogits, *args: Any) -> Tensor:
        draw = gradient(self, *args)
        seen.append((self.x.dtype, self._raw.dtype, draw.dtype, draw.stride(0)))
        return draw

    monkeypatch.setattr(TritonChunkLogits, "gradient", spy)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        args, head = problem(SHAPES["odd"], dtype)
        F.rag_token_nll(*args, **head).backward()
        assert seen.pop() == (dtype, torch.float32, dtype, 192)


def call_and_chunk(smoothing: float) -> tuple[Call, Any, tuple[int, int, int]]:
    """Three examples: one with an ignored label and a missing passage, one without passages."""
    n_examples, n_passages, n_tokens = 3, 5, 7
    hidden = torch.randn(n_examples, n_passages, n_tokens, 2)
    labels = torch.randint(9, (n_examples, n_tokens))
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[0, -1], counted[1] = False, False
    scores = torch.randn(n_examples, n_passages)
    scores[0, 1], scores[1] = -torch.inf, -torch.inf
    prior = torch.where(scores == -torch.inf, -torch.inf, scores.log_softmax(1))
    bad = torch.zeros(n_examples * n_tokens + 1, dtype=torch.bool)
    bad[-2] = True
    call = Call(prior, torch.rand(n_examples), counted.any(1), bad, smoothing, 9)
    rows = torch.arange(-1, n_examples * n_tokens)
    positions = Positions(hidden, labels, counted, None, None, torch.float32)
    positions.index = torch.where(rows < 0, n_examples * n_tokens, rows)
    return call, positions.gather(slice(None)), (n_examples, n_passages, n_tokens)


@smoothed
def test_token_group(smoothing: float) -> None:
    call, chunk, (n_examples, n_passages, n_tokens) = call_and_chunk(smoothing)
    n = len(chunk.position)
    logp, shares = -5.0 * torch.rand(n * n_passages), torch.rand(n, n_passages).softmax(1)
    mixture = (-torch.rand(n), shares) if smoothing else None
    results = []
    for implementation in (TorchGroupPass, TritonChunkLogits.group_pass):
        size = n_examples * n_tokens + 1
        wide = [torch.full((size, n_passages), 7.0) for _ in range(3)]
        sums = TokenSums(torch.full((size,), 7.0), *wide)
        weights = implementation.token(call, chunk, logp, mixture, sums)
        found = [weights.hit, weights.target, weights.spread, sums.log_marginal, *wide]
        results.append([x for x in found if x is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert results[1][0][-1].isnan().all()  # the label that is none of the vocabulary


@smoothed
def test_sequence_group(smoothing: float) -> None:
    call, chunk, (n_examples, n_passages, n_tokens) = call_and_chunk(smoothing)
    logp = -5.0 * torch.rand(len(chunk.chunk_rows))
    stats = RowStats(logp, 2.0 * logp if smoothing else None)
    results = []
    for implementation in (TorchGroupPass, TritonChunkLogits.group_pass):
        sums = SequenceSums(
            torch.full((n_examples * n_passages * n_tokens + 1,), 7.0),
            torch.full((n_examples,), 7.0),
            torch.full((n_examples, n_passages), 7.0),
            torch.full((n_examples, n_passages), 7.0),
        )
        implementation.sequence_rows(call, chunk, stats, sums)
        implementation.sequence_posterior(call, slice(1, 3), sums)
        assert (sums.log_post[0] == 7.0).all() and (sums.nll[0] == 7.0).all()
        implementation.sequence_posterior(call, slice(0, 1), sums)
        weights = implementation.sequence_weights(call, chunk, sums)
        results.append([weights, sums.token_logp, sums.nll, sums.log_post, sums.dscores])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_more_passages_than_the_largest_block(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = problem((1, 257, 1, 2, 3), head="plain")
    F.rag_token_nll(*args)
    with pytest.raises(RuntimeError, match="its kernels take K of at most 256 here, got 257"):
        F.rag_token_nll(*args, label_smoothing=0.1)
    monkeypatch.delenv(backends.BACKEND_VARIABLE)
    F.rag_token_nll(*args, label_smoothing=0.1)
