"""Programs of the CUDA toolkit, which are often beside the path rather than on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Nsight Compute has a folder of its own, for each version one.
_NSIGHT = Path("/opt/nvidia/nsight-compute")


def find(name: str) -> str | None:
    """The program on the path, beside nvcc, in the toolkit's folder, or of the newest Nsight."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside = shutil.which("nvcc")
    if beside:
        homes.insert(0, str(Path(beside).resolve().parents[1]))
    folders = [f"{home}/bin" for home in homes if home]
    folders += map(str, sorted(_NSIGHT.glob("*"), key=_version, reverse=True))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _version(folder: Path) -> list[int]:
    return [int(part) for part in folder.name.split(".") if part.isdigit()]
