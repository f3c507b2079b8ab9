"""Pieces of work for the tests of isolation: the variable ACT says what each does."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any


def _fault() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def act(name: str) -> tuple[str, str]:
    how = json.loads(os.environ["ACT"]).get(name, "")
    sys.stdout.write(f"doing {name}\n")
    sys.stdout.flush()
    if how == "crash":
        os._exit(139)
    if how == "hang":
        time.sleep(60)
    if how == "lost":
        cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=_fault)
        modules: dict[str, Any] = sys.modules
        modules["torch"] = SimpleNamespace(cuda=cuda)
    if how == "raise":
        raise ValueError("no")
    return "passed", f"said by {name}"
