"""The search in C++: bits, candidates, memory it is handed, threads, bad input.

test_mips_topk.py runs it beside the torch backend; tests/csrc compares it with one std::fma after
another, and runs it under sanitizers.
"""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrag import reference

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")

ISAS = _C.instruction_sets()
each_isa = pytest.mark.parametrize("isa", ISAS)

Found = tuple[Tensor, Tensor]


def search(query: Tensor, index: Tensor | np.ndarray, k: int, **options: object) -> Found:
    scores = torch.full((len(query), k), torch.nan)
    rows = torch.full((len(query), k), -7)
    index = index.numpy() if isinstance(index, Tensor) else index
    options = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in options.items()}
    _C.mips_topk(query.numpy(), index, scores.numpy(), rows.numpy(), **options)
    return scores, rows


def merge(parts: list[Found]) -> Found:
    scores, rows = (torch.stack(each) for each in zip(*parts, strict=True))
    best = torch.full_like(scores[0], torch.nan), torch.full_like(rows[0], -7)
    _C.merge_topk(scores.numpy(), rows.numpy(), best[0].numpy(), best[1].numpy())
    return best


def same(found: Found, expected: Found) -> bool:
    """The same rows and scores of the same bits."""
    bits = [scores.view(torch.int32) for scores, _ in (found, expected)]
    return torch.equal(bits[0], bits[1]) and torch.equal(found[1], expected[1])


def by_score(scores: Tensor, rows: Tensor, k: int) -> Found:
    """The first k of each line by (score descending, row ascending), missing ones last."""
    scores, rows = scores + torch.zeros(()), rows.clone()
    pad = max(0, k - scores.shape[1])
    scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
    rows = torch.nn.functional.pad(rows, (0, pad), value=-1)
    order = rows.sort(dim=1, stable=True)[1]
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    order = scores.sort(dim=1, descending=True, stable=True)[1][:, :k]
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    return scores, rows.masked_fill(scores == -torch.inf, -1)


def all_scores(query: Tensor, index: Tensor) -> Tensor:
    """[B, N], each query and each row alone, one std::fma after another."""
    rows = [
        torch.cat([search(q[None], x[None], 1, isa="scalar")[0] for x in index], 1) for q in query
    ]
    return torch.cat(rows)


# --------------------------------------------------------------------------------------- the result


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 40))
    n_queries, k = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query = torch.randn(n_queries, dim, generator=generator)
    index = torch.randn(n, dim, generator=generator)
    options: dict[str, Tensor] = {}
    barred = torch.zeros(n_queries, n, dtype=torch.bool)
    if data.draw(st.booleans()):
        options["removed"] = torch.rand(n, generator=generator) < 0.4
        barred |= options["removed"]
    if data.draw(st.booleans()):
        width = data.draw(st.integers(0, 6))
        exclude = torch.randint(-1, n, (n_queries, width), generator=generator)
        options["exclude"] = exclude
        barred |= (exclude[:, :, None] == torch.arange(n)).any(1)
    found = search(
        query,
        index,
        k,
        isa=data.draw(st.sampled_from(ISAS)),
        threads=data.draw(st.integers(1, 3)),
        **options,
    )
    exact = (query.double() @ index.double().T).masked_fill(barred, -torch.inf)
    expected = by_score(exact, torch.arange(n).expand(n_queries, -1), k)
    assert torch.equal(found[1], expected[1])
    # gamma_D |q| |x| in float32, for all D roundings of a sum in order
    norms = query.double().abs() @ index.double().abs().T
    bound = (dim * 2.0**-24 / (1 - dim * 2.0**-24) * norms).max()
    there = found[1] >= 0
    error = (found[0].double() - expected[0])[there].abs()
    assert error.numel() == 0 or error.max() <= bound
    assert found[0][~there].eq(-torch.inf).all()


@each_isa
@pytest.mark.parametrize("dim", [1, 15, 16, 37, 64])
def test_bits_do_not_depend_on_company(isa: str, dim: int) -> None:
    """Whatever else is searched, on whatever: a score is one std::fma after another."""
    query, index = torch.randn(101, dim), torch.randn(75, dim)
    few = 3
    expected = by_score(all_scores(query[:few], index), torch.arange(75).expand(few, -1), 9)
    for n_queries in (few, 8, 9, 16, 17, 40, 101):
        for threads in (1, 2, 5):
            found = search(query[:n_queries], index, 9, isa=isa, threads=threads)
            assert same((found[0][:few], found[1][:few]), expected)


@each_isa
def test_shards_merge_to_the_whole(isa: str) -> None:
    query, index = torch.randn(5, 24), torch.randn(500, 24)
    index[400:450] = index[100:150]  # ties across shards
    whole = search(query, index, 12, isa=isa)
    parts = []
    for start, stop in ((0, 3), (3, 130), (130, 131), (131, 500)):
        scores, rows = search(query, index[start:stop], 12, isa=isa, threads=2)
        parts.append((scores, torch.where(rows < 0, -1, rows + start)))
    assert same(merge(parts), whole)
    assert same(merge(parts[::-1]), whole)


@each_isa
@pytest.mark.parametrize("dim", [267, 512])
def test_long_rows_from_memory_score_as_they_do_alone(isa: str, dim: int) -> None:
    """What no cache holds is read in an order of its own; one row alone is not."""
    n = (16 << 20) // (4 * dim) + 30  # and a last tile that is not full
    query, storage = torch.randn(8, dim), torch.randn(n, dim + 5)
    index = storage.numpy()[:, :dim]
    best = [3, n - 29, n - 1]
    index[best] *= 4.0
    for n_queries in (1, 2, 3, 8):
        found = search(query[:n_queries], index, 6, isa=isa, threads=2)
        for b, rows in enumerate(found[1].tolist()):
            for i, row in enumerate(rows):
                alone = search(query[b : b + 1], index[row : row + 1], 1, isa=isa)
                assert torch.equal(alone[0][0], found[0][b, i : i + 1])
        expected = torch.from_numpy(query[:n_queries].numpy() @ index.T).topk(6)[1]
        assert torch.equal(found[1], expected)
    index[n - 1, dim - 1] = torch.nan
    with pytest.raises(ValueError, match=f"index_emb: .* NaN or infinity in row {n - 1}$"):
        search(query[:1], index, 6, isa=isa)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.data())
def test_merge(data: st.DataObject) -> None:
    shape = [
        data.draw(st.integers(0, 5)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 6)),
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(-2, 3, shape, generator=generator).float()
    rows = torch.randint(0, 2**40, shape, generator=generator)
    missing = torch.rand(shape, generator=generator) < 0.3
    scores, rows = scores.masked_fill(missing, -torch.inf), rows.masked_fill(missing, -1)
    found = torch.full(shape[1:], torch.nan), torch.full(shape[1:], -7)
    _C.merge_topk(scores.numpy(), rows.numpy(), found[0].numpy(), found[1].numpy())
    line = shape[0] * shape[2]
    flat = [x.transpose(0, 1).reshape(shape[1], line) for x in (scores, rows)]
    assert same(found, by_score(flat[0], flat[1], shape[2]))


# ------------------------------------------------------------------------------------- candidates


@each_isa
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "shuffled"])
@pytest.mark.parametrize("k", [1, 40])
def test_any_order_of_scores(isa: str, order: str, k: int) -> None:
    """Ascending: every row is a candidate. Equal: none is after the first k."""
    n = 3000
    values = {
        "ascending": torch.arange(n),
        "descending": torch.arange(n).flip(0),
        "equal": torch.zeros(n),
        "shuffled": torch.randperm(n),
    }[order]
    index, query = values[:, None].float() + 1, torch.tensor([[1.0], [-2.0], [0.0]])
    for threads in (1, 3):
        found = search(query, index, k, isa=isa, threads=threads)
        assert same(found, reference.mips_topk(query, index, k))


@each_isa
def test_more_queries_than_one_pass_takes(isa: str) -> None:
    query, index = torch.randint(-3, 4, (2100, 3)).float(), torch.randint(-3, 4, (40, 3)).float()
    exclude = torch.randint(-1, 40, (2100, 2))
    found = search(query, index, 7, isa=isa, threads=2, exclude=exclude)
    assert same(found, reference.mips_topk(query, index, 7, exclude))


@each_isa
def test_almost_all_removed(isa: str) -> None:
    query, index = torch.randn(3, 5), torch.randn(4000, 5)
    kept = torch.tensor([3, 1999, 3999])
    removed = torch.ones(4000, dtype=torch.bool)
    removed[kept] = False
    scores, rows = search(query, index, 4, isa=isa, threads=2, removed=removed)
    assert torch.equal(rows[:, :3].sort(1)[0], kept.expand(3, -1))
    assert rows[:, 3].eq(-1).all() and scores[:, 3].eq(-torch.inf).all()


# --------------------------------------------------------------------------------------- storage


def stored(index: Tensor, storage: str) -> tuple[np.ndarray, dict[str, Tensor], Tensor]:
    """The matrix as it is stored, what else the search takes, and the float32 it stands for."""
    if storage == "float16":
        return index.half().numpy(), {}, index.half().float()
    if storage == "bfloat16":
        half = index.bfloat16()
        return half.view(torch.uint16).numpy(), {}, half.float()
    low, high = index.amin(0), index.amax(0)
    scale, offset = ((high - low) / 254).clamp(min=1e-6), (high + low) / 2
    codes = ((index - offset) / scale).round().clamp(-127, 127).to(torch.int8)
    # exact in float64, so rounded once, as by std::fma
    wide = (codes.double() * scale.double() + offset.double()).float()
    return codes.numpy(), {"scale": scale, "offset": offset}, wide


each_storage = pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])


@each_isa
@each_storage
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 83, 200])
def test_storage_is_searched_as_the_float32_it_stands_for(isa: str, storage: str, dim: int) -> None:
    index, query = torch.randn(333, dim), torch.randn(70, dim)
    matrix, options, wide = stored(index, storage)
    for n_queries in (1, 2, 3, 5, 8, 9, 17, 70):
        found = search(query[:n_queries], matrix, 9, isa=isa, threads=2, **options)
        assert same(found, search(query[:n_queries], wide, 9, isa="scalar"))
    padded = np.full((334, dim + 3), 1, dtype=matrix.dtype)
    padded[:333, 1 : 1 + dim] = matrix
    found = search(query[:3], padded[:333, 1 : 1 + dim], 9, isa=isa, **options)
    assert same(found, search(query[:3], wide, 9, isa="scalar"))


def widened(matrix: np.ndarray, isa: str, **options: Tensor) -> Tensor:
    out = torch.full(matrix.shape, torch.nan)
    options = {name: x.numpy() for name, x in options.items()}
    _C.widen(matrix, out.numpy(), isa=isa, threads=2, **options)
    return out


@each_isa
def test_widen_every_half(isa: str) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(32, 2048)
    for dtype, matrix in (
        (torch.float16, bits.view(torch.float16).numpy()),
        (torch.bfloat16, bits.numpy()),
    ):
        expected = bits.view(dtype).float()
        torch.testing.assert_close(widened(matrix, isa), expected, rtol=0, atol=0, equal_nan=True)


@each_isa
def test_widen_every_code(isa: str) -> None:
    codes = torch.arange(-128, 128).to(torch.int8)[:, None].expand(-1, 37).contiguous()
    scale, offset = torch.rand(37), torch.randn(37)
    expected = (codes.double() * scale.double() + offset.double()).float()
    assert torch.equal(widened(codes.numpy(), isa, scale=scale, offset=offset), expected)


@each_isa
@each_storage
def test_storage_that_is_not_finite(isa: str, storage: str) -> None:
    index, query = torch.randn(100, 20), torch.randn(9, 20)
    matrix, options, _ = stored(index, storage)
    if storage == "int8":
        options["offset"][3] = torch.nan
        message = "offset: expected finite values, got NaN or infinity"
    else:
        matrix[77, 19] = np.inf if storage == "float16" else 0x7F80
        message = "index_emb: expected finite values, got NaN or infinity in row 77$"
    for n_queries in (1, 4, 9):
        with pytest.raises(ValueError, match=message):
            search(query[:n_queries], matrix, 3, isa=isa, **options)


def test_storage_and_its_scale_belong_together() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="scale and offset: expected both with an index_emb of"):
        search(torch.ones(1, 2), np.ones((3, 2), np.int8), 1, scale=one)
    with pytest.raises(ValueError, match="scale and offset: expected none without an index_emb"):
        search(torch.ones(1, 2), torch.ones(3, 2), 1, scale=one, offset=one)
    with pytest.raises(ValueError, match=r"offset: expected float32 \[2\], got format 'f' \[3\]"):
        search(torch.ones(1, 2), np.ones((3, 2), np.int8), 1, scale=one, offset=torch.ones(3))


# ---------------------------------------------------------------------------------------- memory


@each_isa
def test_reads_the_matrix_where_it_lies(isa: str, tmp_path: Path) -> None:
    """A read-only map, rows with a pitch, an address that only a float divides."""
    query, index = torch.randn(4, 30), torch.randn(200, 30)
    expected = search(query, index, 8, isa=isa)
    wide = np.full((201, 37), np.nan, dtype=np.float32)
    wide[:200, 3:33] = index.numpy()
    assert same(search(query, wide[:200, 3:33], 8, isa=isa), expected)
    (tmp_path / "odd").write_bytes(b"1234" + index.numpy().tobytes())
    mapped = np.memmap(tmp_path / "odd", np.float32, "r", offset=4, shape=(200, 30))
    assert same(search(query, mapped, 8, isa=isa), expected)


# ------------------------------------------------------------------------------------ not finite


@each_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("row", [0, 13, 1500, 3998])
def test_names_the_first_row_that_is_not_finite(isa: str, bad: float, row: int) -> None:
    query, index = torch.randn(20, 18), torch.randn(3999, 18)
    one = query[:1]
    index[row, 17] = bad
    index[row + 1 :: 7, 3] = bad
    removed = torch.ones(3999, dtype=torch.bool)
    for threads in (1, 3):
        for options in ({}, {"removed": removed}):
            with pytest.raises(ValueError, match=f"index_emb: .* NaN or infinity in row {row}$"):
                search(query, index, 2, isa=isa, threads=threads, **options)
            with pytest.raises(ValueError, match=f"index_emb: .* NaN or infinity in row {row}$"):
                search(one, index, 2, isa=isa, threads=threads, **options)
    query[11, 0] = bad
    with pytest.raises(ValueError, match="query_emb: .* NaN or infinity in row 11$"):
        search(query, index, 2, isa=isa)


@each_isa
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_names_the_first_row_that_overflows(isa: str, sign: float) -> None:
    query, index = torch.ones(90, 2), torch.ones(300, 2)
    query[77] = 1e30
    index[130] = index[250] = sign * 1e30
    message = "index_emb: .* within float32 range, got an overflow in row 130$"
    for threads in (1, 3):
        with pytest.raises(ValueError, match=message):
            search(query, index, 2, isa=isa, threads=threads)


def test_the_largest_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    scores, rows = search(torch.ones(1, 1), torch.tensor([[-largest], [largest]]), 3)
    assert scores.tolist() == [[largest, -largest, -torch.inf]] and rows.tolist() == [[1, 0, -1]]


# --------------------------------------------------------------------------------------- threads


def _in_child(query: Tensor, index: Tensor, expected: Found, answer: object) -> None:
    answer.put(same(search(query, index, 5, threads=3), expected))


def test_same_bits_after_a_fork() -> None:
    query, index = torch.randn(9, 64), torch.randn(5000, 64)
    expected = search(query, index, 5, threads=3)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_in_child, args=(query, index, expected, answer))
    child.start()
    try:
        assert answer.get(timeout=60)
    finally:
        child.join(10)
    assert child.exitcode == 0
    assert same(search(query, index, 5, threads=3), expected)


def test_searches_from_several_threads() -> None:
    query, index = torch.randn(9, 64), torch.randn(5000, 64)
    expected = search(query, index, 5)
    good = []

    def work() -> None:
        good.append(all(same(search(query, index, 5, threads=2), expected) for _ in range(20)))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert good == [True] * 4


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_emb": torch.zeros(3)}, r"query_emb: expected float32 \[n, n\], .*'f' \[3\]"),
        ({"index_emb": torch.zeros(5, 4)}, r"index_emb: expected float32 \[n, 3\], .* \[5, 4\]"),
        ({"index_emb": torch.zeros(5, 3).double()}, "index_emb: expected float32 .* format 'd'"),
        ({"index_emb": torch.zeros(3, 5).t()}, "index_emb: expected lines without gaps"),
        ({"rows": torch.zeros(2, 5).long()}, r"rows: expected int64 \[2, 4\], .* \[2, 5\]"),
        ({"scores": torch.zeros(2, 0)}, "scores: expected at least one column, got none"),
        ({"removed": torch.zeros(4).bool()}, r"removed: expected bool \[5\], got .* \[4\]"),
        ({"removed": torch.zeros(5).byte()}, r"removed: expected bool \[5\], got format 'B'"),
        ({"exclude": torch.zeros(1, 2).long()}, r"exclude: expected int64 \[2, n\], .* \[1, 2\]"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"isa": "sse9"}, "isa: expected one of .*scalar .*, got 'sse9'"),
    ],
)
def test_rejects_bad_buffers(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {
        "query_emb": torch.zeros(2, 3),
        "index_emb": torch.zeros(5, 3),
        "scores": torch.zeros(2, 4),
        "rows": torch.zeros(2, 4).long(),
        **change,
    }
    if options["scores"].shape[1] == 0:
        options["rows"] = torch.zeros(2, 0).long()
    options = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        _C.mips_topk(**options)


def test_rejects_an_address_between_floats() -> None:
    memory = memoryview(bytearray(61))[1:]
    with pytest.raises(ValueError, match="index_emb: expected an address that is a multiple of 4"):
        search(torch.zeros(2, 3), memory.cast("f", (5, 3)), 1)
    as_numpy = np.frombuffer(memory, dtype=np.float32).reshape(5, 3)
    with pytest.raises(ValueError, match="index_emb: expected float32 .* got format '=f'"):
        search(torch.zeros(2, 3), as_numpy, 1)


def test_merge_rejects_nan_and_other_shapes() -> None:
    scores, rows = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).long()
    out = torch.zeros(3, 4).numpy(), torch.zeros(3, 4).long().numpy()
    scores[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"scores: expected numbers, got NaN at \[1, 2, 3\]"):
        _C.merge_topk(scores.numpy(), rows.numpy(), *out)
    with pytest.raises(ValueError, match=r"part_rows: expected int64 \[2, 3, 4\], .* \[1, 3, 4\]"):
        _C.merge_topk(scores.numpy(), rows[:1].numpy(), *out)
