"""Named ranges around the stages of a step, for the timelines of torch.profiler and Nsight.

Off unless asked for: by the environment variable `FASTRAG_RANGES` (`torch` or `nvtx`), read when
this module is imported, or by `set_ranges`. docs/profiling.md lists the stages.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

RANGES_VARIABLE = "FASTRAG_RANGES"
# By which a timeline, which holds much else, can be searched for stages.
PREFIX = "fastrag/"

Factory = Callable[[str], AbstractContextManager[Any]]

# torch.compile knows this class; of a quicker one of our own it would say that it cannot enter it.
_NOTHING = contextlib.nullcontext()
_factory: Factory | None = None


def stage(name: str) -> AbstractContextManager[Any]:
    """Marks what runs within it as the stage `name`, a path such as `marginal_nll/logits`.

    Some 0.1 microseconds while ranges are off. A graph of torch.compile has no stages.

    Args:
        name: the same each time, so that a profiler can add up.

    Returns:
        A context manager.

    Example:
        >>> from fastrag.profiling import stage
        >>> with stage("rerank"):
        ...     total = sum(range(10))
    """
    if _factory is None or torch.compiler.is_compiling():
        return _NOTHING
    return _factory(name)


def set_ranges(factory: Factory | str | None) -> None:
    """Chooses what a stage opens, from now on and in all threads.

    Args:
        factory: `"torch"`, a `torch.profiler.record_function`; `"nvtx"`, a range of
            `torch.cuda.nvtx`; both named `fastrag/` and the stage. Or a function from the stage's
            name to a context manager. None: nothing, which is the default.

    Raises:
        ValueError: another word.

    Example:
        >>> import contextlib
        >>> from fastrag.profiling import set_ranges, stage
        >>> @contextlib.contextmanager
        ... def shout(name):
        ...     print("begin", name)
        ...     yield
        >>> set_ranges(shout)
        >>> with stage("rerank"):
        ...     pass
        begin rerank
        >>> set_ranges(None)
    """
    global _factory
    _factory = _named(factory, "factory") if isinstance(factory, str) else factory


def _named(word: str, source: str) -> Factory:
    found = {"torch": _torch_range, "nvtx": _nvtx_range}.get(word)
    if found is None:
        raise ValueError(f"{source}: expected 'nvtx' or 'torch', got {word!r}")
    return found


def _torch_range(name: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(PREFIX + name)


def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    return torch.cuda.nvtx.range(PREFIX + name)


def _from_environment() -> Factory | None:
    word = os.environ.get(RANGES_VARIABLE, "")
    return _named(word, RANGES_VARIABLE) if word else None


_factory = _from_environment()
