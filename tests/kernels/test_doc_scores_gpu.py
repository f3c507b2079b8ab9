"""The doc_scores op on a GPU: accuracy, no waiting, any device. Needs torch, triton and pytest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.testing import assert_close
from tests.ops.codes import random_codes

pytestmark = pytest.mark.gpu

TAU = 0.7
# B, K, D, N: one comment per regime
SHAPES = {
    "dpr": (8, 5, 768, 5000),
    "minilm": (16, 10, 384, 5000),
    "odd": (3, 33, 129, 777),  # nothing divides anything
    "many passages": (4, 1000, 64, 4000),
    "one": (1, 1, 1, 1),
}
as_users_run = pytest.mark.usefixtures("plain_torch")
STORED = [torch.float32, torch.float16, torch.bfloat16]


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    n_examples, n_passages, width, n = shape
    query = torch.randn(n_examples, width, device=device).to(dtype).requires_grad_()
    index = torch.randn(n, width, device=device).to(dtype)
    rows = torch.randint(n, (n_examples, n_passages), device=device)
    if n_passages > 1:
        rows[0, -1] = -1
    return query, index, rows


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), 0.0, x)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("fresh", [False, True], ids=["gathered", "fresh"])
def test_accuracy(dtype: torch.dtype, shape: tuple[int, int, int, int], fresh: bool) -> None:
    query, index, rows = inputs(shape, dtype)
    passages = index[rows.clamp(min=0)].requires_grad_() if fresh else index
    scores, prior = F.doc_scores(query, passages, rows=rows, tau=TAU, return_log_prior=True)
    upstream = torch.randn_like(prior)

    def oracle(to: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, d = (x.detach().to(to).requires_grad_() for x in (query, passages))
        s = reference.doc_scores(q, d, rows, TAU)
        a = reference.log_prior(s)
        wanted = (q, d) if fresh else (q,)
        return s, a, torch.autograd.grad((finite(a) * upstream.to(to)).sum(), wanted)

    plain, true = oracle(dtype), oracle(torch.float64)
    assert_close(scores, plain[0].float(), true[0], name="scores")
    assert_close(prior, plain[1].float(), true[1], name="prior", scale=1.0)
    wanted = (query, passages) if fresh else (query,)
    found = torch.autograd.grad((finite(prior) * upstream).sum(), wanted)
    for name, a, b, c in zip(("query", "passages"), found, plain[2], true[2], strict=False):
        assert_close(a, b, c, name=name)


@pytest.mark.parametrize("dtype", STORED, ids=str)  # of the query
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("fresh", [False, True], ids=["gathered", "fresh"])
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
def test_int8_accuracy(
    dtype: torch.dtype, shape: tuple[int, int, int, int], fresh: bool, with_offset: bool
) -> None:
    query, index, rows = inputs(shape, dtype)
    stored = random_codes(*index.shape, with_offset, device="cuda")
    stored = stored.fresh(rows) if fresh else stored
    more = stored.options()
    scores, prior = F.doc_scores(
        query, stored.codes, rows=rows, tau=TAU, return_log_prior=True, **more
    )
    upstream = torch.randn_like(prior)

    def oracle(to: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        q = query.detach().to(to).requires_grad_()
        s = stored.scores(q, rows, TAU)
        a = reference.log_prior(s)
        return s, a, torch.autograd.grad((finite(a) * upstream.to(to)).sum(), q)[0]

    # Dequantised by plain torch in float32, whatever the query: so is the kernel's arithmetic.
    plain, true = oracle(torch.float32), oracle(torch.float64)
    found = torch.autograd.grad((finite(prior) * upstream).sum(), query)[0]
    assert_close(scores, plain[0], true[0], name="scores")
    assert_close(prior, plain[1], true[1], name="prior", scale=1.0)
    # A prior is as far off as scores of this size are rounded, and so is what it weighs.
    size = float(true[0][true[0].isfinite()].abs().max())
    assert_close(found, plain[2].to(dtype), true[2], name="query", scale=size)


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_runs_the_triton_kernel(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch computes and what the kernel computes differ in bits, so both have run."""
    query, index, rows = inputs(SHAPES["minilm"], torch.float32)
    more = {}
    if int8:
        stored = random_codes(*index.shape, device="cuda")
        index, more = stored.codes, stored.options()
    found = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("FASTRAG_BACKEND", name)
        found[name] = F.doc_scores(query, index, rows=rows, tau=TAU, **more).detach()
    monkeypatch.delenv("FASTRAG_BACKEND")
    default = F.doc_scores(query, index, rows=rows, tau=TAU, **more)
    assert torch.equal(default, found["triton"])
    torch.testing.assert_close(found["torch"], found["triton"], rtol=1e-4, atol=1e-3)


@as_users_run
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_no_host_sync(int8: bool) -> None:
    query, index, rows = inputs(SHAPES["dpr"], torch.bfloat16)
    tau = torch.tensor(TAU, device="cuda", requires_grad=True)
    more = {}
    if int8:
        stored = random_codes(*index.shape, device="cuda")
        index, more = stored.codes, stored.options()

    def step() -> None:
        prior = F.doc_scores(query, index, rows=rows, tau=tau, return_log_prior=True, **more)[1]
        finite(prior).square().sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert query.grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current() -> None:
    query, index, rows = inputs(SHAPES["minilm"], torch.float32, "cuda:1")
    with torch.cuda.device(0):
        scores = F.doc_scores(query, index, rows=rows)
        finite(scores).sum().backward()
    assert scores.device == query.grad.device == torch.device("cuda:1")
    expected = reference.doc_scores(query.detach().double(), index.double(), rows)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-3)


@as_users_run
@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_same_bits_every_time(int8: bool) -> None:
    query, index, rows = inputs(SHAPES["odd"], torch.bfloat16)
    more = {}
    if int8:
        stored = random_codes(*index.shape, device="cuda")
        index, more = stored.codes, stored.options()

    def step() -> tuple[Tensor, Tensor]:
        prior = F.doc_scores(query, index, rows=rows, return_log_prior=True, **more)[1]
        return prior, torch.autograd.grad(finite(prior).square().sum(), query)[0]

    first = step()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@as_users_run
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_memory_holds_no_gathered_vectors(int8: bool) -> None:
    query, index, rows = inputs((64, 100, 768, 20000), torch.float32)
    more = {}
    if int8:
        stored = random_codes(*index.shape, device="cuda")
        index, more = stored.codes, stored.options()
    up = torch.ones(64, 100, device="cuda")

    def step() -> None:
        prior = F.doc_scores(query, index, rows=rows, return_log_prior=True, **more)[1]
        torch.autograd.grad(prior, query, up)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 64 * 100 * 768 * index.itemsize / 10


def test_bad_row_is_nan_not_a_fault() -> None:
    query, index, rows = inputs(SHAPES["minilm"], torch.float32)
    rows[3, 0] = len(index)
    scores = F.doc_scores(query, index, rows=rows)
    assert scores[3, 0].isnan() and not scores[4:].isnan().any()
    torch.cuda.synchronize()


def test_offsets_beyond_two_to_the_31() -> None:
    n = (1 << 31) // 256 + 1000  # 4.4 GB of float16 in rows of 256 numbers
    index = torch.zeros(n, 256, dtype=torch.float16, device="cuda")
    index[-1], index[0] = 2.0, 1.0
    rows = torch.tensor([[n - 1, 0]], device="cuda")
    scores = F.doc_scores(torch.ones(1, 256, device="cuda"), index, rows=rows)
    assert scores.tolist() == [[512.0, 256.0]]


@as_users_run
def test_losses_run_on_the_gpu_and_agree_with_the_cpu() -> None:
    """Same values, no host sync from the first call on, dead rows masked."""
    hidden, weight = torch.randn(2, 3, 6, 16), torch.randn(101, 16)
    labels, scores = torch.randint(101, (2, 6)), torch.randn(2, 3)
    labels[0, 3:], scores[1, 2] = -100, -torch.inf
    valid = (labels != -100).view(-1).nonzero().squeeze(1).int()
    valid = torch.nn.functional.pad(valid, (0, 16 - len(valid)), value=-1)
    for op in (F.rag_token_nll, F.rag_sequence_nll):
        results = []
        for device, rows in (("cpu", None), ("cuda", None), ("cuda", valid.cuda())):
            leaves = [x.to(device).requires_grad_() for x in (hidden, weight, scores)]
            args = (leaves[0], leaves[1], labels.to(device), leaves[2])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                loss = op(*args, valid_rows=rows, label_smoothing=0.1)
                grads = torch.autograd.grad(loss, leaves)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            results.append([x.detach().cpu() for x in (loss, *grads)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
