"""Rows of CSV: what the commands write, and what is read of it again."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ["op", "provider", "mode", "dtype", "shape", "ms_p50", "ms_p20", "ms_p80", "peak_mib"]
COLUMNS += ["gbps", "tflops", "device", "driver", "threads", "torch", "triton", "commit", "date"]
COLUMNS += ["status"]
MIB = 1 << 20
Row = dict[str, str]


def shape_text(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def row_of(case: Any, facts: Mapping[str, str], status: str, **values: str) -> Row:
    """Return the row of a `timing.Case`; what was not measured is empty.

    `values` may name columns that only some commands have.
    """
    row = dict.fromkeys(COLUMNS, "") | {"op": case.op, "provider": case.provider}
    row |= {"mode": case.mode, "dtype": case.dtype, "shape": shape_text(case.shape)}
    return {**row, "status": status, **facts, **values}


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Write a file, replacing what is there."""
    path.unlink(missing_ok=True)
    add(path, rows, columns)


def add(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to those in the file: a measurement is never lost to the next one."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)
