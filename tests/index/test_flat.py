from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.index import FlatIndex
from tests.threads import repeated

INF = float("inf")
NOT_HERE = "cuda:99"


def brute_force(query, vectors, k, barred):
    """float64 top-k, ties by lowest row; barred: set of rows per query."""
    scores = query.double() @ vectors.double().T
    for b, rows in enumerate(barred):
        scores[b, list(rows)] = -INF
    rows = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    rows = torch.nn.functional.pad(rows, (0, k - rows.shape[1]))
    found = torch.full_like(rows, -INF, dtype=torch.float64)
    n = min(k, vectors.shape[0])
    found[:, :n] = scores.gather(1, rows[:, :n])
    return found, rows.masked_fill(found == -INF, -1)


@pytest.fixture
def vectors():
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def query():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def index(vectors):
    index = FlatIndex(4)
    index.add(vectors)
    return index


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_search_equals_brute_force(data):
    n, dim = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    n_queries, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    # small whole numbers: many ties, exact in fp32
    vectors = torch.randint(-2, 3, (n, dim), generator=generator).float()
    query = torch.randint(-2, 3, (n_queries, dim), generator=generator).float()
    removed = set(data.draw(st.lists(st.integers(0, n - 1), max_size=n)))
    index = FlatIndex(dim)
    index.add(vectors)
    index.remove(torch.tensor(sorted(removed), dtype=torch.int64))
    barred = [set(removed) for _ in range(n_queries)]
    exclude = None
    how = data.draw(st.sampled_from(["none", "rows", "mask"]))
    if how == "rows":
        width = data.draw(st.integers(0, 5))
        rows = st.lists(st.integers(-1, n - 1), min_size=width, max_size=width)
        chosen = [data.draw(rows) for _ in range(n_queries)]
        exclude = torch.tensor(chosen, dtype=torch.int64).reshape(n_queries, width)
        barred = [each | {r for r in c if r >= 0} for each, c in zip(barred, chosen, strict=True)]
    elif how == "mask":
        mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        exclude = torch.tensor(mask)
        barred = [each | {i for i in range(n) if mask[i]} for each in barred]
    scores, rows = index.search(query, k, exclude=exclude)
    expected_scores, expected_rows = brute_force(query, vectors, k, barred)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(scores.double(), expected_scores)
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"codes": True}], ids=["int8", "float32 with codes"]
)
def test_the_default_dtype_of_torch_changes_nothing(monkeypatch, vectors, query, options):
    monkeypatch.setattr("fastrag.index.codes.pay", lambda query, index_emb, k: True)
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            index = FlatIndex(4, **options)
            empty = index.search(query, 3), index.vectors(torch.tensor([-1]))
            index.add(vectors)
            found.append([*empty[0], empty[1], *index.search(query, 3)])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_search_has_no_gradient(index, query):
    scores, _ = index.search(query.requires_grad_(), 2)
    assert not scores.requires_grad


def test_fewer_live_rows_than_k_are_missing(query):
    index = FlatIndex(4)
    index.add(torch.ones(3, 4))
    index.remove(torch.tensor([1]))
    scores, rows = index.search(query, 4)
    assert rows.tolist() == [[0, 2, -1, -1]] * 3
    assert (scores[:, 2:] == -INF).all() and scores[:, :2].isfinite().all()
    assert len(index) == 3 and index.n_live == 2


def test_empty_index_returns_missing_rows(query):
    scores, rows = FlatIndex(4).search(query, 2)
    assert rows.tolist() == [[-1, -1]] * 3 and (scores == -INF).all()
    assert FlatIndex(4).vectors(torch.tensor([-1])).tolist() == [[0.0] * 4]


def test_add_blocks_equals_add_whole(vectors):
    blocks = FlatIndex(4)
    assert blocks.add(block for block in vectors.split(3)) == range(20)
    assert blocks.add(iter([])) == range(20, 20)
    assert torch.equal(blocks.index_emb, vectors)
    assert blocks.add(vectors[:2].double().numpy()) == range(20, 22)
    assert torch.equal(blocks.index_emb[20:], vectors[:2])


def test_adding_grows_by_doubling():
    index = FlatIndex(2)
    moves = set()
    for _ in range(1000):
        index.add(torch.ones(1, 2))
        moves.add(index.index_emb.data_ptr())
    assert len(index) == 1000 and len(moves) <= 12


def test_an_error_adds_nothing(index, vectors):
    bad = vectors.clone()
    bad[17, 2] = float("nan")
    version = index.version
    with pytest.raises(
        ValueError, match="vectors: expected finite fp32 numbers, got nan in row 17"
    ):
        index.add(bad.split(5))
    with pytest.raises(ValueError, match="got inf in row 1"):
        index.add(torch.tensor([[0.0] * 4, [1e39] * 4], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"vectors: expected \[n, 4\], got \[2, 5\]"):
        index.add(block for block in [vectors, torch.ones(2, 5)])
    assert len(index) == 20 and index.version == version
    assert torch.equal(index.index_emb, vectors)


def test_update_and_version(index, vectors, query):
    version = index.version
    index.update(torch.tensor([3, 0]), torch.stack([vectors[0], vectors[3]]))
    assert index.version == version + 1
    swapped = vectors.clone()
    swapped[[0, 3]] = vectors[[3, 0]]
    assert torch.equal(index.index_emb, swapped)
    _, rows = index.search(query, 5)
    assert torch.equal(rows, brute_force(query, swapped, 5, [set()] * 3)[1])


def test_replace_keeps_tombstones(index, vectors, query):
    index.remove(torch.tensor([4]))
    index.replace(block for block in (-vectors).split(7))
    assert torch.equal(index.index_emb, -vectors) and index.n_live == 19
    _, rows = index.search(query, 5)
    assert torch.equal(rows, brute_force(query, -vectors, 5, [{4}] * 3)[1])
    for wrong in (vectors[:19], torch.cat([vectors, vectors])):
        with pytest.raises(ValueError, match="vectors: expected 20 rows, got"):
            index.replace(wrong)
    with pytest.raises(ValueError, match="got nan in row 19"):
        index.replace([vectors[:19], torch.full((1, 4), float("nan"))])
    assert torch.equal(index.index_emb, -vectors)


def test_vectors_of_any_shape(index, vectors):
    rows = torch.tensor([[3, -1], [0, 19]])
    found = index.vectors(rows)
    assert torch.equal(
        found,
        torch.stack([vectors[[3, 0]], vectors[[0, 19]]])
        * (torch.tensor([[1.0, 0.0], [1.0, 1.0]])[..., None]),
    )
    assert index.vectors(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 4)
    for bad in (-2, 20):
        with pytest.raises(ValueError, match=f"rows: expected -1 to 19, got {bad}"):
            index.vectors(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match=r"rows: expected int64 or int32, got \[1\] float32"):
        index.vectors(torch.tensor([0.0]))


@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(index, vectors, query, tmp_path, mmap):
    index.remove(torch.tensor([2, 5]))
    index.save(tmp_path / "index")
    loaded = FlatIndex.load(tmp_path / "index", mmap=mmap, verify=True)
    assert loaded.checksum() == index.checksum() and loaded.version == index.version
    assert loaded.source == index.source == tmp_path / "index"
    assert len(loaded) == 20 and loaded.n_live == 18
    for found, expected in zip(loaded.search(query, 6), index.search(query, 6), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(torch.tensor([1]), torch.zeros(1, 4)),
        lambda index: index.add(torch.ones(1, 4)),
        lambda index: index.remove(torch.tensor([1])),
        lambda index: index.replace(torch.zeros(20, 4)),
    ],
    ids=["update", "add", "remove", "replace"],
)
def test_changing_a_mapped_index_leaves_the_disk_alone(index, vectors, tmp_path, change):
    index.save(tmp_path / "index")
    loaded = FlatIndex.load(tmp_path / "index")
    change(loaded)
    assert loaded.source is None and loaded.version == index.version + 1
    assert loaded.checksum() != index.checksum()
    change(index)
    assert torch.equal(loaded.index_emb, index.index_emb)
    assert loaded.checksum() == index.checksum()
    again = FlatIndex.load(tmp_path / "index", verify=True)
    assert torch.equal(again.index_emb, vectors) and again.n_live == 20
    loaded.save(tmp_path / "index")  # over the folder that it was mapped from
    assert FlatIndex.load(tmp_path / "index", verify=True).checksum() == index.checksum()


def test_a_mapped_index_saves_over_itself(index, vectors, tmp_path):
    index.save(tmp_path / "index")
    loaded = FlatIndex.load(tmp_path / "index")
    loaded.save(tmp_path / "index")
    assert torch.equal(loaded.index_emb, vectors)
    assert torch.equal(FlatIndex.load(tmp_path / "index", verify=True).index_emb, vectors)


def test_checksum_names_the_content(index, vectors):
    same = FlatIndex(4)
    same.add(vectors.split(6))
    assert same.checksum() == index.checksum()
    different = FlatIndex(4)
    different.add(vectors.flip(0))
    assert different.checksum() != index.checksum()
    same.remove(torch.tensor([0]))
    assert same.checksum() != index.checksum()
    flat = FlatIndex(2)
    flat.add(vectors.reshape(-1, 2))
    assert flat.checksum() != index.checksum()


def test_loading_checks_the_files(index, tmp_path):
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "vectors.npy"
    data = bytearray(path.read_bytes())
    data[-61] ^= 1
    path.write_bytes(data)
    FlatIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match=r"vectors\.npy: expected SHA-256 .*, got"):
        FlatIndex.load(tmp_path / "index", verify=True)
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=r"vectors\.npy: expected 1408 bytes, got 1404"):
        FlatIndex.load(tmp_path / "index")


def test_a_copy_is_independent(index, vectors):
    twin = copy.deepcopy(index)
    twin.update(torch.tensor([0]), torch.zeros(1, 4))
    assert torch.equal(index.index_emb, vectors)
    assert twin.search(torch.ones(1, 4), 1).rows.shape == (1, 1)


def test_numpy_input_is_copied(vectors):
    array = vectors.numpy().copy()
    index = FlatIndex(4)
    index.add(array)
    array[:] = 0
    assert torch.equal(index.index_emb, vectors)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_searches_beside_updates_see_old_or_new_rows(dtype):
    """All rows of a version have one value; a mixture of versions would be torn.

    Codes too: read with the scale and offset of another version they would be other values.
    """
    n, dim = 2000, 32
    index = FlatIndex(dim, dtype)
    index.add(torch.zeros(n, dim))
    rows, query = torch.arange(n), torch.ones(1, dim)
    torn, seen = [], set()

    def search():
        values = index.search(query, n).scores[0].unique().tolist()
        seen.update(values)
        if len(values) != 1:
            torn.append(values)

    with repeated(search, threads=3):
        for step in range(60):
            fresh = torch.full((n, dim), float(step % 2))
            if step % 10 == 0:
                index.replace(fresh)
            else:
                index.update(rows, fresh)
    assert not torn and seen <= {0.0, float(dim)} and seen


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(torch.arange(20), torch.zeros(20, 4)),
        lambda index: index.replace(torch.zeros(20, 4)),
        lambda index: index.remove(torch.tensor([0])),
    ],
    ids=["update", "replace", "remove"],
)
def test_a_change_waits_for_the_search_in_progress(index, query, monkeypatch, change):
    from fastrag import functional

    expected = index.search(query, 5)
    inside, go_on = threading.Event(), threading.Event()
    plain = functional.mips_topk

    def slow(*args, **kwargs):
        inside.set()
        assert go_on.wait(20)
        return plain(*args, **kwargs)

    monkeypatch.setattr(functional, "mips_topk", slow)
    found = []
    search = threading.Thread(target=lambda: found.append(index.search(query, 5)))
    search.start()
    assert inside.wait(20)
    version = index.version
    writer = threading.Thread(target=change, args=(index,))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive() and index.version == version
    go_on.set()
    search.join()
    writer.join()
    assert index.version == version + 1
    assert torch.equal(found[0].scores, expected.scores)
    assert torch.equal(found[0].rows, expected.rows)


def test_searches_run_side_by_side(index, query, monkeypatch):
    from fastrag import functional

    inside = threading.Barrier(2, timeout=20)
    plain = functional.mips_topk

    def slow(*args, **kwargs):
        inside.wait()  # passes only when two searches are in here together
        return plain(*args, **kwargs)

    monkeypatch.setattr(functional, "mips_topk", slow)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(index.search(query, 2))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2


def test_whole_numbers_of_numpy(vectors, query, index):
    """They are what a loop over np.array([1, 5, 20]) and a shape in a file give."""
    again = FlatIndex(np.int64(vectors.shape[1]))
    again.add(vectors)
    assert type(again.dim) is int
    for found, expected in zip(
        again.search(query, np.int64(3)), index.search(query, 3), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: expected a whole number of at least 1, got 0"),
        ({"dim": 2.0}, "dim: expected a whole number"),
        ({"dim": True}, "dim: expected a whole number"),
        ({"dim": 4, "dtype": "int4"}, "dtype: expected one of float32, .*, int8, got 'int4'"),
        ({"dim": 4, "device": "gpu"}, "^device: expected one of torch, got 'gpu'$"),
        ({"dim": 4, "search_device": "gpu"}, "^search_device: expected one of torch, got 'gpu'$"),
        (
            {"dim": 4, "device": NOT_HERE},
            f"device: .* torch can use, got {NOT_HERE}: ",
        ),
    ],
)
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlatIndex(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.search(torch.ones(1, 5), 1), r"query_emb: expected \[B, 4\], got \[1, 5\]"),
        (lambda i: i.search(torch.ones(4), 1), r"query_emb: expected \[B, 4\], got \[4\]"),
        (lambda i: i.search(torch.ones(1, 4).long(), 1), "query_emb: expected a floating-point"),
        (lambda i: i.search(np.ones((1, 4)), 1), "query_emb: expected .* tensor, got ndarray"),
        (lambda i: i.search(torch.ones(1, 4), 0), "k: expected a whole number .* got 0"),
        (lambda i: i.search(torch.ones(1, 4), 1.5), "k: expected a whole number .* got 1.5"),
        (lambda i: i.search(torch.full((1, 4), float("nan")), 1), "query_emb: .*row 0"),
        (
            lambda i: i.search(torch.ones(2, 4), 1, exclude=torch.zeros(3, 1).long()),
            r"exclude: expected int64 \[2, E\] or bool \[20\], got torch.int64 \[3, 1\]",
        ),
        (
            lambda i: i.search(torch.ones(1, 4), 1, exclude=np.zeros((1, 1), int)),
            "exclude: expected a tensor, got ndarray",
        ),
        (lambda i: i.vectors([0]), "rows: expected a tensor, got list"),
        (lambda i: i.update("one", torch.ones(1, 4)), r"rows: expected \[n\] int64, got 'one'"),
        (lambda i: i.update(torch.tensor([20]), torch.ones(1, 4)), "rows: expected 0 to 19"),
        (lambda i: i.update(torch.tensor([1, 1]), torch.ones(2, 4)), "each once, got 1 again"),
        (lambda i: i.update(torch.tensor([1]), torch.ones(2, 4)), r"expected \[1, 4\] for 1 rows"),
        (lambda i: i.update(torch.tensor([1]), torch.full((1, 4), INF)), "got inf in row 0"),
        (lambda i: i.update(torch.tensor([1.0]), torch.ones(1, 4)), r"rows: expected \[n\] int64"),
        (lambda i: i.remove(torch.tensor([-1])), "rows: expected 0 to 19, got -1"),
        (lambda i: i.add(torch.ones(2, 4).long()), "vectors: expected floating point"),
        (lambda i: i.add(torch.ones(4)), r"vectors: expected \[n, 4\], got \[4\]"),
        (
            lambda i: i.add(torch.ones(2, 4).to_sparse()),
            "a dense tensor, got .*sparse_coo",
        ),
        (
            lambda i: i.add(torch.ones(2, 4, device="meta")),
            "a dense tensor, got .* on meta",
        ),
        (lambda i: i.to(NOT_HERE), f"device: .* torch can use, got {NOT_HERE}: "),
        (lambda i: i.add(5), "vectors: expected .* got int"),
        (lambda i: i.add(["x"]), "vectors: expected a tensor or an array, got str"),
    ],
)
def test_rejects_bad_input(index, vectors, call, message):
    with pytest.raises(ValueError, match=message):
        call(index)
    assert torch.equal(index.index_emb, vectors) and index.n_live == 20
