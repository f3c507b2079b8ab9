"""The C++ of the index without Python, compiled with sanitizers."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["row_pass", "row_pass_scalar", "row_pass_avx2", "row_pass_avx512", "thread_pool"]
SOURCES += ["gather", "mips", "mips_scalar", "mips_avx2", "mips_avx512"]
SOURCES += ["mips_digits", "mips_digits_scalar", "mips_digits_avx2", "mips_digits_vnni"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++"),
]


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The name of the sanitizer, and the program."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread"]
    flags += SANITIZERS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        flags_of = runpy.run_path(str(ROOT / "setup.py"))["SOURCE_FLAGS"]

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        command = ["g++", *flags, *flags_of.get(source.stem, []), f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-c", source, "-o", output], check=True)
        return output

    sources = [ROOT / "csrc" / f"{name}.cpp" for name in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, Path(__file__).with_name("driver.cpp")]))
    program = folder / "driver"
    subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
    return request.param, program


@pytest.mark.parametrize("what", ["shapes", "threads", "fork", "gather"])
def test_driver(driver: tuple[str, Path], what: str) -> None:
    name, program = driver
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}
    # its own allocator may be preloaded where Python runs, and hides errors
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [program, what], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{name}: {done.stderr}"
    assert done.stdout == f"{what}: good\n"
