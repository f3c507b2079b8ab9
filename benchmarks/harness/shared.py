"""Tensors that the processes of a run share: made once by the parent, mapped by its workers.

Each is a file without a name, in memory where the system has a place for that: it goes with the
last process that holds it, however that one ends.
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
    """A tensor to be made; `fill` writes it, when those named before it are there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Callable[[Tensor], None]


# Of this process: what it made or was handed, and the files behind what it made.
_tensors: dict[str, Tensor] = {}
_files: dict[str, BinaryIO] = {}


def hold(specs: Mapping[str, Spec]) -> None:
    """Makes what is not there yet, and lets go of what is no longer asked for."""
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
    """What a worker has to inherit."""
    return [file.fileno() for file in _files.values()]


def handles() -> dict[str, Any]:
    """What a worker has to be told, as JSON has it."""
    return {
        name: [file.fileno(), list(_tensors[name].shape), str(_tensors[name].dtype)[6:]]
        for name, file in _files.items()
    }


def take(handed: Mapping[str, Any]) -> None:
    """Maps what the parent holds."""
    # All pages at once: one that is first touched in a call would count as its time and memory.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    for name, (descriptor, shape, dtype) in handed.items():
        _tensors[name] = _mapped(descriptor, tuple(shape), getattr(torch, dtype), flags)


def _mapped(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype, flags: int) -> Tensor:
    memory = mmap.mmap(descriptor, math.prod(shape) * dtype.itemsize, flags=flags)
    with suppress(AttributeError, OSError):  # advice, which not every system takes
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
