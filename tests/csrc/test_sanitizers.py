"""The C++ without Python, compiled with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness import native

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
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread", *SANITIZERS[request.param]]
    own = Path(__file__).parent.glob("*.cpp")
    return request.param, native.build(folder, [*own, *native.sources()], flags)


@pytest.mark.parametrize(
    "what", ["shapes", "widen", "passes", "digits", "threads", "fork", "gather"]
)
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
