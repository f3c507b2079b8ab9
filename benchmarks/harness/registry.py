"""The types of the benchmark registry, whose entries are in benchmarks/ops/.

An operation (`Op`) makes inputs, knows the right answer, and has providers: ours, peers, and
ceilings that nothing can pass, such as the matrix products alone or a copy of as many bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.shared import Spec

Shape = tuple[int, ...]
Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]
Prepare = Callable[[str, Any], Call]  # mode, problem -> the timed call
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# Relative error that always passes: a peer may round more often than plain torch, and a wrong
# gradient is off by far more.
FLOORS = {"float32": 3e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def shape_text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def directly(run: Callable[[str, Any], Outputs]) -> Prepare:
    """Return the `prepare` of a provider that has nothing to prepare."""
    return lambda mode, problem: partial(run, mode, problem)


def needs(*modules: str) -> Callable[[], str]:
    """Return a test for installed modules: "" if all are there, else the reason."""

    def missing() -> str:
        absent = [name for name in modules if not importlib.util.find_spec(name)]
        return f"{absent[0]} is not installed" if absent else ""

    return missing


@dataclass(frozen=True)
class Provider:
    """One way to do the operation; docs/benchmarks.md describes each.

    `prepare(mode, problem)` is neither timed nor counted, and may build an index. It returns the
    call that is timed, which returns the outputs that the operation names, gradients included.
    `missing` gives the reason why the provider cannot run here, "" if it can. `compiles`: the first
    call at a shape builds code, whose memory is not counted. `memory(mode, shape, device)` bounds
    the bytes that the process keeps in addition to shared tensors, and those that a call takes.
    """

    name: str
    prepare: Prepare
    kind: str = "peer"  # or "ours" or "ceiling"; a ceiling has no outputs to check
    devices: tuple[str, ...] = DEVICES
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = ()  # all
    missing: Callable[[], str] = lambda: ""
    compiles: bool = False
    memory: Callable[[str, Shape, torch.device], tuple[int, int]] = lambda *_: (0, 0)

    def knows(self, mode: str) -> bool:
        """Return whether this has the mode, whatever corpus is named after it."""
        return not self.modes or mode.partition("/")[0] in self.modes

    def why_not(self, device: str, dtype: str, mode: str) -> str:
        """Return the reason why this cannot run on such inputs here, "" if it can."""
        if not self.knows(mode):
            return f"is for {' and '.join(self.modes)} only, not for {mode}"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only, not {dtype}"
        return self.missing()


@dataclass(frozen=True)
class Goal:
    """A ratio of ours to provider `against`, or to the "best peer", to be compared by eye.

    Ours takes at most `at_most` times as long, or is at least `at_least` times as fast.
    """

    against: str
    at_most: float | None = None
    at_least: float | None = None
    where: Callable[[str, Shape], bool] = lambda mode, shape: True  # where it applies


@dataclass(frozen=True)
class Op:
    """An operation: inputs, oracle, providers, and the least work that it needs."""

    name: str
    about: str
    dims: tuple[str, ...]  # names of the numbers of a shape
    modes: tuple[str, ...]  # a corpus other than the first may follow after a slash
    outputs: tuple[str, ...]  # of a call; a mode may return only the first few
    # shape, dtype, device -> inputs with a method to(dtype), which keeps the numbers
    make: Callable[[Shape, torch.dtype, torch.device], Any]
    # the same, with details that are easy to get wrong, such as labels that do not count
    make_checked: Callable[[Shape, torch.dtype, torch.device], Any]
    oracle: Callable[[str, Any], Outputs]  # outputs, in the dtype of the inputs
    providers: tuple[Provider, ...]
    ceiling: str  # provider that nothing can pass; there may be others of that kind
    checked: tuple[Shape, ...]  # the first one is tiny
    shapes: Mapping[str, tuple[Shape, ...]]  # device -> sweep
    small: Shape  # for pytest
    flops: Callable[[str, Shape], float]  # of the least work that gives the outputs
    bytes: Callable[[str, Shape, int], float]  # each input read and each output written once
    goals: tuple[Goal, ...] = ()
    # mode, shape, device -> bytes of workspace that ours may take, and the limit that bounds them
    workspace: Callable[[str, Shape, torch.device], tuple[int, int]] | None = None
    extra_memory: int | None = None  # bytes beyond inputs and outputs that ours may take
    # (device, mode) -> sweep, if it is not that of the device
    mode_shapes: Mapping[tuple[str, str], tuple[Shape, ...]] = field(default_factory=dict)
    # (mode, shape) of the sweep that say most, for a run with a budget
    headlines: tuple[tuple[str, Shape], ...] = ()
    # dimension -> shapes along it, at one or a few settings of the others
    curves: Mapping[str, tuple[Shape, ...]] = field(default_factory=dict)
    curve_providers: tuple[str, ...] = ()  # timed along a curve by default; empty: all
    # provider, mode, problem, outputs -> the fault, for outputs that have no small error
    check: Callable[[Provider, str, Any, Outputs], str] | None = None
    # mode, shape, dtype, device -> a line under the table of ours, for what is no time
    note: Callable[[str, Shape, torch.dtype, torch.device], str] | None = None
    # mode, shape -> tensors that all processes on a CPU need
    share: Callable[[str, Shape], Mapping[str, Spec]] | None = None
    corpora: tuple[str, ...] = ()  # of inputs
    # an op with corpora takes a file of vectors [N, D] as well: its sweep, after N and D
    on_vectors: tuple[Shape, ...] = ()
    patience: float = math.inf  # seconds of turns after which a slow provider takes no more

    def sweep(self, device: str, mode: str) -> tuple[Shape, ...]:
        return self.mode_shapes.get((device, mode), self.shapes[device])

    def provider(self, name: str) -> Provider:
        return next(p for p in self.providers if p.name == name)

    def names(self, kind: str | None = None) -> list[str]:
        return [p.name for p in self.providers if kind in (None, p.kind)]


class Point(NamedTuple):
    op: Op
    mode: str
    shape: Shape


def by_importance(op: Op, device: str) -> list[Point]:
    """Return the op's sweep: its headlines, then all modes of one shape after the other."""
    sweeps = ([Point(op, mode, shape) for shape in op.sweep(device, mode)] for mode in op.modes)
    sweep = [point for points in zip_longest(*sweeps) for point in points if point]
    headlines = [Point(op, mode, shape) for mode, shape in op.headlines]
    first = [point for point in headlines if point in sweep]
    return first + [point for point in sweep if point not in first]


def in_turn(ops: Iterable[Op], device: str) -> list[Point]:
    """Return the most important point of each op, then the second of each, and so on."""
    each = (by_importance(op, device) for op in ops)
    return [point for point in chain.from_iterable(zip_longest(*each)) if point]


def ours(backend: str, prepare: Prepare, name: str = "", **limits: Any) -> Provider:
    """Return the provider that runs fastrag on one backend, which also names it.

    A user's own FASTRAG_BACKEND leaves only the provider of that backend.
    """

    def on_backend(mode: str, problem: Any) -> Call:
        call = prepare(mode, problem)

        def forced() -> Outputs:
            with forced_backend(backend):
                return call()

        return forced

    def missing() -> str:
        from fastrag.ops import backends

        asked = os.environ.get(backends.BACKEND_VARIABLE, "")
        if asked not in ("", backend):
            return f"{backends.BACKEND_VARIABLE}={asked} asks for another backend"
        return backends.why_not(backend)

    return Provider(name or backend, on_backend, "ours", missing=missing, **limits)


@contextlib.contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Run every op of fastrag on backend `name` within the context."""
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
    """Return the fault of a provider's outputs at this shape, "" if they are right.

    The op's own check decides, if it has one. Otherwise the measure is the oracle in float64 on the
    same numbers: the error may have twice the norm and three times the maximum of the error of
    plain torch in the same dtype, plus a floor of that dtype.
    """
    from fastrag.testing import assert_close

    if provider.kind == "ceiling":
        return ""
    problem = op.make_checked(shape, DTYPES[dtype], device)
    found = provider.prepare(mode, problem)()
    if op.check is not None:
        wrong = op.check(provider, mode, problem, found)
        return wrong and f"{wrong} at {shape_text(shape)}"
    right = op.oracle(mode, problem.to(torch.float64))
    plain = op.oracle(mode, problem.to(DTYPES[dtype]))
    if len(found) != len(right):
        return f"{len(found)} outputs, expected {len(right)}"
    limits: dict[str, Any] = {"norm": 2.0, "peak": 3.0, "floor": FLOORS[dtype]}
    for name, got, base, true in zip(op.outputs, found, plain, right, strict=False):
        try:
            wide = got.detach().double(), base.detach().double(), true.detach()
            assert_close(*wide, name=name, **limits)
        except AssertionError as error:
            return f"{error} at {shape_text(shape)}"
    return ""
