"""Nsight Compute on the calls of one provider: the command, and a summary of its report.

Written from NVIDIA's documentation of the command line and of the raw page: it has not been run on
hardware. A metric that a version of ncu calls otherwise is left out of the summary.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_TIME = "gpu__time_duration.sum"
_BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_MEMORY = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
_OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
_REGISTERS = "launch__registers_per_thread"
_STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")
_N_STALLS = 3
# Of the same family: warps that issue, and the same reasons again, counted where none issues.
_NO_STALL = ("selected", "_not_issued")
# Nsight Compute has a folder of its own, with one folder for each version.
_NSIGHT = Path("/opt/nvidia/nsight-compute")


def find(name: str) -> str | None:
    """Return a program of the CUDA toolkit, which is often not on the path.

    Looks next to nvcc, in the toolkit's folder, and in that of the newest Nsight Compute as well.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(0, str(Path(nvcc).resolve().parents[1]))
    folders = [f"{home}/bin" for home in homes if home]
    folders += map(str, sorted(_NSIGHT.glob("*"), key=_version, reverse=True))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _version(folder: Path) -> list[int]:
    return [int(part) for part in folder.name.split(".") if part.isdigit()]


def why_not() -> str:
    """Return the reason why ncu cannot run here, "" if it can."""
    if find("ncu") is None:
        return "ncu is not installed: it is part of NVIDIA Nsight Compute (in the CUDA toolkit)"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device for ncu to measure"


def command(report: Path, loop: Sequence[str], kernels: str) -> list[str]:
    """Return the command that measures the matching kernels of `loop`, without setting clocks.

    `loop` itself says, with cudaProfilerStart, when its calls are warm.
    """
    options = ["--clock-control", "none", "--nvtx", "--profile-from-start", "off"]
    options += ["--set", "full", "-k", f"regex:{kernels}", "--force-overwrite", "-o", str(report)]
    return [find("ncu") or "ncu", *options, *loop]


def export(report: Path) -> list[str]:
    """Return the command that prints the report for `read`, in nanoseconds and bytes."""
    options = ["--csv", "--page", "raw", "--print-units", "base"]
    return [find("ncu") or "ncu", "--import", f"{report}.ncu-rep", *options]


@dataclass(frozen=True)
class Kernel:
    """One launch; None if the report lacks the number."""

    name: str
    microseconds: float | None
    gbps: float | None  # to and from device memory
    memory: float | None  # per cent of the peak
    compute: float | None  # per cent of the peak of the busiest pipeline
    occupancy: float | None  # per cent of the warps that a multiprocessor could hold
    registers: float | None
    stalls: tuple[tuple[str, float], ...]  # reason, warps waiting for it whenever one issues


def read(text: str) -> list[Kernel]:
    """Read the raw page as CSV: names of columns, a line of their units, a line for each launch.

    Raises:
        ValueError: there is no such table.
    """
    # Lines of ncu's own, "==PROF== ...", may come before.
    start = text.find('"ID"')
    lines = list(csv.DictReader(io.StringIO(text[start:]))) if start >= 0 else []
    if not lines or "Kernel Name" not in lines[0]:
        raise ValueError(f"ncu: expected a table of the raw page, got {text[:80]!r}")
    return [_kernel(launch) for launch in lines[1:]]


def _kernel(values: dict[str, str]) -> Kernel:
    def number(metric: str) -> float | None:
        try:
            return float(values.get(metric, "").replace(",", ""))
        except ValueError:
            return None

    time, moved, stalls = number(_TIME), [number(metric) for metric in _BYTES], []
    for metric in values:
        ratio, reason = number(metric), metric.removeprefix(_STALL[0]).removesuffix(_STALL[1])
        whole = metric == _STALL[0] + reason + _STALL[1]
        if whole and ratio and reason != _NO_STALL[0] and not reason.endswith(_NO_STALL[1]):
            stalls.append((reason, ratio))
    return Kernel(
        name=values["Kernel Name"],
        microseconds=None if time is None else time / 1e3,
        # bytes in a nanosecond
        gbps=None if not time or None in moved else sum(n or 0.0 for n in moved) / time,
        memory=number(_MEMORY),
        compute=number(_COMPUTE),
        occupancy=number(_OCCUPANCY),
        registers=number(_REGISTERS),
        stalls=tuple(sorted(stalls, key=lambda stall: -stall[1])[:_N_STALLS]),
    )


def table(kernels: Sequence[Kernel]) -> str:
    """Return a line for each launch, in their order."""
    heads = ("us", "GB/s", "mem %", "SM %", "occ %", "regs")
    width = max([len(kernel.name[:40]) for kernel in kernels], default=6)
    lines = [f"{'kernel':{width}}" + "".join(f"{head:>9}" for head in heads) + "  stalls"]
    for k in kernels:
        numbers = (k.microseconds, k.gbps, k.memory, k.compute, k.occupancy, k.registers)
        cells = "".join("        ?" if n is None else f"{n:9.4g}" for n in numbers)
        waits = ", ".join(f"{reason} {ratio:.2g}" for reason, ratio in k.stalls)
        lines.append(f"{k.name[:40]:{width}}{cells}  {waits}")
    return "\n".join(lines)
