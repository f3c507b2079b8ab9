"""Which sources the extension module was built from. setup.py runs this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """A hash of the C++ files in the folder, by name and content; "" if there are none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16] if files else ""
