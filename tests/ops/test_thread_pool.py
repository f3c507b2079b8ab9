"""Where the helpers of the C++ kernels run and how they round; csrc/pool/thread_pool.cpp."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")

# Prints what the thread of the loop may use, before and after, and what each other thread may.
PROGRAM = """
import os, sys
import numpy as np
from fastrag import _C

def may_use(thread):
    return sorted(os.sched_getaffinity(int(thread)))

os.sched_setaffinity(0, [int(cpu) for cpu in sys.argv[2].split(",")])
before, there = may_use(0), set(os.listdir("/proc/self/task"))
for _ in range(3):
    _C.read_loop(np.ones(1 << 23, np.int8), threads=int(sys.argv[1]))
helpers = set(os.listdir("/proc/self/task")) - there
print(before, may_use(0), *(may_use(helper) for helper in helpers), sep=";")
"""


def masks(n_threads: int, cpus: list[int]) -> list[list[int]]:
    told = [str(n_threads), ",".join(map(str, cpus))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *told], capture_output=True, text=True, check=True
    )
    return [[int(cpu) for cpu in mask[1:-1].split(",")] for mask in done.stdout.strip().split(";")]


@on_linux
def test_a_helper_keeps_off_the_processor_of_its_caller() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("one processor")
    before, after, helper = masks(2, cpus)
    assert before == after == cpus  # the caller's are its own affair
    assert len(helper) == 1
    assert helper[0] in cpus


@on_linux
@pytest.mark.parametrize("n_cpus", [1, 2])
def test_more_helpers_than_processors_share_them_all(n_cpus: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:n_cpus]
    before, after, *helpers = masks(3, cpus)
    assert before == after == cpus
    assert helpers == [cpus, cpus]


@pytest.fixture
def the_usual_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)
    ctypes.CDLL(None).fesetround(0)


def scores_of(query: Tensor, index: Tensor, n_threads: int) -> Tensor:
    scores, rows = torch.full((len(query), 3), torch.nan), torch.full((len(query), 3), -7)
    _C.mips_topk(query.numpy(), index.numpy(), scores.numpy(), rows.numpy(), threads=n_threads)
    return scores


@pytest.mark.usefixtures("the_usual_mode")
def test_denormals_are_flushed_where_the_caller_flushes_them() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    torch.set_flush_denormal(False)
    query, index = 1e-20 * torch.rand(256, 16), 1e-20 * torch.rand(100_000, 16)
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        found = [scores_of(query, index, n_threads) for n_threads in (1, 2, 3, 2)]
        torch.set_flush_denormal(False)
        for scores in found:
            assert torch.equal(scores, found[0])
            assert (scores == 0).all() if flush else (scores > 1e-41).all()


@pytest.mark.usefixtures("the_usual_mode")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="modes have other numbers elsewhere")
def test_scores_are_rounded_as_the_caller_rounds() -> None:
    query, index = torch.rand(256, 16), torch.rand(100_000, 16)
    found = {}
    for mode in (0, 0x400, 0x800):  # to nearest, down, up
        ctypes.CDLL(None).fesetround(mode)
        found[mode] = [scores_of(query, index, n_threads) for n_threads in (1, 2, 3, 2)]
        ctypes.CDLL(None).fesetround(0)
        assert all(torch.equal(scores, found[mode][0]) for scores in found[mode])
    assert (found[0x400][0] < found[0x800][0]).all()
