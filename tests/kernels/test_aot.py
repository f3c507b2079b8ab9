"""Every shipped configuration compiles without spilling, within the shared memory of its GPU.

Compiled in processes of their own: a kernel decorated under TRITON_INTERPRET cannot be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(arch: int) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastrag.kernels.aot", "--arch", str(arch), "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def check(arch: int) -> None:
    done = compiled(arch)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {arch}
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) >= 100
    for kernel in ("_fwd", "_dquery", "_dpassage"):
        assert any(name.startswith(f"_doc_scores{kernel}_kernel") for name in names)
    for kernel in ("row_statistics", "row_gradient", "mixture_statistics", "mixture_gradient"):
        assert any(name.startswith(f"_{kernel}_kernel") for name in names)
    for kernel in ("token_group", "sequence_posterior", "linear_logp", "group_max", "rescore"):
        assert any(name.startswith(f"_{kernel}_kernel") for name in names)
    product = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05"}[arch]
    for row in rows:
        if row["name"].startswith(("_linear_logp_kernel[bf16", "_linear_logp_kernel[fp16")):
            assert product in row["instructions"], row["name"]
    for row in rows:
        if row["name"].startswith("_group_max_kernel["):
            assert product in row["instructions"], row["name"]
        if row["name"].startswith(("_rescore_kernel[", "_rest_kernel[")):
            # Tensor cores add in an order of their own.
            assert not {"wgmma", "mma.sync", "tcgen05"} & set(row["instructions"]), row["name"]
    limit = {80: 163, 86: 99, 90: 227, 100: 227}[arch] * 1024
    assert all(row["stack"] == 0 and row["shared"] <= limit for row in rows)
    assert all(0 < row["registers"] <= 255 and 0 < row["occupancy"] <= 1 for row in rows)


def test_sm_90() -> None:
    check(90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 100])
def test_other_architectures(arch: int) -> None:
    check(arch)


def test_a_spill_is_a_defect() -> None:
    from fastrag.kernels.aot import Resources

    fit = Resources("k", 86, 4, registers=64, stack=0, shared=99 << 10, instructions=())
    assert fit.defects() == []
    spilling = Resources("k", 86, 4, registers=255, stack=8, shared=0, instructions=())
    assert spilling.defects() == ["k on sm_86 spills 8 bytes a thread"]
    large = Resources("k", 86, 4, registers=64, stack=0, shared=(99 << 10) + 1, instructions=())
    assert "wants 101377 bytes of shared memory, the limit is 101376" in large.defects()[0]
