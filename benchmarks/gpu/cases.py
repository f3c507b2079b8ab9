"""Every kernel at a small shape, through the ops that launch it, for compute-sanitizer.

Nothing divides anything, so that every mask is at work. The tests check the answers.

The tool prints reports: a line "========= " and text, followed by indented details. Those of
memcheck name the access, those of racecheck both accesses:

    ========= Invalid __global__ read of size 4 bytes
    =========     at _some_kernel+0x780 in file.py:61
    ========= Error: Race reported between Write access at _some_kernel+0x150 in file.py:27
    =========     and Read access at _some_kernel+0x160 in file.py:30 [4096 hazards]

Only races in the kernels of fastrag, which are called _..._kernel, count as faults: those of a
library are its authors' business.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.isolation import FAILED, PASSED, Record, cuda_error, piece
from benchmarks.ops.heads import PAD
from benchmarks.ops.marginal_loss import Problem, make_checked

CODE = 99
_MOST = 5  # reports of a case that are kept
_DETAILS = 3
_LINE = re.compile(r"^={9}(?: (.*))?$")
# No faults: a title, a count, what racecheck cannot follow, a call to CUDA that was refused, and
# how the program ended, which is known.
_HARMLESS = re.compile(
    r"COMPUTE-SANITIZER|.*SUMMARY: |Warning: Detected overflow of tracked|Program hit |Saved "
    r"|(?:Error: )?(?:Target application|[Pp]rocess didn't terminate)"
)
_RACE = re.compile(r"\w+: (Race reported|Potential \w+ hazard)")
_OURS = re.compile(r"\b_\w+_kernel\b")
_COUNT = re.compile(r"^={9} \w+ SUMMARY: ([1-9]\d* .*)$", re.M)

HALF, FLOAT, INT8 = torch.bfloat16, torch.float32, torch.int8
# compute-sanitizer, a process of its own, may take this long to print the faults of a case.
SETTLE_SECONDS = 0.1
# Other backends launch torch's kernels. Each tensor gets an allocation of its own, so that the
# memory next to it belongs to nobody.
ENV = {"FASTRAG_BACKEND": "triton", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
HEAD_SHAPE = (2, 3, 5, 72, 1031)  # B, K, T, H, V


def _head(device: torch.device, dtype: torch.dtype) -> tuple[Problem, dict[str, Any]]:
    """Return hidden states, weight, scores and labels, with the options that all ops take."""
    bias = torch.randn(HEAD_SHAPE[-1], device=device).to(dtype).requires_grad_()
    return make_checked(HEAD_SHAPE, dtype, device), {"bias": bias, "ignore_index": PAD}


def _loss(marginal: str, dtype: torch.dtype, device: torch.device, **options: Any) -> None:
    import fastrag.functional as F

    op = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}[marginal]
    p, common = _head(device, dtype)
    op(p.hidden, p.weight, p.labels, p.doc_scores, **common, **options).sum().backward()


def _token_logp(dtype: torch.dtype, device: torch.device) -> None:
    import fastrag.functional as F

    p, common = _head(device, dtype)
    F.token_logp(p.hidden, p.weight, p.labels, **common).sum().backward()


def _mixture_logp(dtype: torch.dtype, device: torch.device) -> None:
    from fastrag.ops.mixture_logp import mixture_logp

    hidden = torch.randn(3, 5, 72, device=device).to(dtype)
    weight, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((5131, 72), (5131,)))
    prior = torch.randn(3, 5, device=device).log_softmax(1)
    mixture_logp(hidden, weight, prior, bias, 3.0, 1.0)


def _vectors(
    n_rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the rows of an index, with the factors that int8 has."""
    if dtype != INT8:
        return torch.randn(n_rows, dim, device=device).to(dtype), {}
    codes = torch.randint(-128, 128, (n_rows, dim), dtype=dtype, device=device)
    return codes, {name: torch.rand(dim, device=device) for name in ("scale", "offset")}


def _scores(dtype: torch.dtype, device: torch.device, *, fresh: bool = False) -> None:
    import fastrag.functional as F

    query = torch.randn(3, 129, device=device).to(FLOAT if dtype == INT8 else dtype)
    query.requires_grad_()
    rows = torch.randint(777, (3, 33), device=device)
    rows[0, -1] = -1
    index, factors = _vectors(777, 129, dtype, device)
    if fresh:
        index = index[rows.clamp(min=0)].requires_grad_()
    _, prior = F.doc_scores(query, index, rows=rows, return_log_prior=True, **factors)
    torch.where(prior.isinf(), 0.0, prior).square().sum().backward()


def _search(
    dtype: torch.dtype,
    n_queries: int,
    dim: int,
    device: torch.device,
    *,
    query_dtype: torch.dtype = FLOAT,
    k: int = 3,
    certain: bool = True,
    n: int = 3001,
) -> None:
    from fastrag.kernels import mips, mips_rescore

    from fastrag.ops import triton_mips

    query = torch.randn(n_queries, dim, device=device).to(query_dtype)
    index, factors = _vectors(n, dim, dtype, device)
    removed = torch.rand(n, device=device) < 0.1
    if certain:
        triton_mips.search(query, index, k, removed, **factors)
        return
    # With a bound that no answer can meet, every group is scored.
    plan = triton_mips.plan_for(query, index, k)
    plan = dataclasses.replace(plan, n_chosen=1, error=1e6)
    norm = mips.max_norm(index, None, None)
    passages = mips_rescore.Passages(index, None, None, removed, None)
    triton_mips.find(query, passages, k, plan, norm)


def _pointers(device: torch.device) -> None:
    for n_queries in (5, 33, 130):
        _search(HALF, n_queries, 33, device)


CASES: dict[str, Callable[[torch.device], object]] = {
    "row_pass, group_pass: token": partial(_loss, "token", HALF),
    "row_pass, group_pass: sequence": partial(_loss, "sequence", HALF),
    "row_pass over its logits, softcap": lambda on: _loss("token", FLOAT, on, softcap=3.0),
    "mixture_pass": lambda on: _loss("token", HALF, on, label_smoothing=0.1),
    "row_pass with mean": lambda on: _loss("sequence", HALF, on, label_smoothing=0.1),
    "row_pass of slices of the vocabulary": lambda on: _loss(
        "sequence", HALF, on, reduction="none"
    ),
    "linear_logp": partial(_token_logp, HALF),
    "linear_logp float32": partial(_token_logp, FLOAT),
    "mixture_logp": partial(_mixture_logp, HALF),
    "doc_scores gathered": partial(_scores, HALF),
    "doc_scores fresh": lambda on: _scores(FLOAT, on, fresh=True),
    "doc_scores int8": partial(_scores, INT8),
    "mips few queries, descriptors": partial(_search, HALF, 5, 128),
    "mips some queries, descriptors": partial(_search, HALF, 33, 128),
    "mips many queries, descriptors": partial(_search, HALF, 130, 128),
    "mips queries in one term": lambda on: _search(HALF, 130, 128, on, query_dtype=HALF),
    "mips pointers": _pointers,
    "mips float32": partial(_search, FLOAT, 33, 128),
    "mips int8": partial(_search, INT8, 33, 128),
    "mips_rescore of every group": lambda on: _search(HALF, 3, 40, on, certain=False, n=700),
    "mips_rescore of long lists": lambda on: _search(HALF, 3, 40, on, k=300, certain=False, n=700),
}


def run(name: str) -> tuple[str, str]:
    """Run one case in a child of the suite; its name precedes what a sanitizer prints about it."""
    print(f"case: {name}", flush=True)
    try:
        CASES[name](torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        cuda_error()  # waits for the kernels
        time.sleep(SETTLE_SECONDS)
    return PASSED, ""


# --------------------------------------------------------------------- output of compute-sanitizer


def wrapper(program: str, tool: str) -> list[str]:
    """Return the beginning of a command that runs under compute-sanitizer."""
    words = [program, "--tool", tool, "--error-exitcode", str(CODE)]
    # Past its limit it stops printing, and whatever follows would look sound.
    words += ["--print-limit", "10000", "--show-backtrace", "no"]
    words += ["--target-processes", "application-only"]
    if tool == "memcheck":
        words += ["--report-api-errors", "no"]  # torch makes calls that may be refused
    return words


def reports(output: str) -> list[str]:
    """Return the faults that the tool found, each with its first details, in lines."""
    found: list[list[str]] = []
    for line in output.splitlines():
        match = _LINE.match(line.rstrip())
        text = (match[1] or "") if match else ""
        if text.startswith(" "):
            if found:
                found[-1].append(text.strip())
        elif text:
            found.append([text])
    return ["\n".join(lines[: 1 + _DETAILS]) for lines in found if _is_fault("\n".join(lines))]


def _is_fault(report: str) -> bool:
    if _HARMLESS.match(report):
        return False
    return not _RACE.match(report) or bool(_OURS.search(report))


def with_reports(record: Record, output: str) -> Record:
    """Return the record of a case with the reports printed after its name, which make it fail."""
    part = re.search(rf"^case: {re.escape(record.name)}\n(.*?)(?=^case: |\Z)", output, re.M | re.S)
    found = reports(part[1]) if part else []
    if not found or record.outcome not in (PASSED, FAILED):
        return record
    # First, since they say where; CUDA only says that there was a fault.
    text = "\n".join([*found[:_MOST], *([record.text] if record.text else [])])
    return dataclasses.replace(record, outcome=FAILED, text=text)


def unexplained(records: Iterable[Record], output: str) -> str:
    """Return the counts of the tool if no case failed, "" if they are zero."""
    if any(record.bad for record in records):
        return ""
    counts = _COUNT.findall(output)
    return f"counted, but not in our kernels: {', '.join(counts)}" if counts else ""


def main(name: str) -> int:
    """Run a case in this process; return 1 if it failed, 2 if there is none of this name."""
    if name not in CASES:
        print(f"no case is called {name!r}; cases: {', '.join(CASES)}", file=sys.stderr)
        return 2
    os.environ.update(ENV)
    torch.manual_seed(0)
    outcome, text, _ = piece(run, name)
    if outcome == FAILED:
        print(f"failed: {name}: {text}", flush=True)
    return int(outcome == FAILED)
