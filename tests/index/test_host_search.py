"""Vectors on the CPU that are searched elsewhere: in Triton's interpreter, with streams that log.

What the log says of the order is what makes the copies safe on a GPU; the copies themselves run at
once here, from memory to memory.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrag import FlatIndex
from fastrag.index import codec, host_search
from fastrag.index.host_search import HostSearch
from fastrag.ops import backends
from fastrag.ops.mips_topk import _keys

pytest.importorskip("triton")
if not backends.interpreting():
    pytest.skip("the kernels take CPU tensors under TRITON_INTERPRET=1", allow_module_level=True)

from fastrag.ops import triton_mips  # noqa: E402

N, D, B, K = 70, 7, 2, 5
# The CPU by another name: tensors go there, and the GPU's kernels are chosen for it.
ELSEWHERE = torch.device("cpu:0")


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self, stream: Stream) -> None:
        self.log.append(f"{stream.name}: {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams were asked for; and blocks of 30 rows."""
    log: list[str] = []
    launches = Stream(log, "search")
    names = iter(["sent 0", "sent 1", "searched 0", "searched 1"] * 9)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(log, "copies"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: launches)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def page_locked(n_bytes: int) -> Tensor:
        log.append(f"locks {n_bytes}")
        return torch.empty(n_bytes, dtype=torch.uint8)

    monkeypatch.setattr(host_search, "page_locked", page_locked)
    monkeypatch.setattr(host_search, "BLOCK_BYTES", 30 * 32)
    plain = backends.choose

    def choose(op: str, device: torch.device, *rest: Any) -> str:
        return plain(op, torch.device("cuda") if device == ELSEWHERE else device, *rest)

    monkeypatch.setattr(backends, "choose", choose)
    return log


def keys_of_block(
    query: Tensor,
    block: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    part: slice,
) -> Tensor:
    return triton_mips._best(_keys(query, block, part, exclude), k)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 blocks are searched by torch."""
    monkeypatch.setattr(triton_mips, "_search_block", keys_of_block)


def vectors() -> Tensor:
    return torch.randn(N, D) + torch.linspace(-1, 1, D)


def filled(dtype: str = "float32", **options: Any) -> FlatIndex:
    index = FlatIndex(D, dtype, **options)
    index.add(vectors())
    return index


def elsewhere(index: FlatIndex) -> FlatIndex:
    """A copy that is searched elsewhere."""
    twin = copy.deepcopy(index)
    twin._host_search = HostSearch(ELSEWHERE)
    return twin


def assert_same(index: FlatIndex, expected: FlatIndex, k: int = K, **options: Tensor) -> None:
    """The interpreter adds products in another order."""
    query = torch.randn(B, D)
    found = index.search(query, k, **options)
    best = expected.search(query, k, **options)
    torch.testing.assert_close(found.scores, best.scores)
    assert torch.equal(found.rows, best.rows)


@pytest.mark.parametrize("dtype", list(codec.DTYPES))
def test_as_a_search_on_the_cpu(dtype: str, log: list[str]) -> None:
    index = filled(dtype)
    index.remove(torch.arange(0, N, 3))
    assert_same(elsewhere(index), index, exclude=torch.randint(-1, N, (B, 4)))
    assert log.count("copies: sent 1") == 1


@pytest.mark.usefixtures("no_kernels")
def test_through_every_change(log: list[str]) -> None:
    index = filled()
    twin = elsewhere(index)
    assert_same(twin, index)
    assert_same(twin, index, exclude=torch.randint(-1, N, (B, 4)))
    for each in (index, twin):
        each.remove(torch.arange(0, N, 3))
    assert_same(twin, index)
    assert_same(twin, index, exclude=torch.rand(N) < 0.5)
    for each in (index, twin):
        each.update(torch.tensor([5, 69]), torch.full((2, D), 3.0))
        each.add(torch.full((1, D), 2.0))
    assert_same(twin, index)
    assert log.count("copies waits for search") == 5


@pytest.mark.usefixtures("no_kernels")
def test_codes_stay_on_the_host(log: list[str]) -> None:
    index = filled(codes=True)
    plain = FlatIndex(D)
    plain.add(index.vectors(torch.arange(N)))
    twin = elsewhere(index)
    assert_same(twin, plain)
    assert twin._codes.take() is None and log


@pytest.mark.usefixtures("no_kernels")
def test_a_mapped_index_stays_on_the_disk(log: list[str], tmp_path: Path) -> None:
    index = filled()
    index.save(tmp_path / "index")
    twin = FlatIndex.load(tmp_path / "index")
    twin._host_search = HostSearch(ELSEWHERE)
    assert_same(twin, index)
    assert [each for each in log if each.startswith("locks")] == ["locks 1024"] * 2


def test_order_of_a_search(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def search_block(*args: Any) -> Tensor:
        log.append(f"search {args[-1].start} to {args[-1].stop}")
        return keys_of_block(*args)

    monkeypatch.setattr(triton_mips, "_search_block", search_block)
    twin = elsewhere(filled())
    twin.search(torch.ones(B, D), 1)
    first = ["host waits for sent 0", "locks 1024", "copies waits for searched 0", "copies: sent 0"]
    first += ["search waits for sent 0", "search 0 to 24", "search: searched 0"]
    second = [line.replace(" 0", " 1") for line in first[:5]]
    second += ["search 24 to 48", "search: searched 1"]
    third = [line for line in first if "locks" not in line]
    third[-2] = "search 48 to 70"
    start, stop = "copies waits for search", "search waits for copies"
    assert log == [start, *first, *second, *third, stop]

    log.clear()
    twin.search(torch.ones(B, D), 1)
    assert not any("locks" in line for line in log) and log[0] == start

    log.clear()
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(triton_mips, "_search_block", lambda *_: 1 // 0)
        twin.search(torch.ones(B, D), 1)
    assert log[-1] == stop


@pytest.mark.usefixtures("no_kernels")
def test_page_locked_memory_grows_with_the_index(log: list[str]) -> None:
    twin = FlatIndex(D)
    twin._host_search = HostSearch(ELSEWHERE)
    locked = []
    for n in (1, 1, 20, 60):
        twin.add(torch.ones(n, D))
        log.clear()
        assert twin.search(torch.ones(B, D), 1).rows.tolist() == [[0]] * B
        locked.append([line for line in log if line.startswith("locks")])
    assert locked == [["locks 32"], ["locks 64"], ["locks 1024"], ["locks 1024"]]


def test_what_the_kernels_cannot_do_the_cpu_does(log: list[str]) -> None:
    index = filled()
    twin = elsewhere(index)
    assert_same(twin, index, k=1100)
    assert_same(twin, index, exclude=torch.randint(N, (B, 300)))
    assert [len(x) for x in twin.search(torch.ones(0, D), 2)] == [0, 0]
    assert not log


@pytest.mark.usefixtures("no_kernels")
def test_a_change_waits_for_the_search_in_progress(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = elsewhere(filled())
    expected = twin.search(torch.ones(B, D), K)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Tensor:
        inside.set()
        assert go_on.wait(20)
        return keys_of_block(*args)

    monkeypatch.setattr(triton_mips, "_search_block", slow)
    found: list[tuple[Tensor, Tensor]] = []
    search = threading.Thread(target=lambda: found.append(twin.search(torch.ones(B, D), K)))
    search.start()
    assert inside.wait(20)
    change = threading.Thread(target=twin.update, args=(torch.arange(N), torch.zeros(N, D)))
    change.start()
    change.join(0.1)
    assert change.is_alive()
    go_on.set()
    search.join()
    change.join()
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))
    assert twin.search(torch.ones(B, D), 1).scores.eq(0).all()


def test_searches_take_turns(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any) -> Tensor:
        time.sleep(0.001)  # lets another thread go on
        return keys_of_block(*args)

    monkeypatch.setattr(triton_mips, "_search_block", slow)
    twin = elsewhere(filled())
    query = torch.randn(8, 1, D)
    expected = [twin.search(q, K).rows for q in query]
    log.clear()
    found: list[Tensor] = [torch.empty(0)] * 8

    def search(i: int) -> None:
        found[i] = twin.search(query[i], K).rows

    threads = [threading.Thread(target=search, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    turns = [line for line in log if line.endswith(("for search", "for copies"))]
    assert turns == ["copies waits for search", "search waits for copies"] * 8


@pytest.mark.usefixtures("no_kernels")
def test_a_copy_shares_no_memory(log: list[str]) -> None:
    twin = elsewhere(filled())
    twin.search(torch.ones(B, D), K)
    other = copy.deepcopy(twin)
    assert other.search_device == ELSEWHERE
    assert other._host_search._copies is None and twin._host_search._copies is not None
    assert_same(other, twin)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
def test_the_choice_is_kept(tmp_path: Path) -> None:
    index = FlatIndex(D, search_device="cuda:0")
    assert (str(index.device), str(index.search_device)) == ("cpu", "cuda:0")
    assert "device='cpu', search_device='cuda:0'" in repr(index)
    index.add(vectors())
    index.save(tmp_path / "index")
    assert str(index.astype("int8").search_device) == "cuda:0"
    assert str(index.to("cpu", search_device="cuda").search_device) == "cuda:1"
    assert str(index.to("cpu").search_device) == "cpu" == str(index.astype("int8").search_device)
    loaded = FlatIndex.load(tmp_path / "index", search_device="cuda:1")
    assert str(loaded.search_device) == "cuda:1" and loaded._mapped
    assert str(FlatIndex.load(tmp_path / "index").search_device) == "cpu"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "search_device", "message"),
    [
        ("cpu", "cuda:2", "expected cpu, .* or a CUDA device, .* finds 2 here, got cuda:2"),
        ("cpu", "meta", "expected cpu, .* or a CUDA device, .* got meta"),
        ("cuda:0", "cpu", "expected cuda:0, where the vectors are, got cpu"),
        ("cuda", "cuda:0", "expected cuda:1, where the vectors are, got cuda:0"),
    ],
)
def test_rejects_a_device(device: str, search_device: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"search_device: {message}"):
        HostSearch.of(search_device, device)
    for same in ("cuda", "cuda:1", None):
        assert HostSearch.of(same, "cuda:1") is None
    assert HostSearch.of("cuda:1", "cuda") is None


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    index = filled()
    with pytest.raises(ValueError, match="expected cpu, .* torch finds 0 here, got cuda"):
        index.to("cpu", search_device="cuda")
    assert str(index.search_device) == "cpu"
