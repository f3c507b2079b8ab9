"""How many questions a training step can take at once within a budget of memory.

    python -m benchmarks.largest_batch --budget 4GiB [--marginal token] [--csv largest.csv]

The batch is doubled until the step's peak passes the budget, and the gap is then halved. A peak is
that of the first step in a fresh process, above weights and moments of AdamW: activations, logits
and gradients. On a GPU the batch that does not fit into it counts as one that passes the budget.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import report, steps
from benchmarks.harness.arguments import Parser
from benchmarks.harness.measure import extra_bytes, facts, free_memory
from benchmarks.harness.registry import Shape
from benchmarks.harness.worker import OK
from benchmarks.ops.rag_step import OP

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
MOST = 1 << 16  # questions; whoever gets there has no use for more
COLUMNS = [*report.COLUMNS, "budget_mib", "largest_batch"]


def bytes_of(parser: Parser, text: str) -> int:
    """Reads 4GiB, 512MiB, 1.5GiB."""
    number, unit = text[:-3], text[-3:]
    try:
        found = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        parser.error(f"--budget: expected a number and one of {', '.join(UNITS)}, got {text!r}")
    if not 1 <= found < math.inf:
        parser.error(f"--budget: expected at least a byte, got {text!r}")
    return int(found)


def largest(peak: Callable[[int], float], budget: float) -> tuple[int, float]:
    """Returns the largest batch whose peak stays within the budget, and that peak.

    (0, the peak of 1) if there is none; a peak is infinite where memory did not suffice.
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


def peak_of_step(provider: str, mode: str, shape: Shape, dtype: str, device: str) -> float:
    """Bytes of the first step above what stood there before; run in a process of its own.

    Raises:
        OSError: the system does not tell.
    """
    step = steps.make_step(provider, mode, shape, dtype, device)
    try:
        found = extra_bytes(step, torch.device(device))
    except (torch.OutOfMemoryError, MemoryError):
        return math.inf
    if found is None:
        raise OSError("this system does not tell the peak of a process")
    return found


class StepError(Exception):
    """A provider failed, otherwise than for lack of memory."""


def largest_of(provider: str, args: argparse.Namespace) -> tuple[int, float]:
    def peak(n_questions: int) -> float:
        shape = (n_questions, *args.shape[1:])
        with steps.Process() as process:
            case = (provider, args.mode, shape, args.dtype, args.device)
            status, found = process.ask(peak_of_step, *case)
        if status != OK:
            raise StepError(status)
        said = "more than there is" if found == math.inf else f"{found / report.MIB:.0f} MiB"
        print(f"{provider} B = {n_questions}: {said}", file=sys.stderr, flush=True)
        return float(found)

    return largest(peak, args.budget)


def main(argv: Sequence[str] | None = None) -> int:
    parser = steps.parser_of("largest_batch", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", required=True, help="such as 4GiB")
    args = steps.parse(parser, argv, COLUMNS)
    args.budget = bytes_of(parser, args.budget)
    device = torch.device(args.device)
    if device.type == "cpu" and 2 * args.budget > free_memory(device):
        most = free_memory(device) / 2 / UNITS["GiB"]
        parser.error(
            f"--budget: expected at most half of the free memory, {most:.1f}GiB, for the batch is "
            f"doubled until it is passed"
        )
    machine, shape = facts(device), args.shape
    lines, notes = [["provider", "largest B", "its peak MiB"]], []
    code = 0
    for name in args.providers:
        status, row = OK, dict.fromkeys(COLUMNS, "")
        reason = OP.provider(name).why_not(args.device, args.dtype, args.mode)
        try:
            if reason:
                raise StepError(f"unavailable: {reason}")
            batch, peak = largest_of(name, args)
            row |= {"largest_batch": str(batch), "peak_mib": f"{peak / report.MIB:.1f}"}
            lines.append([name, str(batch), f"{peak / report.MIB:.0f}"])
            shape = (max(1, batch), *args.shape[1:])
        except StepError as error:
            status, shape = str(error), args.shape
            notes.append(f"{name}: {status}")
            code |= int(name == "fastrag")
        except KeyboardInterrupt:
            return 130
        case = {"op": OP.name, "provider": name, "mode": args.mode, "dtype": args.dtype}
        case |= {"shape": report.shape_text(shape), "budget_mib": f"{args.budget / report.MIB:.0f}"}
        if args.csv:
            made = row | case | machine | {"status": status}
            report.add_to_csv(args.csv, [made], COLUMNS)
    given = f"{','.join(OP.dims[1:])} = {report.shape_text(args.shape[1:])}"
    print(f"{OP.name} {args.mode}  {given}  {args.dtype}  {machine['device']}")
    print(f"  within {args.budget / report.MIB:.0f} MiB above weights and moments")
    print("\n".join(f"  {line}" for line in [*report.aligned(lines, n_left=1), *notes]))
    return code


if __name__ == "__main__":
    sys.exit(main())
