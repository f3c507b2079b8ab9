"""Every shipped configuration compiles without spilling, within the shared memory of its GPU.

They are compiled in other processes, since a kernel decorated under TRITON_INTERPRET cannot be.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")


KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.py"))}
# The kernels of each module that offers configurations.
MODULES = {
    name: set(re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE))
    for name, text in SOURCES.items()
    if "\ndef aot_configs(" in text
}


def check(arch: int, modules: Iterable[str], *options: str) -> int:
    """Compiles configurations of kernels of `modules`; returns how many."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastrag.kernels.aot", "--arch", str(arch), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {arch}
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert {name.split("[")[0] for name in names} == set().union(*map(MODULES.get, modules))
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
    return len(rows)


@pytest.mark.parametrize("module", MODULES)
def test_every_choice(module: str) -> None:
    """Every dtype, flag and block size, though not with every other."""
    assert check(90, [module], "--module", module, "--sample") >= 6


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90, 100])
def test_every_configuration(arch: int) -> None:
    assert check(arch, MODULES) >= 250


def test_a_sample_shows_every_choice() -> None:
    from fastrag.kernels.aot import AotConfig, sample

    kernel = SimpleNamespace(fn=test_a_sample_shows_every_choice)
    every = [
        AotConfig(kernel, {"x_ptr": dtype}, {"FLAG": flag, "BLOCK": block})
        for dtype in ("*fp32", "*bf16")
        for flag in (False, True)
        for block in (16, 32, 64)
    ]
    chosen = [(*c.types.values(), *c.constants.values()) for c in sample(every)]
    assert chosen == [
        ("*fp32", False, 16),
        ("*fp32", False, 32),
        ("*fp32", False, 64),
        ("*fp32", True, 16),
        ("*bf16", False, 16),
    ]
    wide = AotConfig(kernel, every[0].types, every[0].constants, num_warps=8)
    assert sample([*every, wide])[-1] is wide


def test_a_spill_is_a_defect() -> None:
    from fastrag.kernels.aot import Resources

    fit = Resources("k", 86, 4, registers=64, stack=0, shared=99 << 10, instructions=())
    assert fit.defects() == []
    spilling = Resources("k", 86, 4, registers=255, stack=8, shared=0, instructions=())
    assert spilling.defects() == ["k on sm_86 spills 8 bytes a thread"]
    large = Resources("k", 86, 4, registers=64, stack=0, shared=(99 << 10) + 1, instructions=())
    assert "wants 101377 bytes of shared memory, the limit is 101376" in large.defects()[0]
