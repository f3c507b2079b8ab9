"""The C++ passes over a chunk's logits: functions, statistics, gradients, threads, bad input.

Through `ChunkLogits`, so that the torch backend in float64 is the oracle and in float32 the measure
of what error is allowed. test_marginal_nll.py runs whole losses on both backends.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastrag.ops import backends, workspace
from fastrag.ops.chunks import ChunkLogits, LinearHead, TorchChunkLogits
from fastrag.testing import assert_close

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")

from fastrag.ops import cpp  # noqa: E402
from fastrag.ops.cpp import CppChunkLogits  # noqa: E402

isas = pytest.mark.parametrize("isa", _C.instruction_sets())


@pytest.fixture(autouse=True)
def _fresh_workspace() -> Iterator[None]:
    """Each test's buffer is new, hence poisoned, and of no size that another test left."""
    workspace.release()
    yield
    workspace.release()


@pytest.fixture
def _isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)


with_each_isa = [isas, pytest.mark.usefixtures("_isa")]


def on_each_isa(test: object) -> object:
    for mark in with_each_isa:
        test = mark(test)
    return test


# -------------------------------------------------------------------------------------- functions

# What the comments in csrc/loss/row_pass.inc.h promise, in units in the last place.
BOUNDS = {"exp": 1.5, "log": 1.5, "tanh": 3.0, "sech2": 6.0}
RANGES = {"exp": (-87.3, 20.0), "log": (1.0, 300.0), "tanh": (-9.0, 9.0), "sech2": (-20.0, 20.0)}
TRUE = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sech2": lambda x: torch.cosh(x).reciprocal().square(),
}


def apply(name: str, x: Tensor, isa: str) -> Tensor:
    y = torch.empty_like(x)
    _C.apply(name, x.numpy(), y.numpy(), isa=isa)
    return y


@isas
@pytest.mark.parametrize("name", BOUNDS)
def test_function(name: str, isa: str) -> None:
    low, high = RANGES[name]
    wide = torch.empty(200_000).uniform_(low, high)
    # where relative accuracy is hardest: around the zero of the function, or of its argument
    near = (1.0 if name == "log" else 0.0) + torch.logspace(-30, -1, 5000)
    x = torch.cat([wide, near])
    true = TRUE[name](x.double())
    _, exponent = torch.frexp(true)
    ulp = torch.ldexp(torch.ones_like(true), exponent - 24)
    error = (apply(name, x, isa).double() - true).abs() / ulp
    assert error.max() <= BOUNDS[name], f"{error.max():.2f} ulp at {x[error.argmax()]}"


@isas
def test_function_limits(isa: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([-inf, -1e4, -88.0, 0.0, nan])
    torch.testing.assert_close(
        apply("exp", x, isa), torch.tensor([0, 0, 0, 1, nan]), rtol=0, atol=0, equal_nan=True
    )
    x = torch.tensor([-inf, -0.0, 0.0, inf, 1e-40, nan])
    found = apply("tanh", x, isa)
    torch.testing.assert_close(found, x.tanh(), rtol=0, atol=0, equal_nan=True)
    assert found[1].signbit()
    assert apply("sech2", x, isa)[[0, 3]].eq(0).all() and apply("sech2", x, isa)[5].isnan()
    assert apply("log", torch.tensor([1.0, nan]), isa)[0] == 0
    assert apply("log", torch.tensor([nan]), isa).isnan().all()


# ----------------------------------------------------------------------------------------- passes


@dataclass
class Rows:
    """Inputs of one chunk, G * K rows; gold and everything else as the loss would pass it."""

    x: Tensor  # [n, H]
    gold: Tensor  # [n]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    log_prior: Tensor  # [G, K]
    row_weight: Tensor  # [n]

    def to(self, dtype: torch.dtype) -> Rows:
        tensors = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **tensors)

    def open(self, kind: type[ChunkLogits]) -> ChunkLogits:
        head = LinearHead(self.weight, self.bias, self.softcap, self.logit_scale, self.x.dtype)
        return kind(head, self.x, self.gold)

    def by_vocab_slices(self, kind: type[ChunkLogits], log_z: Tensor, smoothing: float) -> Tensor:
        """The gradient from slices of the vocabulary."""
        head, parts = self.open(kind).head, []
        for part in head.vocab_slices(70):
            gold = torch.where(part.start <= self.gold, self.gold - part.start, -1)
            logits = kind(
                head.vocab_slice(part), self.x, gold.masked_fill(self.gold >= part.stop, -1)
            )
            logits.resume(log_z)
            parts.append(logits.gradient(self.row_weight, smoothing).clone())
        return torch.cat(parts, 1)

    def run(self, kind: type[ChunkLogits]) -> dict[str, Tensor]:
        """All that a chunk can be asked, the buffers copied."""
        plain, smooth, mixed = (self.open(kind) for _ in range(3))
        stats = plain.statistics(with_mean=True)
        found = {"logp": stats.logp, "mean": stats.mean_logp}
        found["gradient"] = plain.gradient(self.row_weight).clone()
        smooth.statistics()
        found["smoothed gradient"] = smooth.gradient(self.row_weight, 0.1).clone()
        found["gradient of slices"] = self.by_vocab_slices(kind, stats.log_z, 0.1)
        stats, found["mean mixture"], found["mean share"] = mixed.mixture_statistics(self.log_prior)
        target = (self.log_prior + stats.logp.view_as(self.log_prior)).softmax(1)
        upstream = self.row_weight.view_as(self.log_prior)[:, :1]
        spread = (upstream * 0.1 / len(self.weight)).squeeze(1)
        parts = (self.log_prior, 0.9 * upstream * target, upstream * target, spread)
        found["mixture gradient"] = mixed.mixture_gradient(*parts).clone()
        return found


def rows(
    n_positions: int = 13, n_passages: int = 5, width: int = 16, vocab: int = 131, head: str = ""
) -> Rows:
    """Operands are multiples of 1 / 16: products are exact in any order of summation."""

    def draw(*shape: int) -> Tensor:
        return (16.0 * torch.randn(*shape, dtype=torch.float64)).round() / 16.0

    n = n_positions * n_passages
    softcap = {"softcap": 2.0, "saturated": 0.3}.get(head)
    return Rows(
        x=draw(n, width),
        gold=torch.randint(vocab, (n_positions,)).repeat_interleave(n_passages),
        weight=draw(vocab, width),
        bias=torch.randn(vocab, dtype=torch.float64) if head else None,
        softcap=softcap,
        logit_scale=0.7 if head else 1.0,
        log_prior=torch.randn(n_positions, n_passages, dtype=torch.float64).log_softmax(1),
        row_weight=torch.rand(n, dtype=torch.float64),
    )


def compare(problem: Rows) -> None:
    narrow = problem.to(torch.float32)
    true = narrow.to(torch.float64).run(TorchChunkLogits)
    plain, found = narrow.run(TorchChunkLogits), narrow.run(CppChunkLogits)
    # A log-probability near 0 is a difference of logits, of which rounding is a share.
    terms = {"logp": 1.0, "mean": 1.0, "mean mixture": 1.0}
    if len(problem.weight) == 1:  # every term of the gradient cancels
        terms["mixture gradient"] = 1.0
    for name, value in found.items():
        assert_close(value, plain[name], true[name], name=name, scale=terms.get(name, 0.0))


SHAPES = {
    "odd": (13, 5, 16, 131),
    "one row": (1, 1, 4, 7),
    "one word": (3, 2, 4, 1),  # p = 1
    "fewer token ids than a block, fewer rows than a vector": (1, 3, 4, 5),
    "whole vectors": (16, 8, 16, 256),
    "vectors and a rest": (29, 3, 8, 300),
    "many passages": (3, 50, 8, 129),
    "one passage": (70, 1, 8, 128),
}


@on_each_isa
@pytest.mark.parametrize("head", ["", "bias", "softcap", "saturated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_passes(isa: str, shape: tuple[int, int, int, int], head: str) -> None:
    compare(rows(*shape, head))


KINDS = ["up", "down", "certain", "uniform", "far apart", "missing", "impossible", "weightless"]


@on_each_isa
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial(isa: str, kind: str) -> None:
    problem = rows(vocab=300, head="bias")
    assert problem.bias is not None
    if kind in ("up", "down"):  # logits around 1e4: centred before anything is added
        problem.bias += 1e4 if kind == "up" else -1e4
    elif kind == "certain":
        problem.weight.zero_()
        problem.gold.zero_()
        problem.bias[0] += 30.0
    elif kind == "uniform":
        problem.x.zero_(), problem.bias.zero_()
    elif kind == "far apart":  # exp(-max) underflows for most of the vocabulary, and whole blocks
        problem.bias = torch.linspace(-3000, 3000, len(problem.bias), dtype=torch.float64)
    elif kind == "missing":
        problem.log_prior[:, 1] = -torch.inf
        problem.log_prior[0, 1:] = -torch.inf
    elif kind == "impossible":  # a block of token ids, and one id of another, with probability 0
        problem.bias[128:256] = -torch.inf
        problem.bias[7] = -torch.inf
        problem.gold.fill_(3)
    else:
        problem.row_weight[::2] = 0.0
    narrow = problem.to(torch.float32)
    if kind != "impossible":
        return compare(problem)
    plain, found = narrow.run(TorchChunkLogits), narrow.run(CppChunkLogits)
    for name in ("logp", "mean", "gradient", "smoothed gradient", "mean mixture"):
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


@on_each_isa
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_bad_rows_stay_alone(isa: str, value: float) -> None:
    """A row with a NaN or an infinite logit is NaN, its neighbours are what they were."""
    problem = rows().to(torch.float32)
    clean = problem.run(CppChunkLogits)
    problem.x[7, 3] = value  # +inf: logits of both infinities
    found, plain = problem.run(CppChunkLogits), problem.run(TorchChunkLogits)
    for name in ("logp", "mean", "gradient", "smoothed gradient", "gradient of slices"):
        assert found[name][7].isnan().all() and plain[name][7].isnan().all()
        rest = torch.arange(len(problem.x)) != 7
        assert torch.equal(found[name][rest], clean[name][rest])
    for name, each in (("mean mixture", 1), ("mean share", 1), ("mixture gradient", 5)):
        bad = slice(each, 2 * each)  # the position of row 7
        assert found[name][bad].isnan().any() and plain[name][bad].isnan().any()
        assert torch.equal(found[name][2 * each :], clean[name][2 * each :])


@isas
def test_nan_weight(isa: str) -> None:
    """How a loss poisons the gradient of an example whose label is out of range."""
    problem = rows().to(torch.float32)
    problem.row_weight[3] = torch.nan
    found = problem.run(CppChunkLogits)["gradient"]
    assert found[3].isnan().all() and found[4:].isfinite().all()


# ---------------------------------------------------------------------------------------- threads


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


def run_with(n_threads: int, problem: Rows) -> dict[str, Tensor]:
    """The products on one thread, for theirs may round otherwise on more; the passes on n."""
    before, passes = torch.get_num_threads(), _C.RowPass

    def threaded(*args: object, **options: object) -> object:
        return passes(*args, **{**options, "threads": n_threads})

    torch.set_num_threads(1)
    try:
        cpp._C = type("Module", (), {"RowPass": staticmethod(threaded)})
        return problem.run(CppChunkLogits)
    finally:
        cpp._C = _C
        torch.set_num_threads(before)


@on_each_isa
def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    problem = rows(29, 3, 8, 3001, "softcap").to(torch.float32)
    alone = run_with(1, problem)
    for n_threads in (2, 3, 16):
        assert same_bits(run_with(n_threads, problem), alone)


def _in_child(problem: Rows, expected: dict[str, Tensor], answer: object) -> None:
    torch.set_num_threads(1)
    answer.put(same_bits(run_with(3, problem), expected))


def test_same_bits_after_a_fork() -> None:
    """The child of a process whose pool runs has none of its threads, and starts its own."""
    problem = rows(29, 3, 8, 3001).to(torch.float32)
    expected = run_with(3, problem)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_in_child, args=(problem, expected, answer))
    child.start()
    try:
        assert answer.get(timeout=60)
    finally:
        child.join(10)
    assert child.exitcode == 0
    assert same_bits(run_with(3, problem), expected)


def test_two_callers_at_once() -> None:
    problem = rows(29, 3, 8, 3001).to(torch.float32)
    expected = problem.run(CppChunkLogits)
    good = []

    def work() -> None:
        good.append(all(same_bits(problem.run(CppChunkLogits), expected) for _ in range(10)))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert good == [True] * 3


# -------------------------------------------------------------------------------------- workspace


def test_workspace_is_kept_and_lent_once() -> None:
    first = workspace.take(1000)
    assert first.numel() >= 1000
    other = workspace.take(1000)
    assert other.data_ptr() != first.data_ptr()
    workspace.give_back(first)
    again = workspace.take(900)
    assert again is first
    workspace.give_back(again)
    workspace.release()
    assert workspace.take(900) is not first


def test_workspace_keeps_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workspace.WORKSPACE_VARIABLE, "4000")
    assert workspace.take(700).nbytes <= 4000  # not the next power of two
    large = workspace.take(2000)
    workspace.give_back(large)
    assert workspace.take(10) is not large


def test_a_chunk_gives_its_buffer_back() -> None:
    problem = rows().to(torch.float32)
    chunk = problem.open(CppChunkLogits)
    buffer = chunk._buffer
    second = problem.open(CppChunkLogits)
    assert second._buffer is not buffer
    del second, chunk
    assert workspace.take(100) is buffer


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z0": torch.zeros(5)}, r"z0: expected float32 \[n, n\], got format 'f' \[5\]"),
        ({"z0": torch.zeros(5, 3).double()}, r"z0: expected float32 .* got format 'd' \[5, 3\]"),
        ({"z0": torch.zeros(3, 5).t()}, r"z0: expected lines without gaps .* strides of \[4, 20\]"),
        ({"gold": torch.zeros(4).long()}, r"gold: expected int64 \[3\], got format 'l' \[4\]"),
        ({"gold": torch.tensor([0, 5, 0])}, r"gold: .* in \[0, 5\), or -1 .*, got 5 at \[1\]"),
        ({"bias": torch.zeros(3)}, r"bias: expected float32 \[5\], got format 'f' \[3\]"),
        ({"softcap": -1.0}, "softcap: expected 0 .none. or more, got -1"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"isa": "sse9"}, "isa: expected one of .*scalar .*, got 'sse9'"),
    ],
)
def test_rejects_bad_buffers(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"z0": torch.zeros(5, 3), "gold": torch.zeros(3).long(), **change}
    options = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        _C.RowPass(options.pop("z0"), options.pop("gold"), **options)


def test_rejects_bad_parts() -> None:
    found = _C.RowPass(torch.zeros(5, 6).numpy(), torch.zeros(6).long().numpy())
    log_z, logp, one = (torch.zeros(*shape).numpy() for shape in ((2, 6), (6,), (2, 2)))
    with pytest.raises(ValueError, match=r"logp: expected float32 \[6\], got format 'f' \[2, 6\]"):
        found.statistics(log_z, log_z)
    with pytest.raises(ValueError, match=r"log_z: expected float32 \[2, 6\], got format 'f' \[6\]"):
        found.statistics(logp, logp)
    with pytest.raises(ValueError, match="expected at least the 5 token ids of z0, got 4"):
        found.gradient(log_z, logp, 0.1, 4)
    with pytest.raises(ValueError, match=r"log_prior: .* of the 6 rows of z0, got 2 \* 2"):
        found.mixture_statistics(log_z, one, one, one)
    with pytest.raises(ValueError, match="name: expected exp, log, tanh or sech2, got 'sin'"):
        _C.apply("sin", torch.zeros(1).numpy(), torch.zeros(1).numpy())


def test_a_pitch_between_lines() -> None:
    wide = torch.randn(9, 12)
    logp, log_z = torch.empty(7), torch.empty(2, 7)
    gold = torch.randint(9, (7,))
    _C.RowPass(wide[:, :7].numpy(), gold.numpy()).statistics(logp.numpy(), log_z.numpy())
    expected = wide[:, :7].t().log_softmax(1).gather(1, gold[:, None]).squeeze(1)
    torch.testing.assert_close(logp, expected)


# ---------------------------------------------------------------------------------------- backend


def test_backend_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrag.functional as F

    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpp")
    hidden, weight = torch.randn(1, 2, 3, 4), torch.randn(5, 4)
    labels, scores = torch.zeros(1, 3).long(), torch.zeros(1, 2)
    assert F.rag_token_nll(hidden, weight, labels, scores).isfinite()
    message = "FASTRAG_BACKEND=cpp cannot run marginal_nll: the C.. kernels compute in float32"
    with pytest.raises(RuntimeError, match=message):
        F.rag_token_nll(hidden.double(), weight.double(), labels, scores.double())
    monkeypatch.delenv(backends.BACKEND_VARIABLE)
    assert backends.choose("token_logp", torch.device("cpu"), torch.float32) == "cpp"
    assert backends.choose("token_logp", torch.device("cpu"), torch.float64) == "torch"
