"""Show where the time of a training step goes, stage by stage, in fastrag and in Hugging Face.

    python -m benchmarks.stages [--marginal token] [--shape 4,5,64,16,256,10000] [--csv stages.csv]

The head belongs to the loss on both sides. But fastrag computes the gradients of head and hidden
states inside the loss, and Hugging Face in the backward pass: compare the sum of the two.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.harness import report, rows
from benchmarks.harness.arguments import Parser
from benchmarks.harness.measure import facts
from benchmarks.harness.process import OK
from benchmarks.harness.rows import Row
from benchmarks.harness.timing import Result, time_cases
from benchmarks.ops.rag_step import OP
from benchmarks.ops.rag_step_stages import REST, STAGES, WHOLE, StageTimes

PROVIDERS = ("fastrag", "hf")
COLUMNS = [*rows.COLUMNS, "stage"]
Times = Mapping[str, float]  # stage -> milliseconds


def columns_of(turns: Sequence[Times]) -> dict[str, list[float]]:
    """Return the times of each stage, in their order; stages never entered are left out."""
    names = [name for name in (*STAGES, REST, WHOLE) if any(name in turn for turn in turns)]
    return {name: [turn.get(name, 0.0) for turn in turns] for name in names}


def rows_of(result: Result, machine: Row) -> list[Row]:
    """Return one row for each stage, or one that says why there is none."""
    if result.status != OK:
        return [rows.row_of(result.case, machine, result.status)]
    return [
        rows.row_of(result.case, machine, OK, stage=name, **report.percentile_columns(times))
        for name, times in columns_of(result.turns).items()
    ]


def table(results: Sequence[Result]) -> str:
    """Return medians and shares of the whole, two columns for each provider."""
    timed = {
        result.case.provider: {
            name: statistics.median(times) for name, times in columns_of(result.turns).items()
        }
        for result in results
        if result.turns
    }
    lines = [["stage", *(head for name in timed for head in (f"{name} ms", "%"))]]
    for stage in (*STAGES, REST, WHOLE):
        found = [(of.get(stage), of[WHOLE]) for of in timed.values()]
        if any(ms is not None for ms, _ in found):
            cells = [
                ("", "") if ms is None else (f"{ms:.4g}", f"{100 * ms / whole:.0f}")
                for ms, whole in found
            ]
            lines.append([stage, *(cell for pair in cells for cell in pair)])
    return report.aligned(lines, n_left=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("stages", __doc__)
    parser.add_rounds()
    args, cases = parser.parse_cases(argv, OP, PROVIDERS, COLUMNS)
    machine = facts(torch.device(args.device))
    try:
        results = time_cases(cases, args.rounds, make=StageTimes)
    except KeyboardInterrupt:
        return 130
    print(report.heading(OP, cases[0], machine))
    if any(result.turns for result in results):
        print(table(results))
    for result in results:
        if result.status != OK:
            print(f"  {result.case.provider}: {result.status}")
    if args.csv:
        rows.add(args.csv, [row for r in results for row in rows_of(r, machine)], COLUMNS)
    return int(any(r.status != OK for r in results if r.case.provider == "fastrag"))


if __name__ == "__main__":
    sys.exit(main())
