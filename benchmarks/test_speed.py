"""The registry under pytest-benchmark, at one small shape per operation.

    pytest benchmarks --benchmark-only -q

All providers share this process here, and nobody waits for another to settle: a look at what
changed, where `benchmarks.run` is the measurement.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="installed by the extra `bench`")

from benchmarks.harness import measure
from benchmarks.harness.arguments import DEFAULT_DTYPE
from benchmarks.harness.registry import DTYPES, Op, Provider, error_of
from benchmarks.ops import OPS
from fastrag.ops import workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = DEFAULT_DTYPE[DEVICE]


@functools.cache
def ceiling_seconds(name: str, mode: str) -> float | None:
    """Of a call of the op's ceiling, None where it cannot run."""
    op, device = OPS[name], torch.device(DEVICE)
    ceiling = op.provider(op.ceiling)
    if ceiling.why_not(DEVICE, DTYPE, mode):
        return None
    call = ceiling.call(mode, op.make(op.small, DTYPES[DTYPE], 0, device))
    n_calls = measure.calls_per_turn(call, device)
    return statistics.median(measure.one_turn(call, device, n_calls).wall for _ in range(5)) / 1e3


@pytest.mark.parametrize(
    ("op", "mode", "provider"),
    [
        pytest.param(op, mode, provider, id=f"{op.name}-{mode}-{provider.name}")
        for op in OPS.values()
        for mode in op.modes
        for provider in op.providers
    ],
)
def test_speed(benchmark: Any, op: Op, mode: str, provider: Provider) -> None:
    reason = provider.why_not(DEVICE, DTYPE, mode)
    if reason:
        pytest.skip(f"{provider.name}: {reason}")
    device = torch.device(DEVICE)
    wrong = error_of(op, provider, mode, op.checked[0], DTYPE, device)
    assert not wrong, f"{provider.name}: {wrong}"
    call = provider.call(mode, op.make(op.small, DTYPES[DTYPE], 0, device))

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if provider.compiles:
        call()
    workspace.release()  # another provider of this process may have left it
    extra = measure.extra_bytes(call, device)
    benchmark.group = f"{op.name} {mode} {','.join(map(str, op.small))} {DTYPE}"
    n_calls = measure.calls_per_turn(call, device)
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1, iterations=n_calls)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["peak_mib"] = None if extra is None else extra / 2**20
    itemsize = DTYPES[DTYPE].itemsize
    benchmark.extra_info["gbps"] = op.bytes(mode, op.small, itemsize) / seconds / 1e9
    benchmark.extra_info["tflops"] = op.flops(mode, op.small) / seconds / 1e12
    ceiling = ceiling_seconds(op.name, mode)
    percent = None if ceiling is None else 100 * ceiling / seconds
    benchmark.extra_info[f"percent_of_{op.ceiling}"] = percent
