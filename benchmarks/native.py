"""Programs of the C++ sources without Python: compiled with the flags of setup.py."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from benchmarks.measure import ROOT

COMPILER = "g++"


def compiler_version() -> str:
    """The first line of what the compiler says of itself; "" if there is none."""
    if shutil.which(COMPILER) is None:
        return ""
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n")[0]


def build(folder: Path, main: Path, stems: Sequence[str], flags: Sequence[str]) -> Path:
    """Returns the program of `main` and of csrc/<stem>.cpp, each with the flags it has in a wheel
    beside those given."""
    with mock.patch("setuptools.setup"):
        of_source = runpy.run_path(str(ROOT / "setup.py"))["SOURCE_FLAGS"]

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        command = [COMPILER, *flags, *of_source.get(source.stem, []), f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-c", str(source), "-o", str(output)], check=True)
        return output

    sources = [main, *(ROOT / "csrc" / f"{stem}.cpp" for stem in stems)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / main.stem
    subprocess.run([COMPILER, *flags, *map(str, objects), "-o", str(program)], check=True)
    return program
