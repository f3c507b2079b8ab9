"""What an entry of the benchmark registry is; the entries themselves are in benchmarks/ops/.

An operation (`Op`) makes inputs, knows the right answer, and has providers: ours, peers, and one
ceiling that nothing can pass, such as the matrix products alone or a copy of as many bytes. The
same entries serve `benchmarks.run`, the pytest face and the tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.shared import Spec

Shape = tuple[int, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# Relative error that passes whatever plain torch does: a peer may round more often than it, and a
# gradient that is wrong is off by far more.
FLOORS = {"float32": 3e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def always() -> str:
    return ""


def unchanged(mode: str, problem: Any) -> Any:
    return problem


def no_memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    return 0, 0


def needs(module: str) -> Callable[[], str]:
    """Returns a test for an installed module: "" if it is there, else the reason."""

    def missing() -> str:
        return "" if importlib.util.find_spec(module) else f"{module} is not installed"

    return missing


@dataclass(frozen=True)
class Provider:
    """One way to do the operation.

    `run(mode, problem)` returns the outputs that the operation names, gradients included. What it
    gets for a problem is `setup(mode, problem)`, neither timed nor counted: an index of its own,
    perhaps. `missing` gives the reason why it cannot run here, "" if it can. `compiles`: its first
    call at a shape builds code, whose memory is not counted. `memory(mode, shape, device)` bounds
    the bytes that its process keeps beside what is shared, and those that a call takes in addition.
    """

    name: str
    run: Callable[[str, Any], tuple[Tensor, ...]]
    about: str
    kind: str = "peer"  # or "ours" or "ceiling"; a ceiling has no outputs to check
    devices: tuple[str, ...] = DEVICES
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = ()  # all
    missing: Callable[[], str] = always
    compiles: bool = False
    setup: Callable[[str, Any], Any] = unchanged
    memory: Callable[[str, Shape, torch.device], tuple[int, int]] = no_memory

    def call(self, mode: str, problem: Any) -> Callable[[], tuple[Tensor, ...]]:
        """Returns what is checked and timed."""
        ready = self.setup(mode, problem)
        return lambda: self.run(mode, ready)

    def why_not(self, device: str, dtype: str, mode: str) -> str:
        """Returns the reason why this cannot run on such inputs here, "" if it can."""
        if self.modes and mode not in self.modes:
            return f"is for {' and '.join(self.modes)} only, not for {mode}"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only, not {dtype}"
        return self.missing()


@dataclass(frozen=True)
class Goal:
    """A ratio to be compared by eye with what was measured: ours against provider `against`.

    Slower by at most `at_most`, or faster by at least `at_least`; `against` may be "best peer".
    `where(mode, shape)`: where it is one.
    """

    against: str
    at_most: float | None = None
    at_least: float | None = None
    where: Callable[[str, Shape], bool] = lambda mode, shape: True


@dataclass(frozen=True)
class Op:
    """An operation: inputs, oracle, providers, and what it takes at the least."""

    name: str
    about: str
    dims: tuple[str, ...]  # names of the numbers of a shape
    modes: tuple[str, ...]
    outputs: tuple[str, ...]  # what providers return; a mode may return the first few
    # shape, dtype, seed, device -> the inputs; they have a method to(dtype), the same numbers anew
    make: Callable[[Shape, torch.dtype, int, torch.device], Any]
    # the same, with what is easy to get wrong, such as labels that do not count
    make_checked: Callable[[Shape, torch.dtype, int, torch.device], Any]
    oracle: Callable[[str, Any], tuple[Tensor, ...]]  # outputs, in the dtype of the inputs
    providers: tuple[Provider, ...]
    ceiling: str  # name of the provider that nothing can pass; others of that kind may be beside it
    checked: tuple[Shape, ...]  # the first one is tiny
    shapes: Mapping[str, tuple[Shape, ...]]  # device -> sweep
    small: Shape  # for pytest
    flops: Callable[[str, Shape], float]  # of the least work that gives the outputs
    bytes: Callable[[str, Shape, int], float]  # each input read and each output written once
    goals: tuple[Goal, ...] = ()
    # mode, shape, device -> bytes of workspace that ours may take, and the limit that bounds them
    workspace: Callable[[str, Shape, torch.device], tuple[int, int]] | None = None
    extra_memory: int | None = None  # bytes beyond inputs and outputs that ours may take
    # (device, mode) -> sweep, where it is not that of the device
    mode_shapes: Mapping[tuple[str, str], tuple[Shape, ...]] = field(default_factory=dict)
    # (mode, shape) of the sweep that say most, for a run that has not the time for all
    headlines: tuple[tuple[str, Shape], ...] = ()
    # dimension -> shapes along it, at one or a few settings of the others
    curves: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)
    curve_providers: tuple[str, ...] = ()  # who is timed along a curve, unless told; empty: all
    # provider, mode, problem, outputs -> what is wrong, where nearness to the oracle says little
    check: Callable[[Provider, str, Any, tuple[Tensor, ...]], str] | None = None
    # mode, shape -> tensors that all processes on a CPU need
    share: Callable[[str, Shape], Mapping[str, Spec]] | None = None
    # Seconds of turns after which a provider takes no more: it is slow, and known to be.
    patience: float = math.inf

    def sweep(self, device: str, mode: str) -> tuple[Shape, ...]:
        return self.mode_shapes.get((device, mode), self.shapes[device])

    def provider(self, name: str) -> Provider:
        return next(p for p in self.providers if p.name == name)

    def names(self, kind: str | None = None) -> list[str]:
        return [p.name for p in self.providers if kind in (None, p.kind)]


def ours(
    backend: str, run: Callable[[str, Any], tuple[Tensor, ...]], about: str, **limits: Any
) -> Provider:
    """Returns the provider that runs fastrag on one backend, chosen by name.

    A user's own FASTRAG_BACKEND leaves only the provider of that name.
    """

    def on_backend(mode: str, problem: Any) -> tuple[Tensor, ...]:
        with forced_backend(backend):
            return run(mode, problem)

    def missing() -> str:
        from fastrag.ops import backends

        asked = os.environ.get(backends.BACKEND_VARIABLE, "")
        if asked not in ("", backend):
            return f"{backends.BACKEND_VARIABLE}={asked} asks for another backend"
        return backends.why_not(backend)

    return Provider(backend, on_backend, about, kind="ours", missing=missing, **limits)


@contextlib.contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Within it every op of fastrag runs on backend `name`."""
    from fastrag.ops.backends import BACKEND_VARIABLE

    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before


def error_of(
    op: Op, provider: Provider, mode: str, shape: Shape, dtype: str, device: torch.device
) -> str:
    """Returns what is wrong with a provider's outputs at this shape, "" if nothing is.

    The op's own check says so, if it has one. Else the yardstick is the oracle in float64 on the
    same numbers: allowed is twice the norm and three times the largest error of plain torch in the
    same dtype, plus a floor of that dtype.
    """
    from fastrag.testing import assert_close

    if provider.kind == "ceiling":
        return ""
    problem = op.make_checked(shape, DTYPES[dtype], 0, device)
    found = provider.call(mode, problem)()
    if op.check is not None:
        wrong = op.check(provider, mode, problem, found)
        return wrong and f"{wrong} at {','.join(map(str, shape))}"
    right = op.oracle(mode, problem.to(torch.float64))
    plain = op.oracle(mode, problem.to(DTYPES[dtype]))
    if len(found) != len(right):
        return f"{len(found)} outputs, expected {len(right)}"
    for name, got, base, true in zip(op.outputs, found, plain, right, strict=False):
        try:
            assert_close(
                got.detach().double(),
                base.detach().double(),
                true.detach(),
                norm=2.0,
                peak=3.0,
                floor=FLOORS[dtype],
                name=name,
            )
        except AssertionError as error:
            return f"{error} at {','.join(map(str, shape))}"
    return ""
