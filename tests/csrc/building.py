"""The driver: the sources of the extension that need no Python, and what calls them."""

from __future__ import annotations

import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-pthread"]


def sources(bound: bool) -> list[Path]:
    """The sources of the extension, those that bind it to Python or the others."""
    found = sorted((ROOT / "csrc").glob("*.cpp"))
    return [path for path in found if ("pybind11" in path.read_text()) == bound]


def source_flags(machine: str) -> dict[str, list[str]]:
    """What setup.py compiles single sources with, by their names, on such a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))["SOURCE_FLAGS"].get(machine, {})


def build_driver(folder: Path, compiler: str, machine: str, flags: list[str]) -> Path:
    flags_of = source_flags(machine)

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, *flags, *flags_of.get(source.stem, []), f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, "-c", source, "-o", output], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        own = Path(__file__).parent.glob("*.cpp")
        objects = list(pool.map(compile_one, [*sources(bound=False), *own]))
    program = folder / "driver"
    subprocess.run([compiler, *FLAGS, *flags, *objects, "-o", program], check=True)
    return program
