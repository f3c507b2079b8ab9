"""Launch every kernel through the ops on a driver that runs nothing; see cuda_stub.c.

    FASTRAG_STUB_ARCH=90 FASTRAG_STUB_LOG=file python -m tests.kernels.stubbed

Everything up to the GPU is the real thing: Triton compiles for the architecture, its launcher is
built and called, descriptors are encoded. The tensors are on the CPU, whose addresses the driver
does not look behind; so all results are what the memory happened to hold.
"""

from __future__ import annotations

import os
import sys

import torch


def main() -> int:
    # Here, so that what collects tests may import this file where there is no triton.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from benchmarks.gpu import cases
    from fastrag.ops import backends, triton_mips

    arch = int(os.environ["FASTRAG_STUB_ARCH"])

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(StubDriver())
    # Which only asks whether kernels may have tensors on a CPU.
    backends.interpreting = lambda: True
    triton_mips._has_tma = lambda device: arch >= 90
    cases.SETTLE_SECONDS = 0.0
    return max([cases.main(name) for name in cases.CASES])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
