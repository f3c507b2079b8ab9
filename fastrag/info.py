"""What is installed, which tree is in use, what can run here, and why the rest cannot.

>>> import fastrag.info
>>> print(fastrag.info.info().splitlines()[0])  # doctest: +ELLIPSIS
fastrag ...
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fastrag
from fastrag import profiling, terminal
from fastrag.kernels import tuning
from fastrag.ops import backends, workspace

_DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "tensorboard",
)
# Importing these modules registers the backends of their operations.
_OPS = ("doc_scores", "marginal_nll", "mips_topk", "mixture_logp", "token_logp")


def collect() -> dict[str, Any]:
    """Returns what `fastrag info` prints, as plain values fit for JSON.

    Keys: `fastrag` (version, tree, kernels), `python`, `platform`, `packages` (name -> version, or
    None), `devices` (list of name, capability, memory_gib), `cuda`, `backends` (name -> why it
    cannot run here, empty if it can), `instruction_sets` (of the C++ kernels, the one in use
    first), `missing_instruction_sets` (name -> why it cannot run here), `bfloat16_products`
    (whether the losses multiply bfloat16 as it is on the CPU), `ops` (name -> backend chosen by
    device type) and `environment` (the variables that change what runs).

    Example:
        >>> from fastrag.info import collect
        >>> collect()["backends"]["torch"]
        ''
    """
    return {
        "fastrag": {"version": fastrag.__version__, **_tree()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _DISTRIBUTIONS},
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "backends": backends.availability(),
        "instruction_sets": _instruction_sets(),
        "missing_instruction_sets": _missing_instruction_sets(),
        "bfloat16_products": workspace.multiplies(torch.bfloat16),
        "ops": _ops(),
        "environment": {
            name: os.environ.get(name)
            for name in (
                backends.BACKEND_VARIABLE,
                backends.ISA_VARIABLE,
                workspace.WORKSPACE_VARIABLE,
                profiling.RANGES_VARIABLE,
                tuning.TUNED_VARIABLE,
                "TRITON_INTERPRET",
                "CUDA_VISIBLE_DEVICES",
            )
        },
    }


def info() -> str:
    """Returns `collect()` as text for a terminal.

    Example:
        >>> from fastrag.info import info
        >>> "backend torch: available" in info()
        True
    """
    found = collect()
    own = found["fastrag"]
    lines = [
        f"fastrag {own['version']} from {own['tree']} ({own['kind']}), kernels in {own['kernels']}",
        f"python {found['python']} on {found['platform']}, {found['cpu_threads']} threads",
        "packages: "
        + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items()),
        f"cuda {found['cuda'] or 'not in this build of torch'}",
    ]
    for i, device in enumerate(found["devices"]):
        lines.append(
            f"device cuda:{i}: {device['name']}, compute capability {device['capability']}, "
            f"{device['memory_gib']:.0f} GiB"
        )
    if not found["devices"]:
        lines.append("device: cpu only")
    for name, reason in found["backends"].items():
        lines.append(f"backend {name}: {'not available: ' + reason if reason else 'available'}")
        if name == "cpp" and found["instruction_sets"]:
            used, *others = found["instruction_sets"]
            lines[-1] += f", {used}" + (f" (also {', '.join(others)})" if others else "")
            missing = found["missing_instruction_sets"].items()
            if missing:
                lines[-1] += "; not run here: " + ", ".join(f"{a} ({why})" for a, why in missing)
    how = "multiplied as it is" if found["bfloat16_products"] else "converted to float32"
    lines.append(f"bfloat16 on cpu: {how} in the losses")
    for op, choices in found["ops"].items():
        chosen = ", ".join(f"{choice} on {device}" for device, choice in choices.items())
        lines.append(f"op {op}: {chosen}")
    lines += [f"{name}={value}" for name, value in found["environment"].items() if value]
    return "\n".join(lines)


def main() -> None:
    """Prints `info()` as wide as the terminal: the command `fastrag info`."""
    for line in info().splitlines():
        wrapped = terminal.wrap(line.split(" "), terminal.width() - 2)
        sys.stdout.write("\n  ".join(wrapped) + "\n")


def _tree() -> dict[str, str]:
    """Where fastrag was imported from: in a checkout the current folder shadows an installation."""
    here = Path(fastrag.__file__).resolve().parent
    checkout = (here.parent / "pyproject.toml").exists()
    spec = importlib.util.find_spec("fastrag.kernels")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return {
        "tree": str(here),
        "kind": "source checkout" if checkout else "installed",
        "kernels": places[0] if places else "not found",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": properties.total_memory / 2**30,
            }
        )
    return found


def _ops() -> dict[str, dict[str, str]]:
    for op in _OPS:
        importlib.import_module(f"fastrag.ops.{op}")
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {op: {kind: _choice(op, kind) for kind in types} for op in backends.implemented()}


def _instruction_sets() -> list[str]:
    """Of the C++ kernels, the one in use first."""
    if backends.why_not("cpp"):
        return []
    from fastrag import _C

    found = _C.instruction_sets()
    forced = os.environ.get(backends.ISA_VARIABLE, "")
    return sorted(found, key=lambda name: name != forced) if forced in found else found


def _missing_instruction_sets() -> dict[str, str]:
    """The other sets of C++ kernels for this kind of processor, with the reasons."""
    if backends.why_not("cpp"):
        return {}
    from fastrag import _C

    return _C.missing_instruction_sets()


def _choice(op: str, kind: str) -> str:
    try:
        return backends.choose(op, torch.device(kind))
    except RuntimeError as error:
        return f"none ({error})"
