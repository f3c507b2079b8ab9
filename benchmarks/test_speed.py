"""The runner under pytest-benchmark, at one small shape per operation.

    pytest benchmarks --benchmark-only -q

All providers share this process and follow each other without a pause: enough to see a change,
while `benchmarks.run` is the measurement.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="installed by the extra `bench`")

from benchmarks.harness import results
from benchmarks.harness.arguments import DEFAULT_DTYPE
from benchmarks.harness.process import Refusal
from benchmarks.harness.registry import shape_text
from benchmarks.harness.timing import Case, Timed
from benchmarks.ops import OPS
from fastrag.ops import workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case_of(op: str, mode: str, provider: str) -> Case:
    return Case(op, provider, mode, OPS[op].small, DEFAULT_DTYPE[DEVICE], DEVICE)


@functools.cache
def ceiling_ms(op: str, mode: str) -> float | None:
    """Return the time of a call of the op's ceiling, None if it cannot run."""
    try:
        timed = Timed(case_of(op, mode, OPS[op].ceiling))
    except Refusal:
        return None
    return statistics.median(timed.turn().wall for _ in range(5))


@pytest.mark.parametrize(
    ("op", "mode", "provider"),
    [(op.name, mode, name) for op in OPS.values() for mode in op.modes for name in op.names()],
)
def test_speed(benchmark: Any, op: str, mode: str, provider: str) -> None:
    case = case_of(op, mode, provider)
    if reason := case.why_not():
        pytest.skip(reason)
    workspace.release()  # another provider of this process may have left it
    timed = Timed(case)

    def call() -> None:
        timed.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {mode} {shape_text(case.shape)} {case.dtype}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1, iterations=timed.n_calls)
    ms = 1e3 * benchmark.stats.stats.median
    ceiling, found = ceiling_ms(op, mode), benchmark.extra_info
    found["peak_mib"] = None if timed.extra is None else timed.extra / results.MIB
    found["gbps"], found["tflops"] = results.rates(case, ms)
    found[f"percent_of_{OPS[op].ceiling}"] = None if ceiling is None else 100 * ceiling / ms
