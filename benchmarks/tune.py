"""Time the candidates of the Triton kernels on this GPU and keep the fastest.

    python -m benchmarks.tune [--only group_max row_gradient] [--out tuned.json] [--install]

A job is one kernel in one regime, in a child process. Each candidate must first give the right
answer at a small shape, compared with float64; those that do take turns at a real one. The file
lists the choice in each regime, the alternatives and the machine; FASTRAG_TUNED=tuned.json makes
the launchers use it, and --install puts it where they look by default. A choice within 2% of the
usual one is not changed. Exit code: 0; 1 if a job failed; 2 for a bad argument or a machine without
a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastrag.kernels import linear_logp, mips, mixture_logp, mixture_pass, row_pass, tuning
from fastrag.kernels.mips_rescore import group_size
from torch import Tensor

from benchmarks.gpu.isolation import (
    NOT_RUN,
    PASSED,
    Record,
    cuda_error,
    end_on_signals,
    run_isolated,
)
from benchmarks.harness import measure
from benchmarks.harness.arguments import Parser, one_of
from benchmarks.harness.process import error_text
from fastrag.ops import triton_mips
from fastrag.ops.triton_chunks import padded

LEAST_GAIN = 0.02
PATIENCE = 180.0  # a job compiles all of its candidates
DEFAULT_OUT = Path("tuned.json")
ROUNDS = 5
WIDTH = 768
GROUP = group_size(10)
# Rows of an index: for the check, and for times, many times the cache of any GPU.
FEW_ROWS, MANY_ROWS = 2048, 2_000_000
SMALL_HEAD, LARGE_HEAD = (37, 128, 1031), (2560, 1024, 50265)  # rows, H, V
Outputs = tuple[Tensor, ...]


# the call of a candidate, and its error over the allowed one, at a small shape only
Problem = tuple[Callable[[Any], Outputs], Callable[[Outputs], float]]


@dataclass(frozen=True)
class Job:
    """One kernel in one regime."""

    kernel: str
    candidates: Callable[..., Sequence[Any]]
    regime: dict[str, Any]
    problem: Callable[[torch.device, bool], Problem]  # device, small

    @property
    def name(self) -> str:
        return f"{self.kernel} {tuning.regime_key(self.regime)}".strip()


def excess(found: Tensor, true: Tensor, relative: float, least: float = 1e-5) -> float:
    """Return the largest error over the allowed one, infinite for NaN."""
    return over(found.double() - true, least + relative * true.abs())


def over(error: Tensor, allowed: Tensor) -> float:
    return float((error.abs() / allowed).max().nan_to_num(torch.inf))


# -------------------------------------------------------------------------------------- the search


def search_job(stored: torch.dtype, n_queries: int, has_low: bool) -> Job:
    regime = {"stored": stored, "n_queries": n_queries, "has_low": has_low, "use_tma": True}

    def problem(device: torch.device, small: bool) -> Problem:
        n = FEW_ROWS if small else MANY_ROWS
        kind = torch.float32 if has_low else stored
        query = torch.randn(n_queries, WIDTH, device=device).to(kind)
        scale = offset = None
        if stored == torch.int8:
            index = torch.randint(-128, 128, (n, WIDTH), dtype=stored, device=device)
            scale, offset = torch.rand(WIDTH, device=device), torch.randn(WIDTH, device=device)
        else:
            index = torch.randn(n, WIDTH, device=device, dtype=stored)

        def call(tile: mips.Tile) -> Outputs:
            operand = mips.prepare(query, stored, scale, offset, has_low, tile)
            maxima = query.new_empty(n_queries, -(-n // GROUP), dtype=torch.float32)
            mips.group_maxima(operand, index, None, GROUP, tile, True, maxima)
            return maxima, operand.unit, operand.base, operand.size

        def error(found: Outputs) -> float:
            maxima, unit, base, size = (x.double() for x in found)
            vectors = index.double()
            norm = 1.0
            if scale is not None and offset is not None:
                vectors = vectors * scale.double() + offset.double()
            else:
                norm = float(mips.max_norm(index, None, None))
            true = (query.double() @ vectors.t()).unflatten(1, (-1, GROUP)).amax(2)
            reach = mips.error_bound(stored, WIDTH, has_low) * norm * size[:, None]
            return over(maxima / unit[:, None] + base[:, None] - true, reach)

        return call, error

    return Job("group_max", mips.tiles, regime, problem)


# ---------------------------------------------------------------------------------------- the loss


def _logits(device: torch.device, small: bool, n_passages: int = 1) -> tuple[Tensor, Tensor, int]:
    """Return rows with their padding, as the loss has them, labels, and V."""
    n, _, vocab = SMALL_HEAD if small else LARGE_HEAD
    n = -(-n // n_passages) * n_passages
    raw = torch.randn(n, padded(vocab), device=device)
    return raw, torch.randint(vocab, (n,), device=device), vocab


def statistics_job(with_mean: bool) -> Job:
    def problem(device: torch.device, small: bool) -> Problem:
        raw, gold, vocab = _logits(device, small)
        options = {"with_mean": with_mean, "vocab_size": vocab}

        def call(sizes: dict[str, int]) -> Outputs:
            with tuning.forced("row_statistics", sizes):
                found = row_pass.row_statistics(raw, gold, None, 1.0, None, **options)
            return tuple(x for x in found if x is not None)

        def error(found: Outputs) -> float:
            true = raw[:, :vocab].double().log_softmax(1)
            gaps = [excess(found[0], true.gather(1, gold[:, None])[:, 0], 1e-5)]
            return max(gaps + ([excess(found[2], true.mean(1), 1e-5)] if with_mean else []))

        return call, error

    regime = {"with_mean": with_mean}
    return Job("row_statistics", row_pass.statistics_blocks, regime, problem)


def gradient_job() -> Job:
    def problem(device: torch.device, small: bool) -> Problem:
        raw, gold, vocab = _logits(device, small)
        _, log_z, _ = row_pass.row_statistics(raw, gold, None, 1.0, None, vocab_size=vocab)
        weight = torch.ones(len(raw), device=device)
        out = torch.empty_like(raw, dtype=torch.bfloat16)

        def call(sizes: dict[str, int]) -> Outputs:
            with tuning.forced("row_gradient", sizes):
                row_pass.row_gradient(raw, gold, None, 1.0, None, log_z, weight, 0.0, vocab, out)
            return (out,)

        def error(found: Outputs) -> float:
            true = raw[:, :vocab].double().softmax(1)
            true.scatter_add_(1, gold[:, None], -torch.ones_like(true[:, :1]))
            return excess(found[0][:, :vocab], true, 2.0**-7)  # a unit of bfloat16

        return call, error

    return Job("row_gradient", row_pass.gradient_blocks, {}, problem)


def mixture_job(kernel: str, n_passages: int) -> Job:
    def problem(device: torch.device, small: bool) -> Problem:
        raw, gold, vocab = _logits(device, small, n_passages)
        _, log_z, _ = row_pass.row_statistics(raw, gold, None, 1.0, None, vocab_size=vocab)
        prior = torch.randn(len(raw) // n_passages, n_passages, device=device).log_softmax(1)
        weights = [torch.rand_like(prior) for _ in range(2)] + [torch.rand_like(prior[:, 0])]
        out = torch.empty_like(raw)

        def call(sizes: dict[str, int]) -> Outputs:
            head = (None, 1.0, None, *log_z, prior)
            with tuning.forced(kernel, sizes):
                if kernel == "mixture_logp":
                    return mixture_logp.mixture_logp(raw, prior, *head[:3], vocab_size=vocab)
                if kernel == "mixture_statistics":
                    return mixture_pass.mixture_statistics(raw, *head, vocab_size=vocab)
                mixture_pass.mixture_gradient(raw, gold, *head, *weights, out)
            return (out,)

        def error(found: Outputs) -> float:
            logp = raw[:, :vocab].double().log_softmax(1).unflatten(0, prior.shape)  # [G, K, V]
            joint = logp + prior.double().unsqueeze(2)
            mixture = joint.logsumexp(1, keepdim=True)
            if kernel == "mixture_logp":
                return excess(found[0], mixture[:, 0], 1e-5)
            share = (joint - mixture).exp()
            if kernel == "mixture_statistics":
                return max(
                    excess(found[0], mixture.mean(2)[:, 0], 1e-5),
                    excess(found[1], share.mean(2), 1e-4),
                )
            hit, target, spread = (x.double() for x in weights)
            true = target.unsqueeze(2) * logp.exp() - spread[:, None, None] * share
            labels = gold.view(prior.shape).unsqueeze(2)
            true.scatter_add_(2, labels, -hit.unsqueeze(2))
            return excess(found[0][:, :vocab], true.flatten(0, 1), 1e-4)

        return call, error

    block_k = mixture_pass.blocks(n_passages)["BLOCK_K"]
    return Job(kernel, mixture_pass.tiles, {"block_k": block_k}, problem)


def linear_job(dtype: torch.dtype) -> Job:
    def problem(device: torch.device, small: bool) -> Problem:
        n, width, vocab = SMALL_HEAD if small else LARGE_HEAD
        x = torch.randn(n, width, device=device).to(dtype)
        weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype)
        gold = torch.randint(vocab, (n,), device=device)
        n_splits = linear_logp.splits(n, vocab, dtype)

        def call(sizes: dict[str, int]) -> Outputs:
            with tuning.forced("linear_logp", sizes):
                return linear_logp.linear_logp(
                    x, [(slice(0, vocab), weight)], gold, None, 1.0, None, n_splits
                )

        def error(found: Outputs) -> float:
            true = (x.double() @ weight.double().t()).log_softmax(1)
            return excess(found[0], true.gather(1, gold[:, None])[:, 0], 1e-5)

        return call, error

    return Job("linear_logp", linear_logp.blocks, {"dtype": dtype}, problem)


def _jobs() -> list[Job]:
    """Return all jobs, the most important first."""
    half = torch.bfloat16
    found = [search_job(half, n, low) for low in (False, True) for n in (16, 1024, 64, 256, 128)]
    found += [gradient_job(), statistics_job(False), linear_job(half)]
    found += [mixture_job(f"mixture_{k}", 10) for k in ("statistics", "gradient", "logp")]
    found += [statistics_job(True), linear_job(torch.float16), linear_job(torch.float32)]
    found += [search_job(torch.int8, n, True) for n in mips.QUERIES]
    found += [search_job(torch.float32, n, False) for n in mips.QUERIES]
    found += [search_job(torch.float16, n, low) for low in (False, True) for n in mips.QUERIES]
    kinds = ("statistics", "gradient", "logp")
    found += [mixture_job(f"mixture_{k}", n) for n in (4, 50) for k in kinds]
    return found


JOBS = {job.name: job for job in _jobs()}


def fits(job: Job, device: torch.device) -> bool:
    """Return whether this GPU has the regime: without descriptors there is no choice of tiles."""
    return not job.regime.get("use_tma") or triton_mips._has_tma(device)


def run(job: Job, device: torch.device, *, small: bool = False) -> dict[str, Any]:
    """Return the fastest candidate, its time, that of the first one, and a note on each.

    `small`: time at the shape of the check.
    """
    offered = list(job.candidates(**job.regime))
    notes: list[dict[str, Any]] = [{"config": tuning.as_entry(c)} for c in offered]
    problem = job.problem(device, True)
    for candidate, note in zip(offered, notes, strict=True):
        wrong = _wrong(problem, candidate)
        if lost := cuda_error():
            raise RuntimeError(f"{note['config']}: {lost}")
        if wrong:
            note["wrong"] = wrong
    able = [i for i, note in enumerate(notes) if "wrong" not in note]
    call, _ = problem if small else job.problem(device, False)
    calls = {i: partial(call, offered[i]) for i in able}
    n_calls = {i: measure.calls_per_turn(calls[i], device) for i in able}
    times: dict[int, list[float]] = {i: [] for i in able}
    for turn in range(ROUNDS):
        for place in range(len(able)):
            i = able[(turn + place) % len(able)]
            times[i].append(measure.one_turn(calls[i], device, n_calls[i]).wall)
    for i in able:
        notes[i]["ms"] = round(statistics.median(times[i]), 5)
    best = min(able, key=lambda i: notes[i]["ms"], default=None)
    if best is None:
        raise RuntimeError(f"no candidate is right: {notes}")
    return {**notes[best], "first_ms": notes[0].get("ms"), "candidates": notes}


def _wrong(problem: Problem, candidate: Any) -> str:
    call, error_of = problem
    try:
        found = error_of(call(candidate))
    except Exception as error:  # such as one that needs more of a multiprocessor than there is
        return error_text(error)
    return "" if found <= 1.0 else f"the error is {found:.3g} times the allowed one"


def measure_job(name: str) -> tuple[str, str]:
    """Run a job in a child; return what was found as JSON."""
    torch.manual_seed(0)
    found = json.dumps(run(JOBS[name], torch.device("cuda")))
    torch.cuda.empty_cache()
    return PASSED, found


# ------------------------------------------------------------------------------------- the command


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("tune", __doc__)
    kernels = list(dict.fromkeys(job.kernel for job in JOBS.values()))
    known = f"of {', '.join(kernels)}"
    parser.add_argument("--only", nargs="+", type=one_of(kernels), metavar="KERNEL", help=known)
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
    path = folder / f"{found['architecture']}.json"
    choices: dict[str, dict[str, Any]] = tuning.read(path)["choices"] if path.exists() else {}
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
    if not torch.cuda.is_available():
        print("benchmarks.tune: needs an NVIDIA GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    names = [name for name in args.jobs if fits(JOBS[name], device)]
    arch, machine = tuning.architecture(device), measure.facts(device)
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
    # A child finds measure_job by the name of its module, which is not the __main__ of here.
    from benchmarks.tune import main as run_command

    sys.exit(run_command())
