"""FaissIndex: the conventions of FlatIndex on faiss, and clear errors where faiss cannot."""

from __future__ import annotations

import copy
import functools
import gc
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrag import FaissIndex, FlatIndex
from fastrag.index import Index, faiss_index, faiss_support, storage
from tests import tiny
from tests.threads import repeated

faiss = pytest.importorskip("faiss")

INF = float("inf")
N, DIM = 600, 16
# factory -> how to search it so that it finds what an exhaustive search finds
EXHAUSTIVE = {
    "Flat": None,
    "SQfp16": None,
    "IVF8,Flat": "nprobe=8",
    "HNSW16": "efSearch=600",
    "IVF8_HNSW8,Flat": "nprobe=8",
    "OPQ4,IVF8,SQfp16": "nprobe=8",
    "IVF8,PQ4x4,RFlat": "nprobe=8,k_factor_rf=100",
}
FACTORIES = pytest.mark.parametrize("factory", EXHAUSTIVE)


def vectors(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def query(n: int = 4) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(9))


@functools.cache
def trained(factory: str) -> FaissIndex:
    index = FaissIndex(DIM, factory, parameters=EXHAUSTIVE.get(factory))
    index.add(vectors())
    return index


def made(factory: str) -> FaissIndex:
    """A copy: to train takes longer than any test of what was trained."""
    return copy.deepcopy(trained(factory))


def flat(given: torch.Tensor | None = None) -> FlatIndex:
    index = FlatIndex(DIM)
    index.add(vectors() if given is None else given)
    return index


def assert_same_hits(index: Index, exact: Index, k: int = 5, **how: Any) -> None:
    """Rows as the exact search has them but for near ties; scores to float16's rounding."""
    scores, rows = index.search(query(), k, **how)
    best, expected = exact.search(query(), k, **how)
    assert (scores.dtype, rows.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(scores, best, rtol=2e-3, atol=2e-2)
    assert (rows == expected).float().mean() >= 0.9


def test_both_are_an_index() -> None:
    assert isinstance(made("Flat"), Index) and isinstance(flat(), Index)


@FACTORIES
def test_search_as_the_exact_one(factory: str) -> None:
    index, exact = made(factory), flat()
    assert len(index) == index.n_live == N and index.dim == DIM and index.version == 1
    assert_same_hits(index, exact)
    assert_same_hits(index, exact, exclude=exact.search(query(), 3).rows)
    for each in (index, exact):
        each.remove(torch.tensor([0, 5, 599]))
        each.remove(exact.search(query(), 1).rows.flatten().unique())
    gc.collect(1)  # what the search leaves out is held by the search
    assert index.n_live == exact.n_live < N
    assert_same_hits(index, exact)
    assert_same_hits(index, exact, exclude=torch.arange(N) % 2 == 0)
    assert_same_hits(index, exact, exclude=exact.search(query(), 3).rows)
    added = vectors(50, seed=3)
    assert index.add(added) == exact.add(added) == range(N, N + 50)
    assert_same_hits(index, exact)


@FACTORIES
def test_vectors_are_reconstructed(factory: str) -> None:
    index = made(factory)
    rows = torch.tensor([[3, -1], [0, N - 1]])
    found = index.vectors(rows)
    assert found.shape == (2, 2, DIM) and found[0, 1].tolist() == [0.0] * DIM
    torch.testing.assert_close(
        found[[0, 1, 1], [0, 0, 1]], vectors()[[3, 0, N - 1]], rtol=2e-3, atol=2e-3
    )
    assert index.vectors(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, DIM)
    with pytest.raises(ValueError, match=f"rows: expected -1 to {N - 1}, got {N}"):
        index.vectors(torch.tensor([N]))


KEPT = [
    "Flat",
    "SQ8",
    "SQ4",
    "SQfp16",
    "SQbf16",
    "PQ4x4",
    "PQ4x4fs",
    "OPQ4,PQ4x4fs",
    "IVF8,Flat",
    "IVF8,SQ8",
    "IVF8,PQ4x4",
    "RQ4x4",
    "RQ4x4fs",
    "PRQ2x2x4fs",
    "IVF8,RQ4x4",
    "RaBitQ",
    "IVF8,RaBitQ",
    "IVF8,FlatPanorama4",
    "PCA8,SQ8",
    "HNSW8",
    "HNSW8_SQ8",
    "NSG8",
    "IVF8,PQ4x4fs,RFlat",
    "OPQ4,IVF8,PQ4x4fs,RFlat",
    "IVF8,PQ4x4fs,Refine(SQfp16)",
    "IVF8,FlatDedup,RFlat",
    "IVF8,SQ8,Refine(IVF8,Flat)",
    "PQ4x4fs_64,RFlat",
]
NOT_KEPT = [
    "IVF8,PQ4x4fs",
    "IVF8,PQ4x4fsr",
    "OPQ4,IVF8,PQ4x4fs",
    "PCA8,IVF8,PQ4x4fs",
    "IVF8_HNSW8,PQ4x4fs",
    "IVF8,RQ4x4fs",
    "IVF8,LSQ4x4fs",
    "IVF8,PRQ2x2x4fs",
    "IVF8,PLSQ2x2x4fs",
    "IVF8,RaBitQfs",
    "IVF8,FlatDedup",
    "PQ4x4fs_64",
    "OPQ4,PQ4x4fs_64",
    "IVF8(PQ4x4fs_64),Flat",
    "IVF8,Flat,Refine(IVF8,PQ4x4fs)",
    "ZnLattice4x4_4",
]


@pytest.mark.parametrize("factory", KEPT)
def test_vectors_are_those_that_faiss_codes(factory: str, tmp_path: Path) -> None:
    index = FaissIndex(DIM, factory)
    index.add(vectors())
    codec = index._index
    if isinstance(codec, faiss.IndexRefine):
        codec = faiss.downcast_index(codec.refine_index)
    expected = vectors()
    if not factory.startswith(("HNSW", "NSG")):
        expected = torch.from_numpy(codec.sa_decode(codec.sa_encode(expected.numpy())))
    index.save(tmp_path / "i")
    for each in (
        index,
        FaissIndex.load(tmp_path / "i"),
        FaissIndex.load(tmp_path / "i", mmap=False),
    ):
        found = each.vectors(torch.arange(N))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if "SQ8" in factory else 1e-5)


@pytest.mark.parametrize("factory", NOT_KEPT)
def test_refuses_a_factory_whose_rows_faiss_does_not_give_back(
    factory: str,
) -> None:
    message = rf"factory: expected one whose rows faiss can .*, got '{re.escape(factory)}', "
    with pytest.raises(ValueError, match=message):
        FaissIndex(DIM, factory)


@pytest.mark.parametrize("told", ["IVF8,PQ4x4fs", "IVF8,Flat"])
def test_refuses_to_load_rows_that_faiss_does_not_give_back(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(faiss_support, "check_kept", lambda *args: None)
        index = FaissIndex(DIM, "IVF8,PQ4x4fs")
        index.add(vectors())
        index.factory = told
        index.save(tmp_path / "i")
    message = rf"{tmp_path}/i: factory: expected one whose rows faiss can reconstruct, got '{told}'"
    for mmap in (True, False):
        with pytest.raises(ValueError, match=message):
            FaissIndex.load(tmp_path / "i", mmap=mmap)


def test_missing_hits_and_ties() -> None:
    index = FaissIndex(2)
    scores, rows = index.search(torch.ones(3, 2), 2)
    assert rows.tolist() == [[-1, -1]] * 3 and (scores == -INF).all()
    index.add(torch.tensor([[1.0, 0.0]] * 3 + [[2.0, 0.0]]))
    scores, rows = index.search(torch.ones(1, 2), 6)
    assert rows.tolist() == [[3, 0, 1, 2, -1, -1]]
    assert scores.tolist() == [[2.0, 1.0, 1.0, 1.0, -INF, -INF]]
    index.remove([1])
    scores, rows = index.search(torch.ones(1, 2), 4, exclude=torch.tensor([[3, -1]]))
    assert rows.tolist() == [[0, 2, -1, -1]]


@FACTORIES
def test_replace_and_update(factory: str) -> None:
    index, version = made(factory), 1
    index.remove(torch.tensor([4]))
    index.replace(block for block in (-vectors()).split(100))
    exact = flat(-vectors())
    exact.remove(torch.tensor([4]))
    assert_same_hits(index, exact)
    version += 2
    rows = torch.tensor([500, 1, 30])
    if factory == "HNSW16":
        with pytest.raises(ValueError, match="update: .* can be overwritten .* got 'HNSW16'"):
            index.update(rows, vectors()[rows])
    else:
        for each in (index, exact):
            each.update(rows, vectors()[rows])
        version += 1
        torch.testing.assert_close(index.vectors(rows), vectors()[rows], rtol=2e-3, atol=2e-3)
    assert index.version == version
    assert_same_hits(index, exact)


@FACTORIES
def test_save_and_load(factory: str, tmp_path) -> None:
    index = made(factory)
    index.remove(torch.tensor([2]))
    assert index.source is None
    checksum = index.checksum()
    index.save(tmp_path / "i")
    assert index.source == tmp_path / "i" and index.checksum() == checksum
    best = index.search(query(), 7)
    for mmap in (True, False):
        loaded = FaissIndex.load(tmp_path / "i", mmap=mmap, verify=True)
        assert loaded.checksum() == checksum and loaded.source == index.source
        assert (loaded.factory, loaded.parameters) == (factory, EXHAUSTIVE[factory])
        assert (len(loaded), loaded.n_live, loaded.version) == (N, N - 1, index.version)
        assert all(torch.equal(a, b) for a, b in zip(loaded.search(query(), 7), best, strict=True))
        assert torch.equal(loaded.vectors(torch.arange(9)), index.vectors(torch.arange(9)))
        loaded.add(vectors(3))
        assert loaded.source is None and len(loaded) == N + 3
        assert all(torch.equal(a, b) for a, b in zip(index.search(query(), 7), best, strict=True))
    twin = copy.deepcopy(index)
    twin.replace(-vectors())
    assert_same_hits(index, FlatIndex.astype(_without(flat(), 2), "float32"))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,PQ4x4fs,RFlat"])
def test_changing_a_mapped_index_leaves_the_disk_alone(factory: str, tmp_path) -> None:
    index = made(factory)
    index.save(tmp_path / "i")
    asked = torch.tensor([5, 599])
    changes = [
        lambda i: i.update(asked, vectors(2, seed=3)),
        lambda i: i.replace(vectors(seed=3)),
        lambda i: i.remove(asked),
    ]
    for change in changes["fs" in factory :]:  # which cannot overwrite rows
        loaded, twin = FaissIndex.load(tmp_path / "i"), copy.deepcopy(index)
        for each in (loaded, twin):
            change(each)
        assert loaded.checksum() == twin.checksum() != index.checksum()
        loaded.save(tmp_path / "changed")
        assert FaissIndex.load(tmp_path / "changed", verify=True).checksum() == twin.checksum()
        assert FaissIndex.load(tmp_path / "i", verify=True).checksum() == index.checksum()
    loaded = FaissIndex.load(tmp_path / "i")
    loaded.save(tmp_path / "i")  # over the file that it lies in
    twin = copy.deepcopy(loaded)
    twin.add(vectors(1))
    assert loaded.checksum() == index.checksum() != twin.checksum()


def test_a_mapped_index_takes_no_memory(tmp_path) -> None:
    def own_bytes() -> int:
        gc.collect()  # what earlier tests left may go at any time
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    def is_mapped() -> bool:
        gc.collect()
        return str(tmp_path / "i") in Path("/proc/self/maps").read_text()

    index = FaissIndex(256)
    index.add(torch.ones(1, 256).expand(40_000, -1))  # 40 MB
    index.save(tmp_path / "i")
    before = own_bytes()
    mapped = FaissIndex.load(tmp_path / "i")
    assert mapped.search(torch.ones(1, 256), 1).rows.tolist() == [[0]]
    assert own_bytes() - before < 10e6 and is_mapped()
    del mapped
    read = FaissIndex.load(tmp_path / "i", mmap=False)
    assert not is_mapped() and len(read) == 40_000


def _without(index: FlatIndex, row: int) -> FlatIndex:
    index.remove(torch.tensor([row]))
    return index


def test_search_parameters_are_kept_when_rows_are_left_out() -> None:
    """Parameters given with a search stand in place of those of the index."""
    wide, narrow = FaissIndex(DIM, "IVF8,Flat", parameters="nprobe=8"), FaissIndex(DIM, "IVF8,Flat")
    for index in (wide, narrow):
        index.add(vectors())
        index.remove(torch.tensor([0]))
    exact = _without(flat(), 0)
    expected = exact.search(query(), 20).rows
    assert torch.equal(wide.search(query(), 20).rows, expected)
    assert not torch.equal(narrow.search(query(), 20).rows, expected)


def test_training_on_a_sample(monkeypatch) -> None:
    monkeypatch.setattr(faiss_support, "_TRAINING_ROWS", 200)
    monkeypatch.setattr(faiss_support, "_ROWS_PER_LIST", 10)
    seen = []
    plain = faiss_support.train
    monkeypatch.setattr(
        faiss_support, "train", lambda i, sample, f: seen.append(sample) or plain(i, sample, f)
    )
    whole = FaissIndex(DIM, "IVF4,Flat")
    assert not whole.is_trained
    whole.add(vectors().numpy())
    np.testing.assert_array_equal(seen.pop(), vectors()[::3].numpy())
    streamed = FaissIndex(DIM, "IVF4,Flat")
    streamed.add(iter(vectors().split(70)))
    np.testing.assert_array_equal(seen.pop(), vectors()[:210].numpy())
    trained = FaissIndex(DIM, "IVF4,Flat")
    trained.train(vectors()[:150])
    assert trained.is_trained and len(trained) == 0 and len(seen.pop()) == 150
    trained.add(vectors())
    assert not seen and len(whole) == len(streamed) == len(trained) == N
    with pytest.raises(ValueError, match=f"train: expected an index without rows, got one of {N}"):
        trained.train(vectors())


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_an_error_leaves_the_index_as_it_was(factory: str) -> None:
    bad = vectors()
    bad[401, 3] = float("nan")
    index = FaissIndex(DIM, factory)
    for given in (bad, bad.numpy(), bad.split(90), iter(bad.split(90))):
        with pytest.raises(ValueError, match="vectors: .* got nan in row 401"):
            index.add(given)
    assert len(index) == 0 and index.is_trained == (factory == "Flat")
    index.add(vectors())
    before = index.checksum(), index.version
    for given in (bad, bad.split(90), iter(bad.split(90))):
        with pytest.raises(ValueError, match="vectors: .* got nan in row 401"):
            index.add(given)
    with pytest.raises(ValueError, match="row 401"):
        index.replace(bad)
    with pytest.raises(ValueError, match=f"vectors: expected {N} rows, got 10"):
        index.replace(vectors()[:10] if factory == "Flat" else vectors()[:10].split(5))
    with pytest.raises(ValueError, match="row 401"):
        index.update(torch.arange(N), bad)
    assert (index.checksum(), index.version) == before and len(index) == N
    assert index.add(-vectors()[:1]) == range(N, N + 1)  # nothing of what failed lies before it
    torch.testing.assert_close(index.vectors(torch.tensor([N])), -vectors()[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FaissIndex(0), "dim: expected a whole number of at least 1, got 0"),
        (lambda: FaissIndex(DIM, "Foo"), "factory: .* faiss can build for width 16: 'Foo', got "),
        (lambda: FaissIndex(DIM, "PQ5"), "factory: .*width 16: 'PQ5', got from faiss: The dim"),
        (lambda: FaissIndex(DIM, None), "factory: expected a string .* got None"),
        (lambda: FaissIndex(DIM, "IDMap,Flat"), "factory: expected rows numbered as they are"),
        (lambda: FaissIndex(DIM, parameters="nprobe=3"), "parameters: .*'Flat': 'nprobe=3'"),
        (lambda: FaissIndex(DIM, "RaBitQfs"), "factory: .* faiss can copy: 'RaBitQfs', got from"),
        (lambda: FaissIndex(DIM, device="cuda"), r"device: expected cpu, or cuda .*faiss-gpu"),
        (lambda: made("Flat").to("cuda"), r"device: expected cpu, or cuda .*faiss-gpu"),
        (
            lambda: FaissIndex(DIM, "IVF64,Flat").add(vectors(10)),
            "enough of them to train 'IVF64,Flat', 10 came, got from faiss: Number of training",
        ),
        (lambda: made("Flat").add(torch.ones(2, 5)), r"vectors: expected \[n, 16\], got \[2, 5\]"),
        (lambda: made("Flat").add(torch.ones(2, DIM).long()), "vectors: expected floating point"),
        (lambda: made("Flat").search(torch.ones(1, 5), 1), r"query_emb: expected \[B, 16\]"),
        (lambda: made("Flat").search(query(), 0), "k: expected a whole number of at least 1"),
        (lambda: made("Flat").search(query() / 0, 1), "query_emb: expected finite .* in row 0"),
        (lambda: made("Flat").update([N], torch.ones(1, DIM)), "rows: expected 0 to 599, got 600"),
        (lambda: made("Flat").remove([1, 1]), "rows: expected each once, got 1 again"),
        (lambda: made("PQ4x4").remove([1]), "remove, exclude: expected a factory .* got 'PQ4x4'"),
        (
            lambda: made("PQ4x4").search(query(), 1, exclude=torch.ones(N, dtype=torch.bool)),
            "remove, exclude: expected a factory .* got 'PQ4x4'",
        ),
        (
            lambda: made("PQ4x4fs,RFlat").update([1], torch.ones(1, DIM)),
            "update: expected a factory .* got 'PQ4x4fs,RFlat'",
        ),
    ],
)
def test_rejects_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_leave_rows_out_still_leaves_out_a_few_per_query() -> None:
    index = made("PQ4x4")
    best = index.search(query(), 4).rows
    assert torch.equal(index.search(query(), 3, exclude=best[:, :1]).rows, best[:, 1:])


def test_without_faiss(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"FaissIndex needs faiss: pip install .*\[faiss\]"):
        FaissIndex(DIM)


def test_a_build_for_gpus_says_what_is_missing(monkeypatch, tmp_path) -> None:
    (tmp_path / "faiss.py").write_text("raise RuntimeError('nvidia-cublas-cu12 is missing')")
    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="FaissIndex needs faiss: .* nvidia-cublas-cu12 is miss"):
        FaissIndex(DIM)


def test_only_gpus_that_faiss_finds(monkeypatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    faiss_support.require_gpu(torch.device("cuda"))
    with pytest.raises(ValueError, match="faiss-gpu., which finds 1 GPUs here, got cuda:1"):
        faiss_support.require_gpu(torch.device("cuda:1"))


def test_loading_checks_the_files(tmp_path) -> None:
    made("IVF8,Flat").save(tmp_path / "i")
    path = tmp_path / "i" / "index.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=rf"index\.npy: expected {len(data)} bytes, got"):
        FaissIndex.load(tmp_path / "i")
    altered = bytearray(data)
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(ValueError, match=r"index\.npy: expected SHA-256 .* altered in block 0"):
        FaissIndex.load(tmp_path / "i", verify=True)
    with pytest.raises(ValueError, match="expected format 'fastrag.FaissIndex', got .*FlatIndex'"):
        flat().save(tmp_path / "flat")
        FaissIndex.load(tmp_path / "flat")
    with pytest.raises(ValueError, match="to replace, got a folder of format 'fastrag.FlatIndex'"):
        made("Flat").save(tmp_path / "flat")


def test_what_faiss_cannot_read_is_named(tmp_path) -> None:
    def save(data: bytes, count: int) -> None:
        arrays = {"index": np.frombuffer(data, np.uint8), "removed": np.zeros(0, np.int64)}
        head = {"format": faiss_index.FORMAT, "version": 1, "dim": DIM, "factory": "Flat"}
        head |= {"parameters": None, "count": count, "index_version": 1}
        storage.write_folder(tmp_path / "i", arrays, head)

    pieces: list[bytes] = []
    faiss_support.write(faiss.IndexFlatIP(DIM), pieces.append)
    save(b"".join(pieces)[:-9], 0)
    with pytest.raises(ValueError, match="expected an index that this faiss reads, got from faiss"):
        FaissIndex.load(tmp_path / "i")
    save(b"".join(pieces), 3)
    with pytest.raises(ValueError, match="expected 3 vectors of width 16, got 0 of width 16"):
        FaissIndex.load(tmp_path / "i")


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch) -> None:
    made("Flat").save(tmp_path / "i")
    negated = made("Flat")
    negated.replace(-vectors())
    with monkeypatch.context() as patch:

        def full(stream: Any, block: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(storage.ArrayStream, "append", full)
        with pytest.raises((OSError, ValueError), match="No space left"):
            negated.save(tmp_path / "i")
    assert FaissIndex.load(tmp_path / "i", verify=True).checksum() == made("Flat").checksum()
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


def test_searches_beside_changes() -> None:
    """All vectors of a version are one and the same; a mixture of versions would be torn."""
    index = FaissIndex(DIM, "IVF2,Flat", parameters="nprobe=2")
    noise = vectors(500) * 1e-6
    index.add(noise)
    torn, seen = [], set()

    def search() -> None:
        scores, _ = index.search(torch.ones(1, DIM), 500)
        values = {round(value, 2) for value in scores[0].tolist()}
        seen.update(values)
        if len(values) != 1:
            torn.append(values)

    with repeated(search, threads=2):
        for step in range(12):
            fresh = noise + step % 2
            if step % 3:
                index.update(torch.arange(500), fresh)
            else:
                index.replace(fresh)
    assert not torn and seen and seen <= {0.0, 16.0}


def test_on_a_gpu_searches_go_to_its_copy(monkeypatch) -> None:
    """With a stand-in for faiss-gpu: the copy follows each change; what it cannot do stays here."""
    copies: list[Any] = []

    class Copy:
        def __init__(self, index: Any) -> None:
            self.index, self.n_searches = faiss.clone_index(index), 0

        def search(self, query: Any, k: int, params: Any = None) -> Any:
            assert params is None  # as on a GPU
            self.n_searches += 1
            return self.index.search(query, k)

    def to_gpu(resources: Any, ordinal: int, index: Any) -> Any:
        copies.append(Copy(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    index, exact = made("Flat"), flat()
    index._device = torch.device("cuda", 0)
    index._copy_to_device()
    with monkeypatch.context() as patch:
        patch.setattr(FaissIndex, "device", torch.device("cpu"))  # there is none for the query
        assert_same_hits(index, exact)
        index.update(torch.tensor([0]), torch.ones(1, DIM))
        exact.update(torch.tensor([0]), torch.ones(1, DIM))
        assert_same_hits(index, exact)
        assert [copy.n_searches for copy in copies] == [1, 1]
        for each in (index, exact):
            each.remove(torch.tensor([7]))
        assert_same_hits(index, exact)


@pytest.mark.parametrize("make", [FaissIndex, lambda dim: FlatIndex(dim, "int8")])
def test_in_a_rag_model(make: Any) -> None:
    model = tiny.rag_model(fill_index=False)
    exact = tiny.rag_model()
    model.index = make(model.index.dim)
    model.refresh_index()
    with torch.no_grad():
        for each in (model, exact):
            each.eval()
        data = tiny.batch()
        loss, expected = model(**data), exact(**data)
        torch.testing.assert_close(loss.loss, expected.loss, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(loss.doc_scores, expected.doc_scores, rtol=2e-2, atol=0.2)
    model.train()
    found = model(**data)
    found.loss.backward()
    query_weight = next(model.question_encoder.parameters())
    assert query_weight.grad is not None and bool(query_weight.grad.abs().sum() > 0)
    before = model.index.version
    model.refresh_index()
    assert model.index.version == before + 1 and len(model.index) == 12
