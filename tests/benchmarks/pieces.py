"""Pieces of work for the tests of isolation: what each does stands in the variable ACT."""

from __future__ import annotations

import json
import os
import sys
import time

import torch


def _lost() -> None:
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
        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = _lost
    if how == "raise":
        raise ValueError("no")
    return "passed", f"said by {name}"
