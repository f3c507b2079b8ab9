"""Time the candidates of the Triton kernels on this GPU and keep the fastest.

    python -m benchmarks.tune [--only group_max row_gradient] [--out tuned.json] [--install]

Every candidate is compared with float64 before it is timed. The file lists the choice in each
regime, the alternatives and the machine; FASTRAG_TUNED=tuned.json makes the launchers use it, and
--install puts it where they look by default. A choice within 2% of the usual one is not changed.
Exit code: 0; 1 if a job failed; 2 for a bad argument or a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.isolation import NOT_RUN, PASSED, Record, end_on_signals, run_isolated
from benchmarks.harness.arguments import Parser, one_of

LEAST_GAIN = 0.02
PATIENCE = 180.0  # a job compiles all of its candidates
DEFAULT_OUT = Path("tuned.json")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from benchmarks.gpu.tuning import JOBS

    parser = Parser("tune", __doc__)
    kernels = list(dict.fromkeys(job.kernel for job in JOBS.values()))
    parser.add_argument(
        "--only", nargs="+", type=one_of(kernels), metavar="KERNEL", help=f"of {', '.join(kernels)}"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--install", action="store_true", help="also into kernels/tuned")
    parser.add_argument("--seconds", type=float, default=1800.0, help="default: 1800")
    args = parser.parse_args(argv)
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out: {args.out.parent} is not a folder")
    args.jobs = [n for n, job in JOBS.items() if job.kernel in (args.only or kernels)]
    return args


def document(records: Sequence[Record], arch: str, facts: dict[str, str]) -> dict[str, Any]:
    """Return the contents of the file: the choices that gain something, and all measurements."""
    from fastrag.kernels import tuning

    from benchmarks.gpu.tuning import JOBS

    choices: dict[str, dict[str, Any]] = {}
    measured: dict[str, Any] = {}
    for record in records:
        if record.outcome != PASSED:
            continue
        job, found = JOBS[record.name], json.loads(record.text)
        measured[record.name] = found["candidates"]
        first = found["first_ms"]
        if first is None or found["ms"] < (1 - LEAST_GAIN) * first:
            entry = {name: found[name] for name in ("config", "ms", "first_ms")}
            choices.setdefault(job.kernel, {})[tuning.regime_key(job.regime)] = entry
    kept = ("device", "driver", "torch", "triton", "commit", "date")
    head = {"architecture": arch, **{name: facts[name] for name in kept}}
    return {**head, "choices": choices, "measured": measured}


def install(found: dict[str, Any], folder: Path) -> Path:
    """Write the choices: they replace those of the same regimes, and the others stay."""
    from fastrag.kernels import tuning

    from benchmarks.gpu.tuning import JOBS

    path = folder / f"{found['architecture']}.json"
    choices: dict[str, dict[str, Any]] = {}
    if path.exists():
        choices = tuning.read(path)["choices"]
    for name in found["measured"]:
        job = JOBS[name]
        choices.get(job.kernel, {}).pop(tuning.regime_key(job.regime), None)
    for kernel, entries in found["choices"].items():
        choices.setdefault(kernel, {}).update(entries)
    choices = {kernel: entries for kernel, entries in choices.items() if entries}
    shipped = {name: value for name, value in found.items() if name != "measured"}
    folder.mkdir(exist_ok=True)
    _write(path, {**shipped, "choices": choices})
    return path


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _line(record: Record) -> str:
    if record.outcome != PASSED:
        return f"{record.name}: {record.outcome}: {record.text[-300:]}"
    found = json.loads(record.text)
    bad = sum("wrong" in note for note in found["candidates"])
    tail = f", {bad} of {len(found['candidates'])} candidates unfit" if bad else ""
    return f"{record.name}: {found['ms']} ms, usual {found['first_ms']} ms, {found['config']}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.tune: needs an NVIDIA GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    from fastrag.kernels import tuning

    from benchmarks.gpu.tuning import JOBS, fits, measure_job
    from benchmarks.harness.measure import facts

    device = torch.device("cuda", torch.cuda.current_device())
    names = [name for name in args.jobs if fits(JOBS[name], device)]
    arch, machine = tuning.architecture(device), facts(device)
    seen: list[Record] = []

    def tell(record: Record) -> None:
        print(_line(record), flush=True)
        seen.append(record)
        _write(args.out, document(seen, arch, machine))  # at once: a later failure loses nothing

    with end_on_signals():
        deadline = time.monotonic() + args.seconds
        records = run_isolated(measure_job, names, deadline, patience=PATIENCE, tell=tell)
    found = document(records, arch, machine)
    _write(args.out, found)
    if args.install:
        print(f"installed: {install(found, tuning.FOLDER)}")
    waiting = sum(record.outcome == NOT_RUN for record in records)
    gains = sum(map(len, found["choices"].values()))
    print(f"{len(found['measured'])} regimes measured, {gains} choices, {waiting} not reached")
    return int(any(record.bad for record in records))


if __name__ == "__main__":
    sys.exit(main())
