"""The choice among the candidate configurations of a kernel, from files of measurements.

A kernel module lists candidates for a regime, such as up to 64 queries against bfloat16. All of
them are correct and compile without spilling; the first runs if nothing was measured.
`python -m benchmarks.tune` times them and writes the fastest to one file for each architecture, for
example kernels/tuned/sm_90.json:

    {"architecture": "sm_90", "choices": {"group_max": {"n_queries=64,...": {"config": {...}}}}}

FASTRAG_TUNED names another such file. This module times nothing, neither at import nor at a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

TUNED_VARIABLE = "FASTRAG_TUNED"
FOLDER = Path(__file__).resolve().parent / "tuned"
Config = TypeVar("Config")  # a dict of numbers by name, or a dataclass of such fields

_forced: dict[str, Any] = {}


def choose(
    kernel: str,
    candidates: Callable[..., Sequence[Config]],
    device: torch.device | None,
    **regime: Any,
) -> Config:
    """Return the candidate of this regime that was fastest on `device` (None: the current one).

    Raises:
        ValueError: the file is not a file of choices, or it names an unknown candidate.
    """
    if kernel in _forced:
        return _forced[kernel]
    path = os.environ.get(TUNED_VARIABLE, "")
    return _chosen(path, architecture(device), kernel, candidates, tuple(regime.items()))


@functools.cache
def _chosen(
    path: str,
    arch: str,
    kernel: str,
    candidates: Callable[..., Sequence[Config]],
    regime: tuple[tuple[str, Any], ...],
) -> Config:
    offered = candidates(**dict(regime))
    key = regime_key(dict(regime))
    entry = _choices(path, arch).get(kernel, {}).get(key)
    if entry is None:
        return offered[0]
    for candidate in offered:
        if as_entry(candidate) == entry["config"]:
            return candidate
    raise ValueError(
        f"{_file(path, arch)}: {kernel}, {key}: expected one of the kernel's candidates, got "
        f"{entry['config']}; benchmarks.tune writes it anew"
    )


def architecture(device: torch.device | None) -> str:
    """Return the architecture, such as "sm_90"; "" without a GPU."""
    if device is None:
        if not torch.cuda.is_initialized():
            return ""
        device = torch.device("cuda", torch.cuda.current_device())
    return _architecture(device) if device.type == "cuda" else ""


@functools.cache
def _architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def regime_key(regime: Mapping[str, Any]) -> str:
    """Return the regime as a key of the files."""
    return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in regime.items())


def as_entry(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)


@contextlib.contextmanager
def forced(kernel: str, config: Any) -> Iterator[None]:
    """Make `choose` return `config` for this kernel, in any regime, within the context."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


def _file(path: str, arch: str) -> Path:
    return Path(path) if path else FOLDER / f"{arch}.json"


@functools.cache
def _choices(path: str, arch: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the choices of a file; none if it is for another architecture."""
    file = _file(path, arch)
    if not arch or (not path and not file.exists()):
        return {}
    found = read(file)
    return found["choices"] if found["architecture"] == arch else {}


def read(file: Path) -> dict[str, Any]:
    """Read a file of measured choices.

    Raises:
        ValueError: there is none, or it is not of the form that benchmarks.tune writes.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from error
    if not _has_form(found):
        raise ValueError(
            f'{file}: expected {{"architecture": ..., "choices": {{kernel: {{regime: {{"config": '
            f"{{...}}}}}}}}}}, as benchmarks.tune writes it"
        )
    return found


def _has_form(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        return False
    kernels = found.get("choices")
    if not isinstance(kernels, dict) or not all(isinstance(k, dict) for k in kernels.values()):
        return False
    entries = [entry for regimes in kernels.values() for entry in regimes.values()]
    return all(isinstance(e, dict) and isinstance(e.get("config"), dict) for e in entries)


def forget() -> None:
    """Forget all files that were read, so that changed files are read again."""
    _choices.cache_clear()
    _chosen.cache_clear()
