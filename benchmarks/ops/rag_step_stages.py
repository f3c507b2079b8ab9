"""A training step with a clock in it: the milliseconds of each stage.

fastrag's stages are its own (`fastrag.profiling`). Those of Hugging Face are put around its parts.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness.timing import Case
from benchmarks.ops.rag_step_models import HfStep
from fastrag import profiling

STAGES = (
    *("encode_questions", "search", "score", "contexts"),
    *("generator", "loss", "backward", "optimizer"),
)
REST, WHOLE = "rest", "whole"


class Clock:
    """Adds up the time spent in each stage, without that of the stages opened within it.

    Stages that are not in STAGES are parts of one, and count for the stage around them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def now(self) -> float:
        """Return milliseconds, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def _switch(self) -> None:
        now = self.now()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if name not in STAGES:
            yield
            return
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()


class StageTimes:
    """Takes turns of the stages of one provider's step, which is warm."""

    extra, seconds = None, 0.0

    def __init__(self, case: Case) -> None:
        self.step = case.entry[1].prepare(case.mode, case.problem())
        self.clock = Clock(torch.device(case.device))
        self.step.stage = self.clock.stage
        if isinstance(self.step, HfStep):
            _watch(self.step, self.clock)
        else:
            profiling.set_ranges(self.clock.stage)
        self.step()

    def turn(self) -> dict[str, float]:
        """Return the milliseconds of each stage that was entered, of the rest and of the whole."""
        self.clock.spent.clear()
        start = self.clock.now()
        self.step()
        whole = self.clock.now() - start
        spent = dict(self.clock.spent)
        return spent | {REST: whole - sum(spent.values()), WHOLE: whole}


def _watch(step: HfStep, clock: Clock) -> None:
    """Put stages around the parts of a Hugging Face model."""

    def around(owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with clock.stage(stage):
                return inner(*args, **kwargs)

        setattr(owner, name, timed)

    rag = step.model.rag
    around(rag.question_encoder, "forward", "encode_questions")
    around(rag.generator, "forward", "generator")
    around(rag.generator.lm_head, "forward", "loss")
    around(step.model, "get_nll", "loss")
    if rag.retriever is not None:
        around(rag.retriever, "retrieve", "search")
        around(rag.retriever.index, "get_doc_dicts", "contexts")
        around(rag, "retriever", "contexts")
