"""The entry of the search: its check finds what is wrong, and its processes share one matrix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import shared
from benchmarks.harness.process import Process
from benchmarks.harness.registry import Goal, directly, error_of
from benchmarks.ops import OPS, corpora, mips, search_peers

OP = OPS["mips"]
CPU = torch.device("cpu")
SHAPE = (200, 24, 3, 5)
Answer = tuple[Tensor, Tensor]
Change = Callable[[Tensor, Tensor], Answer]


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    shared.hold({})


# ------------------------------------------------------------------------------------------ check


def rows_changed(change: Callable[[Tensor], None]) -> Change:
    def changed(scores: Tensor, rows: Tensor) -> Answer:
        rows = rows.clone()
        change(rows)
        return scores, rows

    return changed


@rows_changed
def twin_first(rows: Tensor) -> None:
    """Every row has its like half the matrix later, so the two best rows have equal scores."""
    rows[:, 0] = (rows[:, 0] + SHAPE[0] // 2) % SHAPE[0]
    rows[:, 1] = (rows[:, 0] + SHAPE[0] // 2) % SHAPE[0]


@rows_changed
def repeated(rows: Tensor) -> None:
    rows[:, 1] = rows[:, 0]


@rows_changed
def another(rows: Tensor) -> None:
    rows[0, -1] = next(n for n in range(SHAPE[0]) if n not in rows[0])


@pytest.mark.parametrize(
    ("change", "provider", "said"),
    [
        (twin_first, "torch", "rows: ties are not in the order of the rows"),
        (twin_first, "mm-xq", ""),  # a peer may order ties as it likes
        (lambda scores, rows: (scores.bfloat16().float(), rows), "mm-xq", "scores: "),
        (repeated, "mm-xq", "rows: a query has a row twice"),
        (another, "mm-xq", "rows: not those that have the scores"),
        (
            lambda scores, rows: (scores[:, :-1], rows[:, :-1]),
            "mm-xq",
            "scores [5, 2], rows [5, 2], expected [5, 3]",
        ),
    ],
    ids=["ties", "ties of a peer", "rounded", "repeated", "another", "narrow"],
)
def test_the_check_finds_what_is_wrong(change: Change, provider: str, said: str) -> None:
    right = OP.provider(provider)
    wrong = replace(right, prepare=directly(lambda mode, p: change(*right.prepare(mode, p)())))
    found = error_of(OP, wrong, "float32", SHAPE, "float32", CPU)
    assert found.startswith(said) and bool(found) == bool(said)


def test_a_search_of_another_storage_is_wrong() -> None:
    """int8 codes of the checked problem stand for vectors that float32 does not have."""
    ours = OP.provider("torch")
    wrong = replace(ours, prepare=lambda mode, p: ours.prepare("float32", p))
    assert error_of(OP, wrong, "int8", SHAPE, "float32", CPU).startswith("scores: ")


@pytest.mark.parametrize("mode", OP.modes)
def test_what_is_shared_is_what_a_process_would_make(mode: str) -> None:
    search, corpus = corpora.split(mode)
    problem = OP.make(SHAPE, torch.float32, CPU).on(corpus)
    made, factors = problem.stored(search)
    assert OP.share is not None
    shared.hold(OP.share(mode, SHAPE))
    problem_here = OP.make(SHAPE, torch.float32, CPU).on(corpus)
    assert torch.equal(problem_here.query_emb, problem.query_emb)
    mapped, others = problem_here.stored(search)
    assert made.data_ptr() != mapped.data_ptr() and torch.equal(made, mapped)
    assert factors.keys() == others.keys()
    assert all(torch.equal(factors[name], others[name]) for name in factors)


# ---------------------------------------------------------------------------------------- corpora


def test_the_spectrum_of_the_vectors_like_embeddings() -> None:
    """It is that of questions of SQuAD encoded by MiniLM, whose mean has the norm 0.30."""
    (vectors,) = corpora.blocks(corpora.EMBEDDINGS, 4000, 384, CPU)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4000))
    assert 0.25 < vectors.mean(0).norm() < 0.45
    variance = torch.linalg.eigvalsh(vectors.T.cov()).flip(0).cumsum(0)
    for part, share in ((8, 0.60), (4, 0.77), (2, 0.93)):
        assert variance[384 // part - 1] / variance[-1] == pytest.approx(share, abs=0.05)


def test_questions_lie_near_rows() -> None:
    rows = 3 * next(corpora.blocks(corpora.EMBEDDINGS, 4000, 384, CPU))
    questions = corpora.near(rows, 64)
    assert torch.allclose(questions.norm(dim=1), torch.tensor(3.0))
    best = (questions @ rows.T).max(dim=1).values / 9
    assert 0.55 < best.mean() < 0.75


def test_panorama_is_of_the_vectors_themselves() -> None:
    """The PCA of faiss subtracts the mean of the rows, which changes the order of products."""
    pytest.importorskip("faiss")
    (rows,) = corpora.blocks(corpora.EMBEDDINGS, 2000, 64, CPU)
    queries = corpora.near(rows, 5)
    expected = (queries @ rows.T).topk(10).indices
    for n_levels in search_peers.PANORAMA.values():
        assert torch.equal(search_peers.faiss_panorama(n_levels)(queries, rows, 10)()[1], expected)


def test_vectors_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    np.save(tmp_path / "mine.npy", vectors)
    monkeypatch.setenv(corpora.VARIABLE, "")
    assert corpora.use(tmp_path / "mine.npy") == (30, 8)
    problem = OP.make((20, 8, 3, 2), torch.float32, CPU).on("mine")
    assert torch.equal(problem.matrix.part("float32"), torch.from_numpy(vectors[:20]))
    assert OP.provider("torch").knows("float32/mine")
    np.save(tmp_path / "double.npy", vectors.astype(np.float64))
    for name, said in (("double", "expected float32 .*got float64"), ("gone", "No such file")):
        with pytest.raises(ValueError, match=said):
            corpora.use(tmp_path / f"{name}.npy")


# ----------------------------------------------------------------------------------------- shared

MAPS_AND_WRITES = """
from benchmarks.harness import shared
x = shared.find("x")
assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]], x
x[0, 0] = 5.0
"""


def test_another_process_maps_the_same_memory() -> None:
    def fill(out: Tensor) -> None:
        out.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    shared.hold({"x": shared.Spec((2, 2), torch.float32, fill)})
    with Process() as process:
        assert process.ask(shared.take, shared.handles()) == ("ok", None)
        assert process.ask(exec, MAPS_AND_WRITES) == ("ok", None)
    found = shared.find("x")
    assert found is not None and found[0, 0] == 5.0


def test_what_is_held_is_made_once_and_let_go() -> None:
    made: list[str] = []

    def spec(name: str) -> shared.Spec:
        return shared.Spec((3,), torch.int8, lambda out: made.append(name))

    shared.hold({"a": spec("a")})
    (descriptor,) = shared.descriptors()
    # it has no name: nothing is left behind, however this ends
    assert os.fstat(descriptor).st_nlink == 0
    shared.hold({"a": spec("a"), "b": spec("b")})
    assert made == ["a", "b"]
    shared.hold({"b": spec("b")})
    assert shared.find("a") is None and shared.find("b") is not None
    shared.hold({})
    assert shared.descriptors() == [] and shared.handles() == {}
    with pytest.raises(OSError):
        os.fstat(descriptor)


# ---------------------------------------------------------------------------- ceilings, and goals


def test_flops_and_bytes() -> None:
    assert OP.flops("int8", (100, 8, 3, 2)) == 2 * 100 * 8 * 2
    answers = 2 * (8 * 4 + 3 * 12)
    for mode, bytes_a_number in (("float32", 4), ("float16", 2), ("int8", 1), (mips.CODED, 1)):
        assert OP.bytes(mode, (100, 8, 3, 2), 4) == 100 * 8 * bytes_a_number + answers


@pytest.mark.parametrize("native", [True, False], ids=["cpp", "torch"])
@pytest.mark.parametrize("mode", mips.SEARCHES)
def test_the_read_is_of_every_byte(
    monkeypatch: pytest.MonkeyPatch, mode: str, native: bool
) -> None:
    problem = OP.make((7, 5, 1, 1), torch.float32, CPU)
    data, _ = problem.stored(mode)
    if native:
        pytest.importorskip("fastrag._C", reason="the extension is not built")
        (found,) = OP.provider("read").prepare(mode, problem)()
        assert found == np.bitwise_xor.reduce(data.flatten().view(torch.uint8).numpy())
        return
    monkeypatch.setattr(mips, "no_extension", lambda: "hidden")
    numbers = data.flatten().view(torch.uint8)
    whole = numbers[: len(numbers) // 4 * 4].view(torch.float32).sum()
    (found,) = OP.provider("read").prepare(mode, problem)()
    assert torch.equal(found, whole) or bool(found.isnan() and whole.isnan())


@pytest.mark.parametrize("n", [0, 1, 255, 256, 4096 + 77, (2 << 20) + 1000])
def test_the_loop_of_reads_folds_all(n: int) -> None:
    native = pytest.importorskip("fastrag._C", reason="the extension is not built")
    numbers = np.random.default_rng(n).integers(-128, 128, n, dtype=np.int8)
    expected = int(np.bitwise_xor.reduce(numbers.view(np.uint8))) if n else 0
    for isa in native.instruction_sets():
        assert native.read_loop(numbers, threads=2, isa=isa) == expected
    with pytest.raises(ValueError, match=r"bytes: expected int8 \[n\], got format 'f'"):
        native.read_loop(np.zeros(3, np.float32))


def test_the_ceiling_of_products_does_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("fastrag._C", reason="the extension is not built")
    asked: list[int] = []
    monkeypatch.setattr(native, "fma_loop", lambda n_fmas, **options: asked.append(n_fmas))
    OP.provider("fma").prepare("float32", OP.make((7, 5, 1, 3), torch.float32, CPU))()
    assert asked == [7 * 5 * 3]


def test_the_loop_of_products_refuses_what_it_cannot_do() -> None:
    native = pytest.importorskip("fastrag._C", reason="the extension is not built")
    for isa in native.instruction_sets():
        native.fma_loop(1, isa=isa)
    with pytest.raises(ValueError, match="n_fmas: expected at least 1, got 0"):
        native.fma_loop(0)
    with pytest.raises(ValueError, match="isa: expected one of .*scalar .*, got 'sse'"):
        native.fma_loop(1, isa="sse")


def goals(mode: str, n_queries: int) -> dict[str, float | None]:
    shape = (1000, 64, 10, n_queries)
    found: list[Goal] = [goal for goal in OP.goals if goal.where(mode, shape)]
    by_name: dict[str, Any] = {goal.against: goal.at_least for goal in found}
    assert len(by_name) == len(found)  # one against each
    return by_name


def test_the_goals_of_each_batch() -> None:
    assert goals("float32", 1) == {"best peer": 1.7, "read": 0.85}
    assert goals("float32", 4) == {"best peer": 1.35, "read": 0.85}
    assert goals("float32", 8) == {"best peer": 2.0}
    assert goals("float32", 256) == {"best peer": 1.02, "fma": 0.9}
    assert goals("bfloat16", 1) == goals("float16", 1) == {"cpp-float32": 1.8}
    assert goals(mips.LIKE_EMBEDDINGS, 4) == {"panorama-8": 4.0}
    assert goals("int8", 1) == {"cpp-float32": 3.0} and goals("int8", 2) == {}
    assert goals(mips.CODED, 64) == {"fma": 2.0} and goals(mips.CODED, 32) == {}


def test_a_gpu_sweeps_one_storage() -> None:
    assert [mode for mode in OP.modes if OP.sweep("cuda", mode)] == ["bfloat16"]
