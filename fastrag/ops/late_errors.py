"""Errors that only values on a GPU can tell: found without waiting, raised by a later call.

A check makes a tensor that is zero if all is well. On a CPU it is read, and `positions` raises the
error at once. On another device reading it would stop the host until the device has caught up.
There

    found <- where(flag, found, what this call found)        the first fault stays
    flag  <- any(found)

run on the device, two small kernels for each check, and one copy per call sends the flags, a byte
each, to page-locked memory of the host. Every call begins with a plain read of those bytes. If one
is set, the call is going to raise and may wait: it fetches what was found, words the error as on a
CPU, and clears both sides.

A record belongs to a check, its settings and a shape, and lasts as long as the process. A captured
CUDA graph writes into it at every replay, and the next call outside of graphs raises. While a graph
is being captured nothing is raised and nothing allocated: a shape without a record from earlier
calls has its NaN and no record, as has every shape beyond the first `MAX_RECORDS`. Devices have
their own records. Threads and streams share them: a call may raise what another thread's found, and
if two streams write one record at the same time one report may be lost, but none is made up.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Makes the text of an error from place (list of indices) and value of the first entry that is not
# zero, and the settings. A function of a module, because records are identified by it.
Wording = Callable[..., str]
# A tensor of any shape that is 0, or False, if all is well; its wording; the settings.
Finding = tuple[Any, ...]

MAX_RECORDS = 1024
# Memory is taken by blocks, because taking it is the one step that waits; a record starts where any
# dtype may.
_BLOCK_BYTES = 1 << 20
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Record:
    wording: Wording
    settings: tuple[Hashable, ...]
    found: Tensor  # on the device
    flag: Tensor  # [] bool, on the device
    seen: Tensor  # [] bool, on the host


class _Device:
    """The records of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block, self.used = _zeros(device, _BLOCK_BYTES), 0
        seen = _zeros(torch.device("cpu"), MAX_RECORDS, pinned=device.type == "cuda")
        with torch.inference_mode(False):
            self.flags = self._take((MAX_RECORDS,), torch.bool)
            self.seen = seen.view(torch.bool)
        self.records: dict[Hashable, _Record] = {}

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        part = self.block[self.used : self.used + size]
        self.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part.view(dtype).view(shape)

    def record(
        self, found: Tensor, wording: Wording, settings: tuple[Hashable, ...]
    ) -> _Record | None:
        """The record of this check and shape, None where there can be none."""
        key = (wording, settings, found.shape, found.dtype)
        if key in self.records:
            return self.records[key]
        place = len(self.records)
        if place == MAX_RECORDS:
            return None
        if self.used + found.nbytes > len(self.block):
            if _capturing(self.device):
                return None
            self.block, self.used = _zeros(self.device, max(_BLOCK_BYTES, found.nbytes)), 0
        with torch.inference_mode(False):  # for views that any other call may write to
            kept = self._take(found.shape, found.dtype)
            made = _Record(wording, settings, kept, self.flags[place], self.seen[place])
        self.records[key] = made
        return made

    def take_errors(self) -> list[str]:
        """Wait for the device, empties its records and return what stood in them."""
        _wait(self.device)
        errors = []
        for record in self.records.values():
            if record.seen:
                found = torch.empty(record.found.shape, dtype=record.found.dtype)
                found.copy_(record.found, non_blocking=True)
                _wait(self.device)
                # Two streams at one record may leave a flag without a fault.
                if found.any():
                    errors.append(word(found, record.wording, record.settings))
                record.found.zero_()
        self.flags.zero_()
        _wait(self.device)
        self.seen.zero_()
        return errors


_devices: dict[torch.device, _Device] = {}
_lock = threading.Lock()


def send(findings: Sequence[Finding]) -> None:
    """Raise what earlier calls on the device found, record the findings of this one.

    All checks of a call go into one `send`, in the order in which they are reported. Their tensors
    are on one device.

    Raises:
        ValueError: an earlier call found a fault.
    """
    device = findings[0][0].device
    raise_late(device)
    with _lock:
        if device not in _devices:
            if _capturing(device):
                return
            _devices[device] = _Device(device)
        here = _devices[device]
        for found, wording, *settings in findings:
            record = here.record(found, wording, tuple(settings))
            if record is not None:
                torch.where(record.flag, record.found, found, out=record.found)
                torch.any(record.found, out=record.flag)
        here.seen.copy_(here.flags, non_blocking=True)


def raise_late(device: torch.device) -> None:
    """Raise what a finished call on `device` found, and forget it. Does not wait for others.

    Raises:
        ValueError: an earlier call found a fault.
    """
    here = _devices.get(device)
    if here is None or not here.seen.any() or _capturing(device):
        return
    with _lock:
        errors = here.take_errors()
    if errors:
        raise ValueError(f"{'; '.join(errors)} (in an earlier call, on {device})")


def forget() -> None:
    """Drop all records. A CUDA graph that has captured one must not be replayed any more."""
    _devices.clear()


# The memory goes while the driver is still there.
atexit.register(forget)


def word(found: Tensor, wording: Wording, settings: Iterable[Hashable]) -> str:
    """Return the text of the error of a finding that is not all zeros."""
    place = found.nonzero()[0].tolist()
    return wording(place, found[tuple(place)].item(), *settings)


def _zeros(device: torch.device, size: int, *, pinned: bool = False) -> Tensor:
    """Zeroed bytes that belong to nobody else, once they are all written."""

    def make() -> Tensor:
        made = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        _wait(device)
        return made

    # In a thread of its own, for which the caller's inference mode and memory pool do not hold: a
    # pool is taken back by torch.compile(mode="reduce-overhead"), after the run that warms it up.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
