"""The search on a GPU: bits, certificates, no waiting, memory, graphs.

Needs torch, triton and pytest; for an index on the host, what `fastrag.index` needs too.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import FlatIndex
from fastrag.index import host_search
from fastrag.ops import backends

from .mips_cases import (
    STORED,
    Found,
    one_after_another,
    random_index,
    same,
    whole_numbers,
    widened,
)

pytestmark = pytest.mark.gpu

as_users_run = pytest.mark.usefixtures("plain_torch")
each_storage = pytest.mark.parametrize("dtype", STORED, ids=str)
N = 30011  # of a tile and of a group there is a rest


@pytest.fixture(autouse=True)
def _small_searches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrag.ops import triton_mips

    monkeypatch.setattr(triton_mips, "_LEAST_SCORES", 0)


def oracle(query: Tensor, index: Tensor, k: int, exclude: Tensor | None = None, **options) -> Found:
    return one_after_another(query, widened(index, **options), k, exclude)


def found_with(query: Tensor, index: Tensor, k: int, options: dict, **changes) -> tuple[Found, int]:
    """The answer of a changed plan, and how many queries were uncertain."""
    from fastrag.kernels import mips

    from fastrag.ops import triton_mips

    plan = dataclasses.replace(triton_mips.plan_for(query, index, k), **changes)
    norm = None if options else mips.max_norm(index, None, None)
    passages = triton_mips._passages(
        index, options.get("scale"), options.get("offset"), options.get("exclude")
    )
    found = triton_mips.find(query, passages, k, plan, norm)
    return triton_mips.unpack(found.keys), int(found.uncertain.sum())


@each_storage
@pytest.mark.parametrize("dim", [768, 100, 33])  # 33: not for descriptors
@pytest.mark.parametrize("n_queries", [1, 16, 17, 64, 65, 200])
def test_bits(dtype: torch.dtype, dim: int, n_queries: int) -> None:
    query = torch.randn(n_queries, dim, device="cuda")
    index, options = random_index(N, dim, dtype, "cuda")
    expected = oracle(query, index, 100, **options)
    for k in (1, 10, 100):
        found = F.mips_topk(query, index, k, **options)
        assert same(found, (expected[0][:, :k], expected[1][:, :k]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_bits_of_queries_in_half(half: torch.dtype) -> None:
    query = torch.randn(40, 768, device="cuda").to(half)
    index, _ = random_index(N, 768, half, "cuda")
    assert same(F.mips_topk(query, index, 10), oracle(query.float(), index, 10))


@each_storage
def test_most_answers_are_certain(dtype: torch.dtype) -> None:
    query = torch.randn(64, 768, device="cuda")
    index, options = random_index(200_000, 768, dtype, "cuda")
    _, uncertain = found_with(query, index, 10, options)
    assert uncertain <= 6


@each_storage
@pytest.mark.parametrize("k", [1, 10, 300])
def test_uncertain_answers_are_exact(dtype: torch.dtype, k: int) -> None:
    """A bound that no answer can meet: every group is scored."""
    query = torch.randn(5, 96, device="cuda")
    index, options = random_index(N, 96, dtype, "cuda")
    found, uncertain = found_with(query, index, k, options, n_chosen=1, error=1e6)
    assert uncertain == 5
    assert same(found, oracle(query, index, k, **options))


def test_error_of_a_maximum_is_within_its_bound() -> None:
    """Of the tensor cores, whose sums are what the bound assumes of them."""
    from fastrag.kernels import mips

    from fastrag.ops import triton_mips

    for dtype in STORED:
        query = torch.randn(200, 768, device="cuda").abs()
        index, options = random_index(2048, 768, dtype, "cuda")
        index, scale, offset = index.abs(), options.get("scale"), options.get("offset")
        plan = triton_mips.plan_for(query, index, 10)
        operand = mips.prepare(query, dtype, scale, offset, plan.has_low, plan.tile)
        maxima = torch.empty(200, 2048 // plan.group, device="cuda")
        mips.group_maxima(operand, index, None, plan.group, plan.tile, plan.use_tma, maxima)
        vectors = index.double()
        if scale is not None and offset is not None:
            vectors = vectors * scale.double() + offset.double()
        true = (query.double() @ vectors.t()).unflatten(1, (-1, plan.group)).amax(2)
        found = maxima.double() / operand.unit[:, None].double() + operand.base[:, None].double()
        norm = 1.0 if scale is not None else mips.max_norm(index, None, None).double()
        error = ((found - true).abs() / (operand.size.double() * norm)[:, None]).max()
        assert error < plan.error, dtype


@pytest.mark.parametrize("kind", ["rows", "mask"])
def test_exclude(kind: str) -> None:
    query, index = (whole_numbers(n, 64, device="cuda") for n in (20, N))
    best = oracle(query, index, 30)[1].cuda()
    if kind == "rows":
        exclude = torch.cat([best[:, :20:2], torch.full((20, 1), -1, device="cuda")], 1)
        found = F.mips_topk(query, index, 10, exclude=exclude)
        kept = [[r for r in row if r not in gone] for row, gone in zip(
            best.tolist(), exclude.tolist(), strict=True)]  # fmt: skip
        assert found[1].tolist() == [row[:10] for row in kept]
    else:
        exclude = torch.rand(N, device="cuda") < 0.5
        exclude[: N // 4] = True
        found = F.mips_topk(query, index, 10, exclude=exclude)
        assert same(found, oracle(query, index, 10, exclude))
    nothing = F.mips_topk(query, index, 10, exclude=torch.ones(N, device="cuda").bool())
    assert nothing[1].eq(-1).all() and nothing[0].eq(-torch.inf).all()


def test_ties_and_neighbours() -> None:
    rows = F.mips_topk(torch.ones(3, 16, device="cuda"), torch.ones(N, 16, device="cuda"), 70)[1]
    assert torch.equal(rows.cpu(), torch.arange(70).expand(3, -1))
    query, index = (whole_numbers(n, 64, device="cuda") for n in (20, N))
    index[1280:1400] *= 5.0
    assert same(F.mips_topk(query, index, 100), oracle(query, index, 100))


def test_what_is_not_finite_comes_first_as_nan() -> None:
    query, index = torch.randn(4, 64, device="cuda"), torch.randn(N, 64, device="cuda")
    index[777, 5] = torch.nan
    scores, rows = F.mips_topk(query, index, 10)
    assert scores[:, 0].isnan().all() and rows[:, 0].eq(777).all()
    removed = torch.arange(N, device="cuda") == 777
    assert same(
        F.mips_topk(query, index, 10, exclude=removed),
        oracle(query, index.nan_to_num(0.0), 10, removed),
    )


def test_changes_of_the_index_are_seen() -> None:
    """The kept norm is that of the index as it is."""
    query, index = torch.randn(4, 64, device="cuda"), 1e-3 * torch.randn(N, 64, device="cuda")
    F.mips_topk(query, index, 10)
    index.mul_(1e4)
    assert same(F.mips_topk(query, index, 10), oracle(query, index, 10))


def test_is_the_backend_by_default() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.choose("mips_topk", torch.device("cuda"), dtype) == "triton"


@as_users_run
@each_storage
def test_no_host_sync(dtype: torch.dtype) -> None:
    query = torch.randn(70, 768, device="cuda")
    index, options = random_index(N, 768, dtype, "cuda")
    exclude = torch.randint(N, (70, 3), device="cuda")

    def step() -> None:
        F.mips_topk(query, index, 10, exclude=exclude, **options)
        F.mips_topk(query, index, 100, **options)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        index[0] = index[1]
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@as_users_run
def test_peak_memory() -> None:
    """4 bytes for each query and group, and little else: never [B, N]."""
    n, n_queries = 2_000_000, 256
    query = torch.randn(n_queries, 64, device="cuda")
    index = torch.randn(n, 64, device="cuda").bfloat16()
    F.mips_topk(query, index, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    F.mips_topk(query, index, 10)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 4 * n_queries * n // 128 + (48 << 20), used / 2**20


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements, the best of them behind."""
    n, dim = 2_900_000, 768
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    index = torch.zeros(n, dim, dtype=torch.bfloat16, device="cuda")
    index[n - 5 :] = whole_numbers(5, dim, device="cuda").bfloat16()
    query = index[n - 5 :].float()
    found = F.mips_topk(query, index, 3)
    expected = oracle(query, index[n - 5 :], 1)
    assert same((found[0][:, :1], found[1][:, :1]), (expected[0], expected[1] + n - 5))


@as_users_run
def test_cuda_graph() -> None:
    query, index = torch.randn(20, 768, device="cuda"), torch.randn(N, 768, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        F.mips_topk(query, index, 10)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = F.mips_topk(query, index, 10)
    query.copy_(torch.randn_like(query))
    index.mul_(50.0)
    graph.replay()
    assert same(found, oracle(query, index, 10))


def on_the_host(n: int, dim: int, dtype: str = "float32", search_device: str = "cuda") -> FlatIndex:
    index = FlatIndex(dim, dtype, search_device=search_device)
    index.add(torch.randn(n, dim) * (0.5 + torch.rand(n, 1)))
    return index


def same_on_the_cpu(index: FlatIndex, query: Tensor, k: int, **options: Tensor) -> bool:
    """Whether a search on the GPU finds the bits of one on the CPU."""
    found = index.search(query, k, **options)
    chosen = index.search_device
    expected = index.to("cpu").search(query.cpu(), k, **{n: x.cpu() for n, x in options.items()})
    index.to("cpu", search_device=chosen)
    return found.scores.device == query.device and same(found, expected)


@pytest.mark.skipif(bool(backends.why_not("cpp")), reason="the extension is not built")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_index_on_the_host(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, in two, and in many, also of a file that is mapped."""
    query = torch.randn(20, 100, device="cuda")
    index = on_the_host(N, 100, dtype)
    index.save(tmp_path / "index")
    index.remove(torch.randperm(N)[: N // 10])
    mapped = FlatIndex.load(tmp_path / "index", search_device="cuda")
    for block_bytes in (1 << 30, 60 * N, 700_001, 500 * 128):
        monkeypatch.setattr(host_search, "BLOCK_BYTES", block_bytes)
        assert same_on_the_cpu(index, query, 10)
        assert same_on_the_cpu(mapped, query, 10)
    excluded = index.search(query, 10).rows
    assert same_on_the_cpu(index, query, 10, exclude=excluded)
    assert same_on_the_cpu(index, query.cpu(), 10, exclude=torch.rand(N) < 0.5)
    assert same_on_the_cpu(index, query, 1100)


def test_index_on_the_host_against_the_oracle() -> None:
    """What the test above finds, without the extension; int8 beside float32 rows too."""
    query = torch.randn(20, 100, device="cuda")
    vectors = torch.randn(N, 100)
    expected = oracle(query, vectors.cuda(), 10)
    for dtype, exact in (("float32", "stored"), ("int8", "float32")):
        index = FlatIndex(100, dtype, exact=exact, search_device="cuda")
        index.add(vectors)
        assert same(index.search(query, 10), expected)


def test_searches_of_an_index_on_the_host_lock_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the GPU holds two blocks while they last, never the index."""
    locked, plain = [], host_search.page_locked
    monkeypatch.setattr(host_search, "page_locked", lambda n: locked.append(n) or plain(n))
    monkeypatch.setattr(host_search, "BLOCK_BYTES", 4 << 20)
    index, query = on_the_host(200_000, 256), torch.randn(16, 256, device="cuda")  # 205 MB
    index.search(query, 10)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        index.search(query, 10)
    assert locked == [4 << 20] * 2
    assert torch.cuda.max_memory_allocated() - before <= 2 * (4 << 20) + (40 << 20)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_many_searches_of_an_index_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """From two streams and two threads, with rows that change: nothing is read before its time."""
    monkeypatch.setattr(host_search, "BLOCK_BYTES", 1 << 20)
    index = on_the_host(N, 64)
    query = torch.randn(33, 64, device="cuda")
    best = oracle(query, index.index_emb.cuda(), 10)
    torch.cuda.synchronize()

    def searches() -> list[bool]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [index.search(query, 10) for _ in range(20)]
            return [same(each, best) for each in found]

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(searches) for _ in range(2)]:
            assert all(each.result())
    rows = torch.arange(N)
    for _ in range(10):
        vectors = torch.randn(N, 64)
        found = index.search(query, 10)
        index.update(rows, vectors)  # the GPU may still be searching
        assert same(found, best)
        best = oracle(query, vectors.cuda(), 10)


@as_users_run
def test_same_bits_every_time() -> None:
    query, index = torch.randn(65, 768, device="cuda"), torch.randn(N, 768, device="cuda").half()
    first = F.mips_topk(query, index, 10)
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(200):
        for a, b in zip(F.mips_topk(query, index, 10), first, strict=True):
            differs |= (a != b).any()
    assert not differs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current() -> None:
    query, index = (torch.randn(n, 64, device="cuda:1") for n in (20, N))
    with torch.cuda.device(0):
        found = F.mips_topk(query, index, 10)
    assert same(found, oracle(query, index, 10))
