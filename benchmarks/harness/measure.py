"""The clock, the memory above inputs and outputs, and facts about this machine."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import ROOT

Call = Callable[[], Sequence[Tensor]]

# A turn lasts at least this long, so that a call of microseconds is not timed alone.
TURN_SECONDS = 0.05
MAX_CALLS = 1000
# More than the second-level cache of any GPU so far; zeroed before each call on a GPU.
CACHE_BYTES = 256 << 20


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the memory behind the tensors; shared memory counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Return the peak of a call's memory above the memory before it and that of its outputs.

    On a CPU that is the resident set of this process; None if the system does not tell. Memory that
    the call keeps for the next one counts if this call is the first that needs it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = nbytes(call())
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - returned)
    with suppress(AttributeError):  # memory that malloc holds back would be used without a trace
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS (proc(5))
    except OSError:
        return None
    before = _kilobytes("/proc/self/status", "VmRSS")
    returned = nbytes(call())
    return max(0, _kilobytes("/proc/self/status", "VmHWM") - before - returned)


def free_memory(device: torch.device) -> float:
    """Return the bytes that may still be taken; infinite if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return math.inf


def _kilobytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}")


@dataclass
class Turn:
    """Mean milliseconds of the calls of one turn, by the clock and of processor time."""

    wall: float
    processor: float


def calls_per_turn(call: Call, device: torch.device) -> int:
    """Return how many calls make up a turn, from the time that one takes."""
    seconds = one_turn(call, device, 1).wall / 1e3
    if seconds < TURN_SECONDS:  # too short for a single measurement
        seconds = min(seconds, *(one_turn(call, device, 1).wall / 1e3 for _ in range(3)))
    return max(1, min(MAX_CALLS, round(TURN_SECONDS / max(seconds, 1e-7))))


def one_turn(call: Call, device: torch.device, n_calls: int) -> Turn:
    if device.type == "cuda":
        return _cuda_turn(call, n_calls)
    start, start_processor = time.perf_counter(), time.process_time()
    for _ in range(n_calls):
        call()
    wall, processor = time.perf_counter() - start, time.process_time() - start_processor
    return Turn(1e3 * wall / n_calls, 1e3 * processor / n_calls)


def _cuda_turn(call: Call, n_calls: int) -> Turn:
    """Time calls by events, after a first call that takes the memory and does not count.

    All providers share the GPU, so the memory is given back at the end.
    """
    call()
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    spans = []
    start_processor = time.process_time()
    for _ in range(n_calls):
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    processor = time.process_time() - start_processor
    wall = sum(begin.elapsed_time(end) for begin, end in spans)
    del cache
    torch.cuda.empty_cache()
    return Turn(wall / n_calls, 1e3 * processor / n_calls)


def facts(device: torch.device) -> dict[str, str]:
    """Return the columns of the CSV about the machine, the versions and the time."""
    on_gpu = device.type == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "driver": (_output(*driver).partition("\n")[0] or "unknown") if on_gpu else "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        # "-dirty" if the checkout has changed since; "" without git
        "commit": _output("git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=9"),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
