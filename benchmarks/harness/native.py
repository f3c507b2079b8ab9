"""Programs made of the C++ sources without Python, compiled with the flags of setup.py."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from benchmarks import ROOT

COMPILER = "g++"


def compiler_version() -> str:
    """Return the name and version that the compiler prints, "" if there is no compiler."""
    if shutil.which(COMPILER) is None:
        return ""
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


def sources(bound: bool = False) -> list[Path]:
    """Return the sources of the extension that need no Python, or those that bind it to Python."""
    found = sorted((ROOT / "csrc").rglob("*.cpp"))
    return [path for path in found if ("pybind11" in path.read_text(encoding="utf-8")) == bound]


def build(
    folder: Path,
    files: Sequence[Path],
    flags: Sequence[str],
    compiler: str = COMPILER,
    machine: str = platform.machine(),
) -> Path:
    """Build a program of the files, named like the first one.

    Each file is compiled with `flags` and those that it has in a wheel for `machine`.
    """
    with mock.patch("setuptools.setup"):
        of_machine = runpy.run_path(str(ROOT / "setup.py"))["SOURCE_FLAGS"].get(machine, {})

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        command = [compiler, *flags, *of_machine.get(source.stem, []), f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-c", str(source), "-o", str(output)], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, files))
    program = folder / files[0].stem
    subprocess.run([compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program
