"""The kernels for ARM, compiled for it and run by an emulator. Debian has both that this takes:
g++-aarch64-linux-gnu and qemu-user."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

from benchmarks import ROOT
from benchmarks.harness import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror"]
# One processor with the products of bytes of ARMv8.2, and one of before.
PROCESSORS = {"max": "dotprod neon scalar amx-emulated", "cortex-a72": "neon scalar amx-emulated"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no {COMPILER}"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aarch64")
    own, flags = Path(__file__).parent.glob("*.cpp"), [*FLAGS, "-O2", "-static"]
    return native.build(folder, [*own, *native.sources()], flags, COMPILER, "aarch64")


def run(driver: Path, processor: str, what: str) -> str:
    if not shutil.which(EMULATOR):
        pytest.skip(f"there is no {EMULATOR}")
    done = subprocess.run(
        [EMULATOR, "-cpu", processor, driver, what], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_processor_decides(driver: Path, processor: str) -> None:
    assert run(driver, processor, "isas") == PROCESSORS[processor]


@pytest.mark.parametrize("what", ["shapes", "widen", "passes", "digits"])
def test_same_bits_as_scalar(driver: Path, what: str) -> None:
    assert run(driver, "max", what) == f"{what}: good"


def test_the_best_of_an_old_processor(driver: Path) -> None:
    assert run(driver, "cortex-a72", "threads") == "threads: good"


@pytest.mark.parametrize("source", native.sources(bound=True), ids=lambda path: path.stem)
def test_bindings_compile(source: Path) -> None:
    """With the headers of this machine's Python: both machines have the same types."""
    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not all((Path(folder) / "Python.h").exists() for folder in headers):
        pytest.skip("there are no headers of Python")
    folders = [f"-I{ROOT / 'csrc'}", f"-isystem{pybind11.get_include()}"]
    folders += [f"-isystem{folder}" for folder in headers]
    command = [COMPILER, *FLAGS, "-fvisibility=hidden", "-fsyntax-only", *folders, source]
    subprocess.run(command, check=True)
