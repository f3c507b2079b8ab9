"""The registry of backends, and the choice of a backend for a call.

Each op registers its implementations by backend. `choose` returns the first backend that can run a
call, and `load` imports its implementation. The environment variable `FASTRAG_BACKEND` forces one
backend for every op; `choose` raises an error with the reason if it cannot run. A backend is probed
when it is first considered, so importing fastrag loads neither CUDA nor triton nor the extension
module fastrag._C.

A subclass of `Backend` is a new backend, which is preferred to all existing ones:

    class Mine(Backend, name="mine", implements={"doc_scores": "mine.kernels"}):
        devices = ("cpu",)

The module of an op states the interface of an implementation where it registers its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrag.ops.sources import digest

BACKEND_VARIABLE = "FASTRAG_BACKEND"
# Forces an instruction set of the C++ kernels, for tests and comparisons: scalar; avx2, avx512 or
# amx (avx512 with tiles of int8) on x86; neon or dotprod (neon with dot products of int8) on ARM;
# amx-emulated, which is scalar with the tiles of amx in plain C++.
ISA_VARIABLE = "FASTRAG_CPU_ISA"
_MIN_CAPABILITY = (8, 0)
_CSRC = Path(__file__).resolve().parents[2] / "csrc"


class BackendError(RuntimeError):
    """A requested backend does not exist or cannot run on this machine; the message says why."""


class Backend:
    """Base class of backends; defining a subclass registers it.

    Attributes:
        name: the value of `FASTRAG_BACKEND` that forces this backend.
        devices: types of devices on which `choose` considers it; None: all. On other devices it
            runs only if it is forced.
    """

    name: str
    devices: tuple[str, ...] | None = None

    def __init_subclass__(cls, *, name: str, implements: Mapping[str, str] | None = None) -> None:
        cls.name = name
        _backends.insert(0, cls())
        for op, home in (implements or {}).items():
            register(op, **{name: home})

    def why_not(self) -> str:
        """Return why the backend cannot run on this machine; "" if it can."""
        return ""

    def refusal(self, device: torch.device, dtype: torch.dtype | None) -> str:
        """Return why the backend cannot take tensors of this device and dtype; "" if it can."""
        return ""


_backends: list[Backend] = []  # preferred first
_implemented: dict[str, dict[str, str]] = {}  # op -> backend -> "module:attribute"


def names() -> tuple[str, ...]:
    """Return the names of all backends, preferred ones first."""
    return tuple(each.name for each in _backends)


def register(op: str, **implementations: str) -> None:
    """Register the implementations of `op`.

    Args:
        op: name of the operation.
        implementations: by name of the backend, `"module"` or `"module:attribute"`, which is
            imported when the backend is chosen.
    """
    _implemented.setdefault(op, {}).update(implementations)


def implemented() -> dict[str, tuple[str, ...]]:
    """Return, for every op imported so far, the names of the backends that implement it."""
    return {op: tuple(found) for op, found in _implemented.items()}


@functools.cache  # an import statement takes as long as computing the scores of a few passages
def load(op: str, backend: str) -> Any:
    """Import the implementation of `op` in a backend that `choose` returned."""
    return pkgutil.resolve_name(_implemented[op][backend])


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's interpreter on a CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def why_not(name: str) -> str:
    """Return why backend `name` cannot run on this machine; "" if it can.

    Raises:
        BackendError: there is no backend of this name.
    """
    return _probe(_named(name), interpreting())


def availability() -> dict[str, str]:
    """Return `why_not` of every backend, by name."""
    return {name: why_not(name) for name in names()}


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    unfit: Mapping[str, Callable[[], str]] | None = None,
) -> str:
    """Return the name of the backend that runs `op` on tensors of this device and dtype.

    Args:
        op: name of the operation.
        device: device of the tensors.
        dtype: dtype of the maths; None: any.
        unfit: functions by backend that return why it cannot take this call, for example because of
            its sizes; "" if it can. They are only called for backends that can run otherwise.

    Raises:
        BackendError: `FASTRAG_BACKEND` names a backend that cannot run this; the message says why.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "")
    if forced:
        reason = _refusal(_forced(forced), op, device, dtype, unfit)
        if reason:
            raise BackendError(f"{BACKEND_VARIABLE}={forced} cannot run {op}: {reason}")
        return forced
    for name in _able(tuple(_backends), device, dtype, interpreting()):
        if name in _implemented[op] and not (unfit and name in unfit and unfit[name]()):
            return name
    raise BackendError(f"no backend can run {op} on {device}")


def check_forced() -> None:
    """Check the environment variables that force a choice, at the start of a long run.

    Raises:
        BackendError: `FASTRAG_BACKEND` names a backend that does not exist or cannot run here.
        ValueError: `FASTRAG_CPU_ISA` names no instruction set of this machine and build.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "")
    if forced and (reason := why_not(_forced(forced).name)):
        raise BackendError(f"{BACKEND_VARIABLE}={forced} cannot run here: {reason}")
    if not why_not("cpp"):
        forced_isa()


def forced_isa() -> str:
    """Return the instruction set that `FASTRAG_CPU_ISA` forces on fastrag._C; "" means the best.

    Raises:
        ValueError: this machine or this build has no such instruction set.
    """
    name = os.environ.get(ISA_VARIABLE, "")
    if name:
        from fastrag import _C

        if name not in _C.instruction_sets(emulated=True):
            known = ", ".join(_C.instruction_sets())
            raise ValueError(
                f"{ISA_VARIABLE}: expected one of {known} (what this machine and this build have), "
                f"got {name!r}"
            )
    return name


def strided(matrix: Tensor) -> str:
    """Return why the C++ kernels cannot read a matrix [N, D] in place; "" if they can."""
    n, dim = matrix.shape
    if (dim > 1 and matrix.stride(1) != 1) or (n > 1 and matrix.stride(0) < dim):
        return f"it reads rows in place, got an index with strides {matrix.stride()}"
    return ""


def _named(name: str) -> Backend:
    for backend in _backends:
        if backend.name == name:
            return backend
    raise BackendError(f"no backend is called {name!r}; backends: {', '.join(names())}")


def _forced(name: str) -> Backend:
    try:
        return _named(name)
    except BackendError as error:
        raise BackendError(f"{BACKEND_VARIABLE}: {error}") from None


def _refusal(
    backend: Backend,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    unfit: Mapping[str, Callable[[], str]] | None,
) -> str:
    name = backend.name
    if reason := _probe(backend, interpreting()):
        return reason
    if name not in _implemented[op]:
        return f"{op} has no {name} implementation (it has: {', '.join(_implemented[op])})"
    if reason := backend.refusal(device, dtype):
        return reason
    return unfit[name]() if unfit and name in unfit else ""


@functools.cache  # an op that takes microseconds chooses a backend too
def _able(
    backends: tuple[Backend, ...],
    device: torch.device,
    dtype: torch.dtype | None,
    interpreted: bool,
) -> tuple[str, ...]:
    """Return the names of the backends that are considered for this device and dtype."""
    return tuple(
        each.name
        for each in backends
        if (each.devices is None or device.type in each.devices)
        and not _probe(each, interpreted)
        and not each.refusal(device, dtype)
    )


@functools.cache
def _probe(backend: Backend, interpreted: bool) -> str:
    return backend.why_not()


class _Torch(Backend, name="torch"):
    """Plain torch: runs everywhere, and is chosen if no other backend can run."""


class _Cpp(Backend, name="cpp"):
    """The extension module fastrag._C."""

    devices = ("cpu",)

    def why_not(self) -> str:
        return _probe_extension()

    def refusal(self, device: torch.device, dtype: torch.dtype | None) -> str:
        if device.type != "cpu":
            return f"cpp needs tensors on the CPU, got {device}"
        if dtype == torch.float64:
            return "the C++ kernels compute in float32, got float64"
        return ""


class _Triton(Backend, name="triton"):
    """The kernels in fastrag.kernels."""

    devices = ("cuda",)

    def why_not(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if interpreting():
            return ""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < _MIN_CAPABILITY:
            have, need = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
            return f"compute capability {have} is below {need}"
        return ""

    def refusal(self, device: torch.device, dtype: torch.dtype | None) -> str:
        if device.type != "cuda" and not interpreting():
            return f"triton needs CUDA tensors, got {device} (TRITON_INTERPRET=1 lifts this)"
        if dtype == torch.float64:
            return "the triton kernels compute in float32, got float64"
        return ""


def _probe_extension() -> str:
    if importlib.util.find_spec("fastrag._C") is None:
        return "the extension module fastrag._C is not built: install fastrag with a C++17 compiler"
    try:
        module = importlib.import_module("fastrag._C")
    except ImportError as error:
        return f"the extension module fastrag._C does not load: {error}"
    # Only a source checkout has csrc/. Its compiled extension can be older than the Python code.
    sources = digest(_CSRC)
    if sources and sources != getattr(module, "SOURCES", ""):
        return (
            "the extension module fastrag._C was built from other sources than those in csrc/: "
            "build it again (python setup.py build_ext --inplace --force)"
        )
    return ""
