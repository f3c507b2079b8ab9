"""The output of compute-sanitizer, and the case of benchmarks.gpu.cases that each report is about.

A report is a line "========= " and text, followed by indented details. Those of memcheck name the
access, those of racecheck both accesses:

    ========= Invalid __global__ read of size 4 bytes
    =========     at _some_kernel+0x780 in file.py:61
    ========= Error: Race reported between Write access at _some_kernel+0x150 in file.py:27
    =========     and Read access at _some_kernel+0x160 in file.py:30 [4096 hazards]

Only races in the kernels of fastrag, which are called _..._kernel, count as faults: those of a
library are its authors' business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.gpu.isolation import FAILED, PASSED, Record

CODE = 99
# An allocation for each tensor, so that the memory next to it belongs to nobody.
ENV = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_MOST = 5  # reports of a case that are kept
_DETAILS = 3
_LINE = re.compile(r"^={9}(?: (.*))?$")
# No faults: a title, a count, what racecheck cannot follow, a call to CUDA that was refused, and
# how the program ended, which is known.
_HARMLESS = re.compile(
    r"COMPUTE-SANITIZER|.*SUMMARY: |Warning: Detected overflow of tracked|Program hit |Saved "
    r"|(?:Error: )?(?:Target application|[Pp]rocess didn't terminate)"
)
_RACE = re.compile(r"\w+: (Race reported|Potential \w+ hazard)")
_OURS = re.compile(r"\b_\w+_kernel\b")
_COUNT = re.compile(r"^={9} \w+ SUMMARY: ([1-9]\d* .*)$", re.M)


def wrapper(program: str, tool: str) -> list[str]:
    """Return the beginning of a command that runs under compute-sanitizer."""
    words = [program, "--tool", tool, "--error-exitcode", str(CODE)]
    # Past its limit it stops printing, and whatever follows would look sound.
    words += ["--print-limit", "10000", "--show-backtrace", "no"]
    words += ["--target-processes", "application-only"]
    if tool == "memcheck":
        words += ["--report-api-errors", "no"]  # torch makes calls that may be refused
    return words


def reports(said: str) -> list[str]:
    """Return the faults that the tool found, each with its first details, in lines."""
    found: list[list[str]] = []
    for line in said.splitlines():
        match = _LINE.match(line.rstrip())
        text = (match[1] or "") if match else ""
        if text.startswith(" "):
            if found:
                found[-1].append(text.strip())
        elif text:
            found.append([text])
    return ["\n".join(lines[: 1 + _DETAILS]) for lines in found if _is_fault("\n".join(lines))]


def _is_fault(report: str) -> bool:
    if _HARMLESS.match(report):
        return False
    return not _RACE.match(report) or bool(_OURS.search(report))


def attribute(records: Iterable[Record], said: str) -> list[Record]:
    """Return the records with the reports printed after each name, which make a case fail."""
    return [_with_reports(record, said) for record in records]


def _with_reports(record: Record, said: str) -> Record:
    part = re.search(rf"^case: {re.escape(record.name)}\n(.*?)(?=^case: |\Z)", said, re.M | re.S)
    found = reports(part[1]) if part else []
    if not found or record.outcome not in (PASSED, FAILED):
        return record
    # First, since they say where; CUDA only says that there was a fault.
    text = "\n".join([*found[:_MOST], *([record.text] if record.text else [])])
    return replace(record, outcome=FAILED, text=text)


def unexplained(records: Iterable[Record], said: str) -> str:
    """Return what the tool counted although no case failed, "" if nothing."""
    if any(record.bad for record in records):
        return ""
    counts = _COUNT.findall(said)
    return f"counted, but not in our kernels: {', '.join(counts)}" if counts else ""
