"""Show where the time of a training step goes, stage by stage, in fastrag and in Hugging Face.

    python -m benchmarks.stages [--marginal token] [--shape 4,5,64,16,256,10000] [--csv stages.csv]

fastrag's stages are its own (`fastrag.profiling`); those of Hugging Face are put around its parts.
The head belongs to the loss on both sides. But fastrag computes the gradients of head and hidden
states inside the loss, and Hugging Face in the backward pass: compare the sum of the two.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness import results
from benchmarks.harness.arguments import Parser
from benchmarks.harness.measure import facts
from benchmarks.harness.results import Row, row_of
from benchmarks.harness.timing import OK, Case, Result, time_cases
from benchmarks.ops.rag_step import OP, HfStep
from fastrag import profiling

PROVIDERS = ("fastrag", "hf")
COLUMNS = [*results.COLUMNS, "stage"]
STAGES = ("encode_questions", "search", "score", "contexts", "generator", "loss", "backward")
STAGES += ("optimizer",)
REST, WHOLE = "rest", "whole"
Times = Mapping[str, float]  # stage -> milliseconds


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

    def turn(self) -> Times:
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
        setattr(owner, name, clock.stage(stage)(getattr(owner, name)))

    rag = step.model.rag
    around(rag.question_encoder, "forward", "encode_questions")
    around(rag.generator, "forward", "generator")
    around(rag.generator.lm_head, "forward", "loss")
    around(step.model, "get_nll", "loss")
    if rag.retriever is not None:
        around(rag.retriever, "retrieve", "search")
        around(rag.retriever.index, "get_doc_dicts", "contexts")
        around(rag, "retriever", "contexts")


def columns_of(turns: Sequence[Times]) -> dict[str, list[float]]:
    """Return the times of each stage that was entered, in the order of the stages."""
    names = [name for name in (*STAGES, REST, WHOLE) if any(name in turn for turn in turns)]
    return {name: [turn.get(name, 0.0) for turn in turns] for name in names}


def rows_of(result: Result, machine: Row) -> list[Row]:
    """Return one row for each stage, or one that says why there is none."""
    if result.status != OK:
        return [row_of(result.case, machine, result.status)]
    return [
        row_of(result.case, machine, OK, stage=name, **results.percentile_columns(times))
        for name, times in columns_of(result.turns).items()
    ]


def table(found: Sequence[Result]) -> str:
    """Return medians and shares of the whole, two columns for each provider."""
    timed = [(result.case.provider, columns_of(result.turns)) for result in found if result.turns]
    lines = [["stage", *(head for name, _ in timed for head in (f"{name} ms", "%"))]]
    for stage in (*STAGES, REST, WHOLE):
        line = [stage]
        for _, times in timed:
            ms, whole = (statistics.median(times.get(name, [0.0])) for name in (stage, WHOLE))
            line += [f"{ms:.4g}", f"{100 * ms / whole:.0f}"] if stage in times else ["", ""]
        if any(line[1:]):
            lines.append(line)
    return results.aligned(lines, n_left=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("stages", __doc__)
    parser.add_rounds()
    args, cases = parser.parse_cases(argv, OP, PROVIDERS, COLUMNS)
    machine = facts(torch.device(args.device))
    try:
        found = time_cases(cases, args.rounds, make=StageTimes)
    except KeyboardInterrupt:
        return 130
    rows = [row for result in found for row in rows_of(result, machine)]
    print(results.heading(rows[0]))
    if any(result.turns for result in found):
        print(table(found))
    bad = {result.case.provider: result.status for result in found if result.status != OK}
    for provider, status in bad.items():
        print(f"  {provider}: {status}")
    if args.csv:
        results.add(args.csv, rows, COLUMNS)
    return int("fastrag" in bad)


if __name__ == "__main__":
    # A child finds StageTimes by the name of its module, which is not the __main__ of here.
    from benchmarks.stages import main as run

    sys.exit(run())
