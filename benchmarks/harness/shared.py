"""Tensors that the processes of a run share: the parent makes them once, its children map them.

Each is a file without a name, in memory if the system has a place for that. It disappears with the
last process that holds it, however that process ends.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Spec:
    """A tensor to be made; `fill` writes it after those named before it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[Tensor], None]


# The tensors that this process made or was handed, and the files behind those that it made.
_tensors: dict[str, Tensor] = {}
_files: dict[str, BinaryIO] = {}


def hold(specs: Mapping[str, Spec]) -> None:
    """Make the tensors that are missing and drop those that are no longer asked for."""
    for name in set(_files) - set(specs):
        del _tensors[name]
        _files.pop(name).close()
    for name, spec in specs.items():
        if name not in _files:
            # open as long as it is held
            file = tempfile.TemporaryFile(dir=MEMORY if MEMORY.is_dir() else None)  # noqa: SIM115
            file.truncate(math.prod(spec.shape) * spec.dtype.itemsize)
            tensor = _mapped(file.fileno(), spec.shape, spec.dtype, mmap.MAP_SHARED)
            spec.fill(tensor)
            _tensors[name], _files[name] = tensor, file


def find(name: str) -> Tensor | None:
    return _tensors.get(name)


def descriptors() -> list[int]:
    """Return the files that a child has to inherit."""
    return [file.fileno() for file in _files.values()]


def handles() -> dict[str, Any]:
    """Return the arguments of `take` in a child."""
    return {
        name: (file.fileno(), tuple(_tensors[name].shape), _tensors[name].dtype)
        for name, file in _files.items()
    }


def take(handed: Mapping[str, Any]) -> None:
    """Map the tensors that the parent holds."""
    # All pages at once: a page first touched in a call would count as its time and memory.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    for name, (descriptor, shape, dtype) in handed.items():
        _tensors[name] = _mapped(descriptor, shape, dtype, flags)


def _mapped(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype, flags: int) -> Tensor:
    memory = mmap.mmap(descriptor, math.prod(shape) * dtype.itemsize, flags=flags)
    with suppress(AttributeError, OSError):  # not every system takes this advice
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
