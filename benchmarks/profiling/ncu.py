"""Nsight Compute on the calls of one provider: the command, and a summary of what it found.

Written from NVIDIA's documentation of the command line and of the raw page: it has not been run on
hardware. A metric that a version of ncu calls otherwise is left out of the summary.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.profiling import toolkit

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
# To base units, which `export` asks for and older reports may lack; versions name them differently.
_SECONDS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3}
_SECONDS |= {"second": 1.0, "s": 1.0}
_BYTE_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


@dataclass(frozen=True)
class Kernel:
    """One launch; None where the report does not say."""

    name: str
    microseconds: float | None
    gbps: float | None  # to and from device memory
    memory: float | None  # per cent of the peak
    compute: float | None  # per cent of the peak of the busiest pipeline
    occupancy: float | None  # per cent of the warps that a multiprocessor could hold
    registers: float | None
    stalls: tuple[tuple[str, float], ...]  # reason, warps waiting for it whenever one issues


def why_not() -> str:
    """Returns why ncu cannot run here, "" if it can."""
    if toolkit.find("ncu") is None:
        return "ncu is not installed: it is part of NVIDIA Nsight Compute (in the CUDA toolkit)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device for ncu to measure"
    return ""


def command(report: Path, loop: Sequence[str], kernels: str) -> list[str]:
    """Returns the command that measures the kernels of `loop` that match, at clocks as they are.

    `loop` itself says, with cudaProfilerStart, when its calls are warm.
    """
    options = ["--clock-control", "none", "--nvtx", "--profile-from-start", "off"]
    options += ["--set", "full", "-k", f"regex:{kernels}", "--force-overwrite", "-o", str(report)]
    return [toolkit.find("ncu") or "ncu", *options, *loop]


def export(report: Path) -> list[str]:
    """Returns the command that prints the report for `read`."""
    tool, options = toolkit.find("ncu") or "ncu", ["--csv", "--page", "raw"]
    return [tool, "--import", f"{report}.ncu-rep", *options, "--print-units", "base"]


def read(text: str) -> list[Kernel]:
    """Reads the raw page as CSV: names of columns, a line of their units, a line for each launch.

    Raises:
        ValueError: there is no such table.
    """
    # Lines of its own, "==PROF== ...", may come before.
    start = text.find('"ID"')
    lines = list(csv.reader(io.StringIO(text[start:]))) if start >= 0 else []
    if len(lines) < 2 or "Kernel Name" not in lines[0]:
        raise ValueError(f"ncu: expected a table of the raw page, got {text[:80]!r}")
    names, units, *launches = lines
    unit_of = dict(zip(names, units, strict=False))
    return [_kernel(dict(zip(names, line, strict=False)), unit_of) for line in launches if line]


def _kernel(values: dict[str, str], units: dict[str, str]) -> Kernel:
    def number(metric: str) -> float | None:
        try:
            return float(values.get(metric, "").replace(",", ""))
        except ValueError:
            return None

    def scaled(metric: str, scales: dict[str, float]) -> float | None:
        found, scale = number(metric), scales.get(units.get(metric, ""))
        return None if found is None or scale is None else found * scale

    seconds = scaled(_TIME, _SECONDS)
    moved = [scaled(metric, _BYTE_UNITS) for metric in _BYTES]
    known = [n for n in moved if n is not None]
    stalls = []
    for metric in values:
        ratio, reason = number(metric), metric.removeprefix(_STALL[0]).removesuffix(_STALL[1])
        whole = metric == _STALL[0] + reason + _STALL[1]
        if whole and ratio and reason != _NO_STALL[0] and not reason.endswith(_NO_STALL[1]):
            stalls.append((reason, ratio))
    return Kernel(
        name=values["Kernel Name"],
        microseconds=None if seconds is None else 1e6 * seconds,
        gbps=sum(known) / seconds / 1e9 if seconds and len(known) == len(moved) else None,
        memory=number(_MEMORY),
        compute=number(_COMPUTE),
        occupancy=number(_OCCUPANCY),
        registers=number(_REGISTERS),
        stalls=tuple(sorted(stalls, key=lambda stall: -stall[1])[:_N_STALLS]),
    )


def table(kernels: Sequence[Kernel]) -> str:
    """Launches in their order."""
    heads = ("us", "GB/s", "mem %", "SM %", "occ %", "regs")
    width = max([len(kernel.name[:40]) for kernel in kernels], default=6)
    lines = [f"{'kernel':{width}}" + "".join(f"{head:>9}" for head in heads) + "  stalls"]
    for k in kernels:
        numbers = (k.microseconds, k.gbps, k.memory, k.compute, k.occupancy, k.registers)
        cells = "".join("        ?" if n is None else f"{n:9.4g}" for n in numbers)
        waits = ", ".join(f"{reason} {ratio:.2g}" for reason, ratio in k.stalls)
        lines.append(f"{k.name[:40]:{width}}{cells}  {waits}")
    return "\n".join(lines)
