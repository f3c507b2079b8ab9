"""Forked children of the test process, which act and may be killed at a named step of a save."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable

import torch

from fastrag import folders


def in_child(act: Callable[[], object], at_step: Callable[[str, str], object]) -> int:
    """Act in a fork of this process, which calls `at_step` at each step of a save; its status."""
    child = os.fork()
    if child == 0:
        try:
            gc.freeze()  # a collection would walk, and copy, all that the parent has
            torch.set_num_threads(1)
            folders.step = lambda name, path: at_step(name, str(path))
            act()
        except BaseException as error:
            sys.__stderr__.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
