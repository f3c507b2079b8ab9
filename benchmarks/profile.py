"""Show where the time of an operation goes: a timeline, or the instructions of its kernels.

    python -m benchmarks.profile --op mips                     a timeline by torch.profiler, a table
    python -m benchmarks.profile --op marginal_loss --ncu      counters of each kernel, on a GPU
    python -m benchmarks.profile --op marginal_loss --sass     instructions of the kernels, no GPU
    python -m benchmarks.profile --op mips --aot --arch 80     registers and occupancy, no GPU
    python -m benchmarks.profile --op mips --roofline          measured rates under their ceilings

Exit code: 0; 1 if a tool fails; 2 for a bad argument, or for what cannot run here.
docs/profiling.md says more.
"""

from __future__ import annotations

import sys

# Run by path, this file hides the standard library's `profile`, which torch imports.
if not __package__:
    sys.stderr.write(
        "benchmarks: run from the root of the checkout, as python -m benchmarks.NAME\n"
    )
    sys.exit(2)

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.harness.arguments import Parser, at_least_one, folder, one_of
from benchmarks.harness.registry import shape_text
from benchmarks.harness.results import aligned
from benchmarks.harness.timing import Case
from benchmarks.ops import OPS
from benchmarks.profiling import ncu

WARM_CALLS = 2
N_OPERATIONS = 15


def _parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("profile", __doc__)
    parser.add_argument("--op", required=True, type=one_of(list(OPS)), help=", ".join(OPS))
    parser.add_argument("--provider", help="default: the first of ours that runs here")
    parser.add_problem()
    parser.add_argument("--calls", type=at_least_one, default=3, help="calls that are recorded (3)")
    parser.add_argument("--out", type=folder, help="folder for the files; runs/profile/OP")
    tools = parser.add_mutually_exclusive_group()
    for name, do, about in (
        ("ncu", _ncu, "Nsight Compute: counters of the kernels"),
        ("nsys", _nsys, "print a command for Nsight Systems"),
        ("sass", _sass, "count the kernels' instructions"),
        ("aot", _aot, "registers, shared memory, occupancy"),
        ("roofline", _roofline, "plot rows of benchmarks.run"),
        ("loop", _loop, "the calls alone; --ncu runs this"),
    ):
        tools.add_argument(f"--{name}", dest="do", action="store_const", const=do, help=about)
    parser.set_defaults(do=_trace)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="for --sass, --aot (90)")
    parser.add_argument("--kernel", metavar="REGEX", help="for --ncu, --sass, --aot; default: all")
    help_of_aligned = "for --sass, --aot: widths are multiples of 16"
    parser.add_argument("--aligned", action="store_true", help=help_of_aligned)
    parser.add_argument("--csv", type=Path, help="for --roofline: rows of benchmarks.run")
    args = parser.parse_args(argv)
    try:
        re.compile(args.kernel or "")
    except re.error as error:
        parser.error(f"--kernel: expected a regular expression, got {args.kernel!r}: {error}")
    if args.csv and args.do is not _roofline:
        parser.error("--csv: is for --roofline, which reads rows of benchmarks.run")
    args.out = args.out or ROOT / "runs" / "profile" / args.op
    return parser, args


def _choose(parser: Parser, args: argparse.Namespace, device: str) -> Case:
    """Return the case to be profiled, on a device that may be that of another machine."""
    op = OPS[args.op]
    if args.provider:
        parser.names(args.provider, op.names(), f"{op.name} has no provider")
    swept = [mode for mode in op.modes if op.sweep(device, mode)]
    mode = args.mode or (op.modes if args.shape else swept)[0]
    parser.check_mode(op, mode)
    if not args.shape and mode not in swept:
        parser.error(f"--shape: {op.name} has no shapes of its own for {mode} on {device}")
    shape = parser.shape(op, args.shape) if args.shape else op.sweep(device, mode)[0]
    own = [p.name for p in op.providers if p.kind == "ours" and device in p.devices]
    if not own and not args.provider:
        parser.error(f"{op.name} has no provider of ours on {device}")
    names = [args.provider] if args.provider else own
    cases = [Case(op.name, name, mode, shape, args.dtype, device) for name in names]
    if device == args.device:  # and not only named in a command for another machine
        cases = [case for case in cases if not case.why_not()] or cases
    return cases[0]


def _call(parser: Parser, args: argparse.Namespace) -> tuple[Callable[[], Any], str]:
    """Return the call to be recorded, warm, and a line that describes it."""
    parser.complete(args)
    case = _choose(parser, args, args.device)
    op, provider = case.entry
    parser.check_size(args, op, case.mode, case.shape)
    if case.why_not():
        parser.error(f"{provider.name}: {case.why_not()}")
    call = provider.prepare(case.mode, case.inputs())
    for _ in range(WARM_CALLS):
        call()
    sizes = ", ".join(f"{dim} {n}" for dim, n in zip(op.dims, case.shape, strict=True))
    return call, f"{op.name} {case.mode}, {provider.name}, {case.dtype} on {case.device}: {sizes}"


# ----------------------------------------------------------------------------------- timeline


def _trace(parser: Parser, args: argparse.Namespace) -> int:
    from torch.profiler import ProfilerActivity, profile, record_function

    from fastrag.profiling import set_ranges

    call, title = _call(parser, args)
    activities = [ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    set_ranges("torch")
    try:
        with profile(activities=activities, record_shapes=True) as found:
            for _ in range(args.calls):
                with record_function("call"):
                    call()
            if args.device == "cuda":
                torch.cuda.synchronize()
    finally:
        set_ranges(None)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "trace.json"
    found.export_chrome_trace(str(path))
    print(f"{title}\n{_tables(list(found.key_averages()), args.calls, args.device)}")
    print(f"{path}: a timeline, to be opened in https://ui.perfetto.dev")
    return 0


def _tables(events: Sequence[Any], calls: int, device: str) -> str:
    """Return stages by name, so that parts follow the whole, and operations by time."""
    from fastrag.profiling import PREFIX

    where = "cpu_time_total" if device == "cpu" else "device_time_total"
    self_time = f"self_{where}"
    whole = sum(getattr(event, self_time) for event in events) or 1.0
    stages = sorted((e for e in events if e.key.startswith(PREFIX)), key=lambda e: e.key)
    # C++ counts as time of the stage around it, so stages compete with operations.
    busiest = sorted(events, key=lambda e: -getattr(e, self_time))[:N_OPERATIONS]
    lines = []
    for title, chosen in (("stage", stages), ("most self time", busiest)):
        lines += [[title, "calls", "total ms", "self ms", "self %"]] if chosen else []
        for e in chosen:
            own = getattr(e, self_time)
            each = f"{getattr(e, where) / 1e3 / calls:.3f}", f"{own / 1e3 / calls:.3f}"
            lines.append([e.key[:60], f"{e.count / calls:g}", *each, f"{100 * own / whole:.1f}"])
    title = f"  of one call of {calls}, on the {'CPU' if device == 'cpu' else 'GPU'}:"
    return f"{title}\n{aligned(lines, n_left=1)}"


# ------------------------------------------------------------------------------------- Nsight


def _loop(parser: Parser, args: argparse.Namespace) -> int:
    if args.device == "cpu" or not torch.cuda.is_available():
        parser.error("--loop: is for a CUDA device, where Nsight sees it")
    call, _ = _call(parser, args)
    torch.cuda.synchronize()
    # Not an NVTX range: it belongs to one thread, and autograd launches from another.
    with torch.cuda.profiler.profile():
        for _ in range(args.calls):
            call()
        torch.cuda.synchronize()
    return 0


def _loop_command(parser: Parser, args: argparse.Namespace) -> list[str]:
    """Return the command that runs this module again, only for calls on a GPU."""
    args.dtype = args.dtype or "bfloat16"
    if args.device not in (None, "cuda"):
        parser.error(f"--device: expected cuda, got {args.device!r}")
    args.device = None
    case = _choose(parser, args, "cuda")
    words = [sys.executable, "-m", "benchmarks.profile", "--loop", "--op", case.op]
    words += ["--provider", case.provider, "--mode", case.mode, "--shape", shape_text(case.shape)]
    return [*words, "--dtype", case.dtype, "--device", "cuda", "--calls", str(args.calls)]


def _nsys(parser: Parser, args: argparse.Namespace) -> int:
    command = ["nsys", "profile", "-t", "cuda,nvtx,cublas", "--capture-range=cudaProfilerApi"]
    command += ["-o", str(args.out / "timeline"), *_loop_command(parser, args)]
    print(f"FASTRAG_RANGES=nvtx {shlex.join(command)}")
    return 0


def _ncu(parser: Parser, args: argparse.Namespace) -> int:
    report, loop = args.out / "kernels", _loop_command(parser, args)
    command = ncu.command(report, loop, args.kernel or _kernel_names(parser, args))
    print(f"FASTRAG_RANGES=nvtx {shlex.join(command)}", flush=True)
    if reason := ncu.why_not():
        parser.error(reason)
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"FASTRAG_RANGES": "nvtx"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        return 1
    raw = subprocess.run(ncu.export(report), capture_output=True, text=True, check=False)
    try:
        if raw.returncode:
            raise ValueError(f"ncu: {raw.stderr.strip() or raw.stdout.strip()}")
        print(ncu.table(ncu.read(raw.stdout)))
    except ValueError as error:  # without a matching kernel there is no table
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------------------- without a GPU


def _kernel_names(parser: Parser, args: argparse.Namespace) -> str:
    """Return a regular expression of the op's kernels."""
    names = {config.kernel.fn.__name__ for config in _configs(parser, args)}
    return f"^({'|'.join(sorted(names))})$"


def _configs(parser: Parser, args: argparse.Namespace) -> list[Any]:
    try:
        from benchmarks.profiling import sass

        found = sass.configs(args.op, args.kernel)
        return [sass.aligned(config) for config in found] if args.aligned else found
    except (ImportError, RuntimeError, ValueError) as error:
        parser.error(str(error))


def _sass(parser: Parser, args: argparse.Namespace) -> int:
    from benchmarks.profiling import sass

    return _compile(parser, args, lambda config, arch: sass.describe(sass.count(config, arch)))


def _aot(parser: Parser, args: argparse.Namespace) -> int:
    from fastrag.kernels import aot

    compiled = aot.compile_config
    return _compile(parser, args, lambda config, arch: aot.describe(compiled(config, arch)))


def _compile(parser: Parser, args: argparse.Namespace, line: Callable[[Any, int], str]) -> int:
    configs = _configs(parser, args)
    from fastrag.kernels import aot

    for arch in args.arch:
        if arch not in aot.SHARED_LIMIT:
            known = ", ".join(map(str, sorted(aot.SHARED_LIMIT)))
            parser.error(f"--arch: expected some of {known}, got {arch}")
    for arch in args.arch:
        for config in configs:
            if not config.archs or arch in config.archs:
                print(line(config, arch), flush=True)
    return 0


def _roofline(parser: Parser, args: argparse.Namespace) -> int:
    try:
        from benchmarks.profiling import roofline
    except ImportError as error:
        parser.error(f"--roofline: {error}")
    op = OPS[args.op]
    try:
        groups, others = roofline.groups_for(op, args.csv)
        args.out.mkdir(parents=True, exist_ok=True)
        written = roofline.draw(op, groups, others, args.out / "roofline.svg")
    except (OSError, ValueError) as error:
        parser.error(f"--roofline: {error}")
    print("\n".join(map(str, written)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser, args = _parse(argv)
    code: int = args.do(parser, args)
    return code


if __name__ == "__main__":
    sys.exit(main())
