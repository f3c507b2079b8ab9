"""Every entry of the benchmark registry is whole, and what is wrong is found before it is timed."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.harness import measure
from benchmarks.harness.process import Refusal
from benchmarks.harness.registry import (
    DEVICES,
    Op,
    Provider,
    directly,
    error_of,
    forced_backend,
    needs,
)
from benchmarks.harness.timing import Case, Timed
from benchmarks.ops import OPS
from fastrag.ops.backends import BACKEND_VARIABLE

CPU = torch.device("cpu")
MIB = 1 << 20

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def of_every_provider() -> list[Any]:
    return [
        pytest.param(
            op,
            mode,
            provider,
            id=f"{op.name}-{mode}-{provider.name}",
            marks=[pytest.mark.slow] if provider.compiles else [],
        )
        for op in OPS.values()
        for mode in op.modes
        for provider in op.providers
        if provider.kind != "ceiling" and mode in (provider.modes or op.modes)
    ]


@every_op
def test_an_entry_is_whole(op: Op) -> None:
    assert len(set(op.names())) == len(op.providers)
    assert op.provider(op.ceiling).kind == "ceiling"
    assert op.names("ours") and op.names("peer")
    assert {p.kind for p in op.providers} == {"ours", "peer", "ceiling"}
    assert {goal.against for goal in op.goals} <= {*op.names(), "best peer"}
    for provider in op.providers:
        assert set(provider.modes) <= set(op.modes)
    swept = [s for device in DEVICES for mode in op.modes for s in op.sweep(device, mode)]
    for shape in (*op.checked, op.small, *swept):
        assert len(shape) == len(op.dims)
    assert set(op.curve_providers) <= set(op.names())
    for name, shapes in op.curves.items():
        place = op.dims.index(name)
        others = {shape[:place] + shape[place + 1 :] for shape in shapes}
        # One line, or one for each setting of the others: three points at least, none twice.
        assert len(set(shapes)) == len(shapes) >= 3 * len(others), name
    for mode in op.modes:
        assert op.flops(mode, op.small) >= 0 and op.bytes(mode, op.small, 4) > 0


@pytest.mark.parametrize(("op", "mode", "provider"), of_every_provider())
def test_a_provider_agrees_with_the_oracle(op: Op, mode: str, provider: Provider) -> None:
    reason = provider.why_not("cpu", "float32", mode)
    if reason:
        pytest.skip(reason)
    assert error_of(op, provider, mode, op.checked[0], "float32", CPU) == ""


@every_op
def test_half_precision_is_held_to_plain_torch(op: Op) -> None:
    ours = op.provider("torch" if "torch" in op.names() else op.names("ours")[0])
    for mode in ours.modes or op.modes:
        assert error_of(op, ours, mode, op.checked[0], "bfloat16", CPU) == ""


@pytest.mark.parametrize("place", range(4), ids=OPS["marginal_loss"].outputs)
def test_a_wrong_output_is_named(place: int) -> None:
    op = OPS["marginal_loss"]
    right = op.provider("gather")

    def wrong(mode: str, problem: Any) -> tuple[torch.Tensor, ...]:
        found = list(right.prepare(mode, problem)())
        found[place] = 1.001 * found[place]
        return tuple(found)

    broken = replace(right, prepare=directly(wrong))
    message = error_of(op, broken, "sequence", op.checked[0], "float32", CPU)
    assert message.startswith(f"{op.outputs[place]}: ")


def test_flops_and_bytes_of_the_loss() -> None:
    op = OPS["marginal_loss"]
    # 2*3*5 rows: three products of 2 * 30 * 7 * 11; hidden, weight and their gradients once
    assert op.flops("token", (2, 3, 5, 7, 11)) == 3 * 2 * 30 * 7 * 11
    assert op.bytes("token", (2, 3, 5, 7, 11), 2) == 2 * 2 * (30 * 7 + 11 * 7)


@pytest.mark.parametrize("mode", OPS["doc_scores"].modes)
def test_the_copy_moves_the_least_bytes(mode: str) -> None:
    op, shape = OPS["doc_scores"], (3, 4, 50, 16)
    (made,) = op.provider("copy").prepare(mode, op.make(shape, torch.float32, CPU))()
    assert 2 * measure.nbytes((made,)) == op.bytes(mode, shape, 4)  # read and written


def test_the_backend_is_forced_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    with forced_backend("torch"):
        assert os.environ[BACKEND_VARIABLE] == "torch"
    assert BACKEND_VARIABLE not in os.environ


def test_a_users_backend_leaves_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    op = OPS["marginal_loss"]
    assert op.provider("torch").why_not("cpu", "float32", "token") == ""
    assert "FASTRAG_BACKEND=torch" in op.provider("cpp").why_not("cpu", "float32", "token")


def test_why_not_names_device_dtype_mode_and_package() -> None:
    op = OPS["marginal_loss"]
    assert op.provider("cce").why_not("cpu", "bfloat16", "token") == "runs on cuda only, not on cpu"
    assert "not float32" in op.provider("hf-autocast").why_not("cpu", "float32", "token")
    only = OPS["mips"].provider("faiss").why_not("cpu", "float32", "int8")
    assert only == "is for float32 only, not for int8"
    assert needs("no_such_package")() == "no_such_package is not installed"


# -------------------------------------------------------------------------- worker and memory


def case(provider: str) -> Case:
    return Case("marginal_loss", provider, "token", (2, 2, 3, 8, 50), "float32", "cpu")


def instead_of_gather(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    op = OPS["marginal_loss"]
    other = replace(op.provider("gather"), prepare=directly(run))
    monkeypatch.setitem(OPS, op.name, replace(op, providers=(other,)))


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["marginal_loss"].provider("torch")
    wrong = lambda mode, p: tuple(2 * x for x in right.prepare(mode, p)())  # noqa: E731
    instead_of_gather(monkeypatch, wrong)
    with pytest.raises(Refusal, match="^wrong: loss: "):
        Timed(case("gather"))
    with pytest.raises(Refusal, match="^unavailable: runs on cuda only, not on cpu$"):
        Timed(replace(case("gather"), op="doc_scores", mode="forward", provider="triton"))


def test_a_turn_is_the_calls_of_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = OPS["marginal_loss"].provider("gather")

    def counted(mode: str, problem: Any) -> tuple[torch.Tensor, ...]:
        calls.append(tuple(problem.hidden.shape))
        return right.prepare(mode, problem)()

    instead_of_gather(monkeypatch, counted)
    timed = Timed(case("gather"))
    calls.clear()
    timed.n_calls = 7
    turn = timed.turn()
    assert calls == [(2, 2, 3, 8)] * 7 and turn.wall > 0.0


@pytest.mark.parametrize(("n_kept", "n_passing"), [(0, 64), (32, 0)], ids=["passing", "kept"])
def test_memory_is_above_the_outputs_and_includes_what_a_call_keeps(
    n_kept: int, n_passing: int
) -> None:
    kept: list[torch.Tensor] = []

    def call() -> tuple[torch.Tensor, ...]:
        kept.append(torch.ones(n_kept * MIB, dtype=torch.uint8))
        passing = torch.ones((n_passing + 16) * MIB, dtype=torch.uint8)
        return (passing[: 16 * MIB].clone(),)

    found = measure.extra_bytes(call, CPU)
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    # the copy exists next to the memory that it is made of
    assert abs(found - (n_kept + n_passing + 16) * MIB) < 4 * MIB


def test_outputs_that_share_memory_count_once() -> None:
    x = torch.zeros(10)
    assert measure.nbytes((x, x[2:], x.view(2, 5))) == 40
