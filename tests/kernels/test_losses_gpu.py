"""The losses on a GPU: accuracy, no waiting, memory, graphs, late errors; torch, triton, pytest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends
from fastrag.testing import assert_close

pytestmark = pytest.mark.gpu

IGNORE = -100
LOSSES = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}
ORACLES = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}
# B, K, T, H, V: one comment per regime
SHAPES = {
    "bart": (2, 5, 16, 256, 50265),  # an odd vocabulary
    "odd": (3, 7, 9, 72, 1031),
    "one": (1, 1, 1, 16, 33),
}
marginals = pytest.mark.parametrize("marginal", LOSSES)
as_users_run = pytest.mark.usefixtures("plain_torch")
smoothed = pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> list[Tensor]:
    """hidden, weight, bias, doc_scores as leaves, then labels."""
    n_examples, n_passages, n_tokens, width, vocab = shape
    hidden = torch.randn(n_examples, n_passages, n_tokens, width, device=device).to(dtype)
    weight = (2.0 * width**-0.5 * torch.randn(vocab, width, device=device)).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype)
    scores = torch.randn(n_examples, n_passages, device=device)
    labels = torch.randint(vocab, (n_examples, n_tokens), device=device)
    if n_tokens > 1:
        labels[0, -1] = IGNORE
    if n_passages > 1:
        scores[0, -1] = -torch.inf
    return [*(x.requires_grad_() for x in (hidden, weight, bias, scores)), labels]


def run(marginal: str, inputs: list[Tensor], **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    hidden, weight, bias, scores, labels = inputs
    loss = LOSSES[marginal](hidden, weight, labels, scores, bias=bias, **options)
    return loss, torch.autograd.grad(loss.sum(), inputs[:4])


@marginals
@smoothed
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_accuracy(
    marginal: str, smoothing: float, softcap: float | None, shape, dtype: torch.dtype
) -> None:
    inputs = problem(shape, dtype)
    loss, found = run(marginal, inputs, label_smoothing=smoothing, softcap=softcap)
    results = []
    for to in (dtype, torch.float64):
        *leaves, labels = inputs
        hidden, weight, bias, scores = (x.detach().to(to).requires_grad_() for x in leaves)
        head = {"bias": bias, "softcap": softcap, "label_smoothing": smoothing}
        nll = ORACLES[marginal](hidden, weight, labels, scores, **head)[0]
        value = reference.reduce(nll, labels)
        results.append((value, torch.autograd.grad(value, (hidden, weight, bias, scores))))
    (plain, plain_grads), (true, true_grads) = results
    assert_close(loss, plain.float(), true, name="loss", scale=1.0)
    names = ("hidden", "weight", "bias", "doc_scores")
    for name, a, b, c in zip(names, found, plain_grads, true_grads, strict=True):
        assert_close(a, b.to(a.dtype), c, name=name, scale=0.1 if name == "doc_scores" else 0.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_token_logp(shape, dtype: torch.dtype) -> None:
    """The product with its epilogue, against torch's, and the gradient of a vector."""
    hidden, weight, bias, _, labels = problem(shape, dtype)
    logp = F.token_logp(hidden, weight, labels, bias=bias)
    upstream = torch.randn_like(logp)
    found = torch.autograd.grad(logp, (hidden, weight, bias), upstream)
    results = []
    for to in (dtype, torch.float64):
        leaves = [x.detach().to(to).requires_grad_() for x in (hidden, weight, bias)]
        value = reference.token_logp(leaves[0], leaves[1], labels, leaves[2])
        results.append((value, torch.autograd.grad(value, leaves, upstream.to(to))))
    (plain, plain_grads), (true, true_grads) = results
    assert_close(logp, plain.float(), true, name="token_logp", scale=1.0)
    for name, a, b, c in zip(("h", "w", "b"), found, plain_grads, true_grads, strict=True):
        assert_close(a, b, c, name=name)


def test_is_the_backend_by_default() -> None:
    for op in ("marginal_nll", "token_logp"):
        assert backends.choose(op, torch.device("cuda"), torch.bfloat16) == "triton"
        assert backends.choose(op, torch.device("cuda"), torch.float64) == "torch"


@as_users_run
@marginals
@smoothed
@pytest.mark.parametrize("listed", [False, True], ids=["all positions", "valid_rows"])
def test_no_host_sync(marginal: str, smoothing: float, listed: bool) -> None:
    inputs = problem(SHAPES["bart"])
    rows = None
    if listed:
        valid = (inputs[4] != IGNORE).view(-1).nonzero().squeeze(1).int()
        rows = torch.nn.functional.pad(valid, (0, 9), value=-1)

    def step() -> None:
        run(marginal, inputs, label_smoothing=smoothing, valid_rows=rows)
        run(marginal, inputs, label_smoothing=smoothing, valid_rows=rows, reduction="none")
        F.token_logp(inputs[0], inputs[1], inputs[4]).sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@marginals
@pytest.mark.parametrize("how", ["few rows a chunk", "vector gradient"])
@pytest.mark.parametrize("masters", [False, True], ids=["bf16", "float32 weight"])
def test_slices_of_the_vocabulary(
    marginal: str, how: str, masters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the chunks of rows have it, to the rounding of dlogits to bfloat16."""
    inputs = problem(SHAPES["bart"])
    if masters:
        inputs[1] = inputs[1].detach().float().requires_grad_()
    expected, wanted = run(marginal, inputs, reduction="sum")
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(8 << 20))  # 27 rows a chunk, of 160
    reduction = "sum" if how == "few rows a chunk" else "none"
    loss, found = run(marginal, inputs, reduction=reduction)
    torch.testing.assert_close(loss.sum(), expected, rtol=1e-5, atol=0)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm() + 1e-6


@as_users_run
@marginals
@pytest.mark.parametrize("masters", [False, True], ids=["bf16", "float32 weight"])
def test_peak_memory(marginal: str, masters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One workspace, one float32 dW and little else: never [B, K, T, V]."""
    limit = 256 << 20
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(limit))
    inputs = problem((8, 5, 64, 512, 50265))  # 515 MB of float32 logits
    if masters:
        inputs[1] = inputs[1].detach().float().requires_grad_()

    def loss() -> Tensor:
        hidden, weight, bias, scores, labels = inputs
        return LOSSES[marginal](hidden, weight, labels, scores, bias=bias)

    loss()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = loss()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= limit + 4 * inputs[1].numel() + (64 << 20), used / 2**20
    del kept


@as_users_run
@marginals
@smoothed
def test_offsets_beyond_two_to_the_31(
    marginal: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk of 2.2e9 logits against many small ones."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    inputs = problem((1, 8, 5440, 64, 50265))
    expected, grads = run(marginal, inputs, label_smoothing=smoothing)
    monkeypatch.setenv("FASTRAG_WORKSPACE_BYTES", str(16 << 30))
    loss, found = run(marginal, inputs, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for a, b in zip(found, grads, strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm() + 1e-6


@as_users_run
@marginals
def test_cuda_graph(marginal: str) -> None:
    inputs = problem(SHAPES["odd"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(side):
        run(marginal, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = run(marginal, inputs)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    expected = run(marginal, inputs)
    for a, b in zip((loss, *grads), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


@as_users_run
@marginals
@smoothed
def test_same_bits_every_time(marginal: str, smoothing: float) -> None:
    """Also with float32, whose gradients overwrite the logits."""
    for dtype, times in ((torch.bfloat16, 1000), (torch.float32, 200)):
        inputs = problem(SHAPES["odd"], dtype)
        loss, grads = run(marginal, inputs, label_smoothing=smoothing)
        differs = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(times):
            again, found = run(marginal, inputs, label_smoothing=smoothing)
            for a, b in zip((again, *found), (loss, *grads), strict=True):
                differs |= (a != b).any()
        assert not differs


@marginals
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current(marginal: str) -> None:
    inputs = problem(SHAPES["odd"], device="cuda:1")
    with torch.cuda.device(0):
        loss, grads = run(marginal, inputs)
    with torch.cuda.device(1):
        expected, wanted = run(marginal, inputs)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def spoil(inputs: list[Tensor], what: str) -> tuple[dict[str, Tensor], str]:
    """Puts a fault into the second example; returns options of the call and the error to come."""
    valid = (inputs[4] != IGNORE).view(-1).nonzero().squeeze(1).int()
    if what == "label":
        inputs[4][1, 2] = 1031
        return {}, r"labels: expected values in \[0, 1031\) .* got 1031 at \[1, 2\]"
    if what == "score":
        with torch.no_grad():
            inputs[3][1, 0] = torch.nan
        return {}, r"doc_scores: expected finite values, .* got nan at \[1, 0\]"
    n_tokens = inputs[4].shape[1]
    valid = valid[valid != n_tokens + 2]
    return {"valid_rows": valid}, r"valid_rows: expected .* got that of \[1, 2\] 0 times"


@as_users_run
@marginals
@pytest.mark.parametrize("what", ["label", "score", "valid_rows"])
def test_late_error(marginal: str, what: str) -> None:
    """NaN at once and without waiting; the next call raises, and the one after that works."""
    inputs = problem(SHAPES["odd"])
    *leaves, labels = inputs
    bad = [*(x.detach().clone().requires_grad_() for x in leaves), labels.clone()]
    options, message = spoil(bad, what)
    expected, grads = run(marginal, inputs)  # compiles, and makes the records
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden, weight, bias, scores, labels = bad
        with torch.no_grad():
            loss = LOSSES[marginal](
                hidden, weight, labels, scores, bias=bias, reduction="none", **options
            )
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=message + r" \(in an earlier call, on cuda:0\)$"):
            run(marginal, inputs)
        for _ in range(2):
            again, found = run(marginal, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.equal(again, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


@as_users_run
def test_late_error_of_a_graph() -> None:
    """A replay has no Python in it; the next call that has tells what the replay found."""
    inputs = problem(SHAPES["odd"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run("token", inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = run("token", inputs)
    kept = inputs[4].clone()
    inputs[4][1, 2] = 1031
    graph.replay()
    inputs[4].copy_(kept)
    graph.replay()  # a good one does not hide what the bad one found
    torch.cuda.synchronize()
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"labels: .* got 1031 at \[1, 2\] \(in an earlier call"):
        run("token", inputs)
    graph.replay()
    torch.cuda.synchronize()
    run("token", inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_late_errors_are_those_of_a_device() -> None:
    inputs, others = (problem(SHAPES["odd"], device=f"cuda:{i}") for i in range(2))
    spoil(others, "label")
    run("token", others)
    for i in range(2):
        torch.cuda.synchronize(i)
    run("token", inputs)
    with pytest.raises(ValueError, match=r"got 1031 at \[1, 2\] \(in an earlier call, on cuda:1\)"):
        run("token", others)
