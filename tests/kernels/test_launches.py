"""What comes before the GPU, without one: compilation by the launch, arguments, grids, memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("cuda_stub.c")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not (INCLUDE / "cuda.h").exists():
        pytest.skip("needs a C compiler and the headers that come with triton")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Werror", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, str(STUB), "-o", str(library)], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90])
def test_every_kernel_is_launched(arch: int, driver: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"FASTRAG_STUB_ARCH": str(arch), "FASTRAG_STUB_LOG": str(log)}
    env |= {"TRITON_LIBCUDA_PATH": str(driver), "LD_LIBRARY_PATH": str(driver)}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.kernels.stubbed"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = log.read_text()
    assert "refused" not in said
    launched = set(re.findall(r"^launch (\w+) ", said, re.M))
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (_\w+_kernel)\(", text, re.M)}
    assert launched == kernels
    assert ("descriptor" in said) == (arch >= 90)


@pytest.mark.parametrize(
    ("major", "minor", "shared_kib", "able"),
    [(8, 0, 163, False), (9, 0, 227, True), (10, 0, 227, True), (12, 0, 99, False)],
)
def test_descriptors_need_the_memory_of_their_tiles(
    major: int, minor: int, shared_kib: int, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer GPU of compute capability 12 reads by pointers, whose tiles take less."""
    from fastrag.ops import backends, triton_mips

    found = SimpleNamespace(
        major=major, minor=minor, shared_memory_per_block_optin=shared_kib << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    assert triton_mips._has_tma(torch.device("cuda")) is able
