"""The record of a run in its folder: settings, versions, device and git state."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrag.folders import replacing

if TYPE_CHECKING:
    from fastrag.train.config import RagConfig

CONFIG_FILE = "config.yaml"
INDEX_FOLDER = "index"
MODEL_FOLDER = "model"
VERSIONS_FILE = "versions.json"
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "tokenizers",
    "triton",
    "peft",
    "datasets",
    "faiss-cpu",
)


def versions() -> dict[str, Any]:
    """Return the versions, the device and the git state that a result depends on.

    Returns:
        `fastrag`, `python`, `platform`, `packages`, `device`, `threads`, `command`, and `git`
        (None when the working directory is no git tree).

    Example:
        >>> sorted(versions())[:3]
        ['command', 'device', 'fastrag']
    """
    from fastrag import __version__

    return {
        "fastrag": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "command": list(sys.argv),
        "git": git_state(),
    }


def git_state(folder: str | os.PathLike[str] = ".") -> dict[str, Any] | None:
    """Return the commit of a git tree and whether files differ from it.

    Args:
        folder: any folder of the tree.

    Returns:
        `commit` and `dirty`, or None when git or the tree is missing.

    Example:
        >>> git_state("/") is None
        True
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}


def write_record(run: str | os.PathLike[str], config: RagConfig | None) -> None:
    """Write versions and settings into a run folder, which is created if it is missing.

    Args:
        run: the run folder.
        config: the settings; None: write the versions alone.
    """
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / VERSIONS_FILE) as temporary:
        temporary.write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
    if config is not None:
        config.save(folder / CONFIG_FILE)


def _git(folder: str | os.PathLike[str], *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), *command],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
