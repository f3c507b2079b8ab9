"""Find how many questions a training step can take at once within a budget of memory.

    python -m benchmarks.largest_batch --budget 4GiB [--marginal token] [--csv largest.csv]

The batch is doubled until the step's peak passes the budget, and the gap is then halved. A peak is
that of the first step in a fresh process, above weights and moments of AdamW: activations, logits
and gradients. On a GPU a batch that runs out of memory counts as one that passes the budget.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.harness import results
from benchmarks.harness.arguments import GIB, Parser
from benchmarks.harness.measure import facts, free_memory
from benchmarks.harness.process import OK, Process
from benchmarks.harness.results import MIB, row_of
from benchmarks.harness.timing import Case, peak_of_first_call
from benchmarks.ops.rag_step import OP

UNITS = {"KiB": 1 << 10, "MiB": MIB, "GiB": GIB}
MOST = 1 << 16  # questions; nobody has a use for more
PROVIDERS = ("fastrag", "hf")
COLUMNS = [*results.COLUMNS, "budget_mib", "largest_batch"]


def bytes_of(text: str) -> int:
    """Read 4GiB, 512MiB, 1.5GiB."""
    try:
        found = float(text[:-3]) * UNITS[text[-3:]]
    except (KeyError, ValueError):
        found = math.nan
    if not 1 <= found < math.inf:
        expected = f"expected a byte at least, as a number and one of {', '.join(UNITS)}"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return int(found)


def largest(peak: Callable[[int], float], budget: float) -> tuple[int, float]:
    """Return the largest batch whose peak stays within the budget, and that peak.

    (0, the peak of 1) if there is none; a peak is infinite if memory did not suffice.
    """
    fits, bytes_there = 0, peak(1)
    if bytes_there > budget:
        return fits, bytes_there
    fits, beyond = 1, 2
    while beyond <= MOST and (found := peak(beyond)) <= budget:
        fits, bytes_there, beyond = beyond, found, 2 * beyond
    while beyond <= MOST and beyond - fits > 1:
        middle = (fits + beyond) // 2
        found = peak(middle)
        if found <= budget:
            fits, bytes_there = middle, found
        else:
            beyond = middle
    return fits, bytes_there


class StepError(Exception):
    """A provider failed for another reason than lack of memory."""


def largest_of(case: Case, budget: float) -> tuple[int, float]:
    def peak(n_questions: int) -> float:
        with Process() as process:
            of_size = replace(case, shape=(n_questions, *case.shape[1:]))
            status, found = process.ask(peak_of_first_call, of_size)
        if status != OK:
            raise StepError(status)
        text = "more than there is" if found == math.inf else f"{found / MIB:.0f} MiB"
        print(f"{case.provider} B = {n_questions}: {text}", file=sys.stderr, flush=True)
        return float(found)

    if reason := case.why_not():
        raise StepError(f"unavailable: {reason}")
    return largest(peak, budget)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("largest_batch", __doc__)
    parser.add_argument("--budget", required=True, type=bytes_of, help="such as 4GiB")
    args, cases = parser.parse_cases(argv, OP, PROVIDERS, COLUMNS)
    device = torch.device(args.device)
    half = free_memory(device) / 2
    if device.type == "cpu" and args.budget > half:
        parser.error(
            "--budget: expected at most half of the free memory, since the batch is doubled until "
            f"it is passed: {half / GIB:.1f}GiB, got {args.budget / GIB:.1f}GiB"
        )
    machine = facts(device)
    lines, notes, code = [["provider", "largest B", "its peak MiB"]], [], 0
    for case in cases:
        status, found = OK, {"budget_mib": f"{args.budget / MIB:.0f}"}
        try:
            batch, peak = largest_of(case, args.budget)
            found |= {"largest_batch": str(batch), "peak_mib": f"{peak / MIB:.1f}"}
            lines.append([case.provider, str(batch), f"{peak / MIB:.0f}"])
            case = replace(case, shape=(max(1, batch), *case.shape[1:]))
        except StepError as error:
            status = str(error)
            notes.append(f"  {case.provider}: {status}")
            code |= int(case.provider == "fastrag")
        except KeyboardInterrupt:
            return 130
        if args.csv:
            results.add(args.csv, [row_of(case, machine, status, **found)], COLUMNS)
    print(results.heading(row_of(cases[0], machine, OK)))
    print(f"  within {args.budget / MIB:.0f} MiB above weights and moments, whatever B")
    print("\n".join([results.aligned(lines, n_left=1), *notes]))
    return code


if __name__ == "__main__":
    sys.exit(main())
