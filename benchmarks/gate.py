"""A gate against regressions that needs no clock: counts are compared with those in gate.json.

    python -m benchmarks.gate [--only SECTION ...] [--update]

- instructions: of the C++ search and of the passes over logits, by valgrind, AVX2 and scalar, and
  the lines that a search reads from memory more than once, in a cache of fixed size;
- kernels: registers, stack and shared memory of one configuration of each Triton kernel on sm_90,
  the first that has bfloat16 if there is one;
- allocations: number and bytes in a warm call of the loss, of the search and of a training step.

A section is compared only if the versions here are those that made its numbers; otherwise it prints
"not compared". Exit code: 0; 1 if a number is out of its bounds, is not committed, or is gone; 2
for a bad argument.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.harness import native
from benchmarks.harness.arguments import Parser

FILE = Path(__file__).with_name("gate.json")
Counts = dict[str, int]


class Uncounted(Exception):
    """This cannot be counted here; the message says why."""


@dataclass(frozen=True)
class Section:
    """Counts of one kind, and how far they may move from the committed ones."""

    name: str
    versions: Callable[[], str]  # of the tools that make the counts; raises Uncounted
    measure: Callable[[], Counts]
    rise: float  # as a share of the committed count
    fall: float | None  # None: any


# ------------------------------------------------------------------------------- instructions

FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-pthread"]
SEARCHES = [f"mips_{how}_{kind}" for how in ("few", "tile") for kind in ("float32", "bfloat16")]
PASSES = ["row_statistics", "row_gradient", "mixture_statistics", "mixture_gradient"]
# First-level and last-level caches: bytes, ways and bytes of a line. The matrix exceeds both,
# so that a block that is read twice shows.
CACHES = ("--cache-sim=yes", "--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,16,64")
READ_MISSES = 7  # place of the last-level misses of reads among the counts of valgrind


def instruction_versions() -> str:
    for tool in (native.COMPILER, "valgrind"):
        if shutil.which(tool) is None:
            raise Uncounted(f"there is no {tool}")
    valgrind = _run("valgrind", "--version").strip()
    return f"{platform.machine()}, {native.compiler_version()}, {valgrind}"


def instructions() -> Counts:
    # valgrind 3.19 knows no AVX-512
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(__file__).with_suffix(".cpp"), *native.sources()]
        program = native.build(Path(folder), files, FLAGS)
        counts = {
            f"{work} {isa}": _count(program, work, isa)[0]
            for work in (*SEARCHES, *PASSES)
            for isa in ("avx2", "scalar")
        }
        for work in SEARCHES:
            counts[f"{work} misses"] = _count(program, work, "avx2", *CACHES)[READ_MISSES]
        return counts


def _count(program: Path, work: str, isa: str, *options: str) -> list[int]:
    """Return the events inside the function and its callees, without making its inputs."""
    function = "mips_topk" if work in SEARCHES else work
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *options]
    output = _run(*tool, f"--toggle-collect=fastrag::{function}*", str(program), work, isa)
    found = re.search(r"Collected : ([\d ]+)", output)
    if found is None or found[1] == "0":
        raise RuntimeError(f"valgrind counted nothing in {work} {isa}: {output}")
    return [int(count) for count in found[1].split()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Uncounted(f"{' '.join(command)}: {lines[-1] if lines else 'failed'}")
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------------ kernels

ARCH = 90


def kernel_versions() -> str:
    try:
        import triton
    except ImportError as error:
        raise Uncounted("triton is not installed") from error
    return f"triton {triton.__version__}"


def kernels() -> Counts:
    from fastrag.kernels import aot

    counts: Counts = {}
    configs = [c for c in aot.all_configs() if not c.archs or ARCH in c.archs]
    configs.sort(key=lambda c: not any("bf16" in kind for kind in c.types.values()))
    chosen = {c.kernel.fn.__name__: c for c in reversed(configs)}  # the first of each
    for _, config in sorted(chosen.items()):
        found = aot.compile_config(config, ARCH)
        counts[f"{found.name} registers"] = found.registers
        counts[f"{found.name} stack"] = found.stack
        counts[f"{found.name} shared"] = found.shared
    return counts


# -------------------------------------------------------------------------------- allocations

# op and mode: the loss alone, whole steps with and without the search, the search
COUNTED = [("marginal_loss", "token"), ("marginal_loss", "sequence")]
COUNTED += [("rag_step", "token"), ("rag_step", "sequence-given"), ("mips", "float32")]
WARM_CALLS = 2  # these make the workspaces and the optimiser's state


def allocation_versions() -> str:
    import torch
    import transformers

    from fastrag.ops import backends

    if reason := backends.why_not("cpp"):
        raise Uncounted(reason)
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def allocations() -> Counts:
    import torch

    from benchmarks.ops import OPS

    torch.set_num_threads(1)
    counts: Counts = {}
    for name, mode in COUNTED:
        op = OPS[name]
        ours = op.provider(op.names("ours")[0])
        problem = op.make(op.checked[0], torch.float32, torch.device("cpu"))
        call = ours.prepare(mode, problem)
        for _ in range(WARM_CALLS):
            call()
        sizes = _allocated(call)
        counts[f"{name} {mode} allocations"] = len(sizes)
        counts[f"{name} {mode} bytes"] = sum(sizes)
    return counts


def _allocated(call: Callable[[], Any]) -> list[int]:
    """Return the bytes of each block that torch's allocator hands out in a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    return [change for change in changes if change > 0]


SECTIONS = {
    "instructions": Section("instructions", instruction_versions, instructions, 0.03, 0.03),
    "kernels": Section("kernels", kernel_versions, kernels, 0.0, None),
    "allocations": Section("allocations", allocation_versions, allocations, 0.0, 0.0),
}


# --------------------------------------------------------------------------------- comparison


def differences(section: Section, committed: Mapping[str, int], found: Counts) -> list[str]:
    """Return a line for each count that is out of bounds."""
    lines = []
    for name in dict.fromkeys([*committed, *found]):
        before, now = committed.get(name), found.get(name)
        if before is None or now is None:
            lines.append(f"{name}: {'not committed' if before is None else 'no longer counted'}")
        elif now > before * (1 + section.rise):
            lines.append(f"{name}: {_change(before, now)}, at most {section.rise:.0%} allowed")
        elif section.fall is not None and now < before * (1 - section.fall):
            lines.append(f"{name}: {_change(before, now)}, fewer: commit the new number")
    return lines


def _change(before: int, now: int) -> str:
    share = f" ({now / before - 1:+.1%})" if before else ""
    return f"{before} -> {now}{share}"


def compare(section: Section, committed: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the counts out of bounds, and one line about the section."""
    try:
        versions = section.versions()
        if versions != committed.get("with"):
            raise Uncounted(f"here is {versions}, the numbers are of {committed.get('with')}")
        lines = differences(section, committed["counts"], section.measure())
    except Uncounted as reason:
        return [], f"{section.name}: not compared: {reason}"
    verdict = f"{len(lines)} out of bounds" if lines else "within bounds"
    return lines, f"{section.name}: {len(committed['counts'])} numbers, {verdict}"


def update(section: Section, committed: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the new contents of the section, and a line for each change."""
    versions, counts = section.versions(), section.measure()
    old = committed.get("counts", {})
    lines = [
        f"{name}: {_change(old[name], now) if name in old else now}"
        for name, now in counts.items()
        if old.get(name) != now
    ]
    lines += [f"{name}: gone" for name in old if name not in counts]
    return {"with": versions, "counts": counts}, lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("gate", __doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--update", action="store_true", help=f"write {FILE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    committed = json.loads(FILE.read_text()) if FILE.exists() else {}
    code = 0
    for name in args.only:
        section, before = SECTIONS[name], committed.get(name, {})
        if args.update:
            committed[name], lines = update(section, before)
            FILE.write_text(json.dumps(committed, indent=2) + "\n")
            verdict = f"{name}: {len(lines)} changed"
        else:
            lines, verdict = compare(section, before)
            code = max(code, int(bool(lines)))
        print("\n".join([verdict, *(f"  {line}" for line in lines)]), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
