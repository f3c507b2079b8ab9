"""Identify the sources of the extension module. setup.py runs this file on its own."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Return a hash of the C++ files under the folder, by path and content; "" if it has none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))
    found = hashlib.sha256()
    for path in files:
        found.update(
            path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return found.hexdigest()[:16] if files else ""
