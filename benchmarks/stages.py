"""Where the time of a training step goes, stage by stage, in fastrag and in Hugging Face.

    python -m benchmarks.stages [--marginal token] [--shape 4,5,64,16,256,10000] [--csv stages.csv]

fastrag's stages are its own (`fastrag.profiling`). Hugging Face's are put around its parts: the
question encoder, the retriever's search and its making of contexts, the generator, the loss. The
head belongs to the loss on both sides. But fastrag makes the gradients of head and hidden states
inside the loss, where Hugging Face makes them in the backward pass: the sum of the two compares.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.harness import report, steps
from benchmarks.harness.arguments import by_device
from benchmarks.harness.measure import facts
from benchmarks.harness.registry import Shape
from benchmarks.harness.worker import OK
from benchmarks.ops.rag_step import OP
from benchmarks.ops.rag_step_models import HfStep
from fastrag import profiling

STAGES = (
    *("encode_questions", "search", "score", "contexts"),
    *("generator", "loss", "backward", "optimizer"),
)
REST, WHOLE = "rest", "whole"
COLUMNS = [*report.COLUMNS, "stage"]
DEFAULT_ROUNDS = {"cpu": 5, "cuda": 20}

Times = Mapping[str, float]  # stage -> milliseconds


class Clock:
    """Adds up the time spent in each stage, without that of the stages opened within it.

    Names that are none of STAGES, parts of one, are left to the stage around them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def now(self) -> float:
        """Milliseconds, when the device has done what it was told."""
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


class Timed:
    """One provider's step with a clock in it, warm."""

    def __init__(self, provider: str, mode: str, shape: Shape, dtype: str, device: str) -> None:
        self.step = steps.make_step(provider, mode, shape, dtype, device)
        self.clock = Clock(torch.device(device))
        self.step.stage = self.clock.stage
        if isinstance(self.step, HfStep):
            watch(self.step, self.clock)
        else:
            profiling.set_ranges(self.clock.stage)
        self.step()

    def turn(self) -> dict[str, float]:
        """Milliseconds of each stage that was entered, of what is in none, and of the whole."""
        self.clock.spent.clear()
        start = self.clock.now()
        self.step()
        whole = self.clock.now() - start
        spent = dict(self.clock.spent)
        return spent | {REST: whole - sum(spent.values()), WHOLE: whole}


def watch(step: HfStep, clock: Clock) -> None:
    """Puts stages around the parts of a Hugging Face model."""

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


_timed: Timed | None = None  # of a provider's own process


def prepare(*case: Any) -> None:
    global _timed
    _timed = Timed(*case)


def turn() -> dict[str, float]:
    assert _timed is not None
    return _timed.turn()


def measure(
    providers: Sequence[str], rounds: int, mode: str, shape: Shape, dtype: str, device: str
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Returns the turns of each provider, one in each round, and what became of it."""
    turns: dict[str, list[Times]] = {name: [] for name in providers}
    status = {}
    for name in providers:
        reason = OP.provider(name).why_not(device, dtype, mode)
        status[name] = f"unavailable: {reason}" if reason else OK
    with ExitStack() as stack:
        processes = {}
        for name in (name for name in providers if status[name] == OK):
            processes[name] = stack.enter_context(steps.Process())
            status[name], _ = processes[name].ask(prepare, name, mode, shape, dtype, device)
        for i in range(rounds):
            for name in list(processes)[:: 1 if i % 2 else -1]:
                if status[name] == OK:
                    status[name], found = processes[name].ask(turn)
                    turns[name] += [found] if found is not None else []
    return turns, status


def medians(turns: Sequence[Times]) -> dict[str, float]:
    """Of each stage, in their order; those that were never entered are left out."""
    names = [name for name in (*STAGES, REST, WHOLE) if any(name in turn for turn in turns)]
    return {name: statistics.median(turn.get(name, 0.0) for turn in turns) for name in names}


def rows(
    turns: Sequence[Times], status: str, case: Mapping[str, str], machine: Mapping[str, str]
) -> list[dict[str, str]]:
    """One row of the CSV a stage; one that says why, if there is none."""
    blank = dict.fromkeys(COLUMNS, "") | {"op": OP.name, **case, **machine, "status": status}
    if status != OK:
        return [blank]
    made = []
    for name in medians(turns):
        p20, p50, p80 = report.percentiles([turn.get(name, 0.0) for turn in turns])
        times = {"ms_p50": f"{p50:.4f}", "ms_p20": f"{p20:.4f}", "ms_p80": f"{p80:.4f}"}
        made.append({**blank, **times, "stage": name})
    return made


def table(turns: Mapping[str, Sequence[Times]]) -> str:
    """Medians and shares of the whole, a column pair a provider."""
    columns = {name: medians(found) for name, found in turns.items() if found}
    heads = ["stage", *(head for name in columns for head in (f"{name} ms", "%"))]
    lines = [heads]
    for stage in (*STAGES, REST, WHOLE):
        if not any(stage in found for found in columns.values()):
            continue
        line = [stage]
        for found in columns.values():
            ms = found.get(stage)
            line += ["", ""] if ms is None else [f"{ms:.4g}", f"{100 * ms / found[WHOLE]:.0f}"]
        lines.append(line)
    return "\n".join(f"  {line}" for line in report.aligned(lines, n_left=1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = steps.parser_of("stages", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"turns that count; {by_device(DEFAULT_ROUNDS)}")
    args = steps.parse(parser, argv, COLUMNS)
    args.rounds = DEFAULT_ROUNDS[args.device] if args.rounds is None else args.rounds
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    machine = facts(torch.device(args.device))
    try:
        turns, status = measure(
            args.providers, args.rounds, args.mode, args.shape, args.dtype, args.device
        )
    except KeyboardInterrupt:
        return 130
    shape = report.shape_text(args.shape)
    print(f"{OP.name} {args.mode}  {','.join(OP.dims)} = {shape}  {args.dtype}  ", end="")
    print(machine["device"])
    if any(turns.values()):
        print(table(turns))
    for name, said in status.items():
        if said != OK:
            print(f"  {name}: {said}")
    if args.csv:
        common = {"mode": args.mode, "dtype": args.dtype, "shape": shape}
        made = [
            row
            for name in args.providers
            for row in rows(turns[name], status[name], {"provider": name, **common}, machine)
        ]
        report.add_to_csv(args.csv, made, COLUMNS)
    return int(status.get("fastrag", OK) != OK)


if __name__ == "__main__":
    sys.exit(main())
