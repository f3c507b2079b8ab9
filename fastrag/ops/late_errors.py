"""Errors that depend on values on a GPU: detected without waiting, raised by a later call.

A check computes a tensor that is zero if there is no fault. On a CPU the tensor is read, and
`positions` raises the error at once. On another device, reading it would stop the host until the
device has caught up. There, two small kernels for each check

    found <- where(flag, found, fault of this call)        the first fault stays
    flag  <- any(found)

run on the device, and one copy per call sends the flags, a byte each, to page-locked memory of the
host. Every call begins with a plain read of these bytes. If one is set, the call will raise and may
wait: it reads the faults, words the error as on a CPU, and clears the records.

A record belongs to a check, its settings and a shape, and lasts as long as the process. A captured
CUDA graph writes to it at every replay, and the next call outside of a graph raises. During a
capture, nothing is raised and nothing is allocated. So a new shape in a capture has no record, and
neither has a shape beyond the first `MAX_RECORDS`; a fault then only makes the loss NaN. Each
device has its own records, which threads and streams share. A call may raise a fault of another
thread's call. If two streams write to one record at the same time, a report may be lost, but a
report is never false.
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

# Makes the message from the indices (a list) and the value of the first entry that is not zero, and
# the settings. It has to be a function of a module, because it identifies a record.
Wording = Callable[..., str]
# A tensor of any shape that is 0 or False if there is no fault; its wording; the settings.
Finding = tuple[Any, ...]

MAX_RECORDS = 1024
# Memory is allocated in blocks, because allocating is the only step that waits. A record is aligned
# for every dtype.
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
        """Return the record of this check and shape, or None if there can be none."""
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
        with torch.inference_mode(False):  # later calls in any mode must be able to write to it
            kept = self._take(found.shape, found.dtype)
            made = _Record(wording, settings, kept, self.flags[place], self.seen[place])
        self.records[key] = made
        return made

    def take_errors(self) -> list[str]:
        """Wait for the device, clear its records and return the messages of their faults."""
        _wait(self.device)
        errors = []
        for record in self.records.values():
            if record.seen:
                found = torch.empty(record.found.shape, dtype=record.found.dtype)
                found.copy_(record.found, non_blocking=True)
                _wait(self.device)
                # Two streams that write to one record may leave a flag without a fault.
                if found.any():
                    errors.append(message(found, record.wording, record.settings))
                record.found.zero_()
        self.flags.zero_()
        _wait(self.device)
        self.seen.zero_()
        return errors


_devices: dict[torch.device, _Device] = {}
_lock = threading.Lock()


def send(findings: Sequence[Finding]) -> None:
    """Raise faults of earlier calls on the device, then record the findings of this call.

    A call passes all its checks to one `send`, in the order in which they should be reported. Their
    tensors are on one device.

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
    """Raise the faults that finished calls on `device` found and clear them, without waiting.

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


# The memory must be freed before the driver shuts down.
atexit.register(forget)


def message(found: Tensor, wording: Wording, settings: Iterable[Hashable]) -> str:
    """Return the error message of a finding that is not all zeros."""
    place = found.nonzero()[0].tolist()
    return wording(place, found[tuple(place)].item(), *settings)


def _zeros(device: torch.device, size: int, *, pinned: bool = False) -> Tensor:
    """Allocate zeroed bytes outside of any memory pool, and wait until they are written."""

    def make() -> Tensor:
        made = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        _wait(device)
        return made

    # A new thread has neither the caller's inference mode nor its memory pool. The pool of
    # torch.compile(mode="reduce-overhead") is freed after the warm-up run.
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
