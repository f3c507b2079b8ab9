"""Where the helpers of the C++ kernels run; csrc/thread_pool.cpp."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("fastrag._C", reason="the extension module is not built")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")

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


def test_a_helper_keeps_off_the_processor_of_its_caller() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("one processor")
    before, after, helper = masks(2, cpus)
    assert before == after == cpus  # the caller's are its own affair
    assert len(helper) == 1
    assert helper[0] in cpus


@pytest.mark.parametrize("n_cpus", [1, 2])
def test_more_helpers_than_processors_share_them_all(n_cpus: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:n_cpus]
    before, after, *helpers = masks(3, cpus)
    assert before == after == cpus
    assert helpers == [cpus, cpus]
