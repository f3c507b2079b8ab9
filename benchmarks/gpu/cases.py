"""Every kernel at a small shape, through the ops that launch it: for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.cases [NAME ...]

Nothing divides anything, so that every mask is at work. Answers are the business of the tests.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.watch import Recorder, cuda_error

HALF = torch.bfloat16
# compute-sanitizer, a process of its own, may take so long to print what it found in a case.
SETTLE_SECONDS = 0.1
HEAD_SHAPE = (2, 3, 5, 72, 1031)  # B, K, T, H, V
Case = Callable[[torch.device], None]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def keep(function: Case) -> Case:
        CASES[name] = function
        return function

    return keep


def _head(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, bias, doc_scores and labels."""
    n_examples, n_passages, n_tokens, width, vocab = HEAD_SHAPE
    leaves = [
        torch.randn(*shape, device=device).to(kind).requires_grad_()
        for shape, kind in (
            ((n_examples, n_passages, n_tokens, width), dtype),
            ((vocab, width), dtype),
            ((vocab,), dtype),
            ((n_examples, n_passages), torch.float32),
        )
    ]
    labels = torch.randint(vocab, (n_examples, n_tokens), device=device)
    labels[0, -1] = -100
    return [*leaves, labels]


def _loss(device: torch.device, marginal: str, dtype: torch.dtype, **options: Any) -> None:
    import fastrag.functional as F

    op = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}[marginal]
    hidden, weight, bias, scores, labels = _head(device, dtype)
    loss = op(hidden, weight, labels, scores, bias=bias, **options)
    loss.sum().backward()


@case("row_pass, group_pass: token")
def _token(device: torch.device) -> None:
    _loss(device, "token", HALF)


@case("row_pass, group_pass: sequence")
def _sequence(device: torch.device) -> None:
    _loss(device, "sequence", HALF)


@case("row_pass over its logits, softcap")
def _in_place(device: torch.device) -> None:
    _loss(device, "token", torch.float32, softcap=3.0)


@case("mixture_pass")
def _mixture(device: torch.device) -> None:
    _loss(device, "token", HALF, label_smoothing=0.1)


@case("row_pass with mean")
def _smoothed_sequence(device: torch.device) -> None:
    _loss(device, "sequence", HALF, label_smoothing=0.1)


@case("row_pass of slices of the vocabulary")
def _slices(device: torch.device) -> None:
    _loss(device, "sequence", HALF, reduction="none")


def _token_logp(device: torch.device, dtype: torch.dtype) -> None:
    import fastrag.functional as F

    hidden, weight, bias, _, labels = _head(device, dtype)
    F.token_logp(hidden, weight, labels, bias=bias).sum().backward()


@case("linear_logp")
def _linear_logp(device: torch.device) -> None:
    _token_logp(device, HALF)


@case("linear_logp float32")
def _linear_logp_float32(device: torch.device) -> None:
    _token_logp(device, torch.float32)


def _scores(device: torch.device, dtype: torch.dtype, fresh: bool) -> None:
    import fastrag.functional as F

    query = torch.randn(3, 129, device=device, requires_grad=True)
    rows = torch.randint(777, (3, 33), device=device)
    rows[0, -1] = -1
    factors = {}
    if dtype == torch.int8:
        index = torch.randint(-128, 128, (777, 129), dtype=dtype, device=device)
        factors = {name: torch.rand(129, device=device) for name in ("scale", "offset")}
    else:
        index = torch.randn(777, 129, device=device).to(dtype)
        query = query.detach().to(dtype).requires_grad_()
    if fresh:
        index = index[rows.clamp(min=0)].requires_grad_()
    _, prior = F.doc_scores(query, index, rows=rows, return_log_prior=True, **factors)
    torch.where(prior.isinf(), 0.0, prior).square().sum().backward()


@case("doc_scores gathered")
def _gathered(device: torch.device) -> None:
    _scores(device, HALF, fresh=False)


@case("doc_scores fresh")
def _fresh(device: torch.device) -> None:
    _scores(device, torch.float32, fresh=True)


@case("doc_scores int8")
def _scores_int8(device: torch.device) -> None:
    _scores(device, torch.int8, fresh=False)


def _search(
    device: torch.device,
    dtype: torch.dtype,
    n_queries: int,
    dim: int,
    *,
    query_dtype: torch.dtype = torch.float32,
    k: int = 3,
    certain: bool = True,
    n: int = 3001,
) -> None:
    from fastrag.kernels import mips, mips_rescore

    from fastrag.ops import triton_mips

    query = torch.randn(n_queries, dim, device=device).to(query_dtype)
    factors = {}
    if dtype == torch.int8:
        index = torch.randint(-128, 128, (n, dim), dtype=dtype, device=device)
        factors = {name: torch.rand(dim, device=device) for name in ("scale", "offset")}
    else:
        index = torch.randn(n, dim, device=device).to(dtype)
    removed = torch.rand(n, device=device) < 0.1
    if certain:
        triton_mips.search(query, index, k, removed, **factors)
        return
    # A bound that no answer can meet: every group is scored.
    plan = triton_mips.plan_for(query, index, k)
    plan = dataclasses.replace(plan, n_chosen=1, error=1e6)
    norm = mips.max_norm(index, None, None)
    passages = mips_rescore.Passages(index, None, None, removed, None)
    triton_mips.find(query, passages, k, plan, norm)


@case("mips few queries, descriptors")
def _mips_few(device: torch.device) -> None:
    _search(device, HALF, 5, 128)


@case("mips some queries, descriptors")
def _mips_some(device: torch.device) -> None:
    _search(device, HALF, 33, 128)


@case("mips many queries, descriptors")
def _mips_many(device: torch.device) -> None:
    _search(device, HALF, 130, 128)


@case("mips queries in one term")
def _mips_one_term(device: torch.device) -> None:
    _search(device, HALF, 130, 128, query_dtype=HALF)


@case("mips pointers")
def _mips_pointers(device: torch.device) -> None:
    for n_queries in (5, 33, 130):
        _search(device, HALF, n_queries, 33)


@case("mips float32")
def _mips_float32(device: torch.device) -> None:
    _search(device, torch.float32, 33, 128)


@case("mips int8")
def _mips_int8(device: torch.device) -> None:
    _search(device, torch.int8, 33, 128)


@case("mips_rescore of every group")
def _rest(device: torch.device) -> None:
    _search(device, HALF, 3, 40, certain=False, n=700)


@case("mips_rescore of long lists")
def _long_lists(device: torch.device) -> None:
    _search(device, HALF, 3, 40, k=300, certain=False, n=700)


def run(names: Sequence[str], device: torch.device) -> int:
    """Returns 1 if one failed; goes no further where CUDA is lost."""
    recorder = Recorder()
    recorder.say(names=list(names))
    code = 0
    for name in names:
        print(f"case: {name}", flush=True)
        recorder.say(start=name)
        began, text = time.perf_counter(), ""
        try:
            CASES[name](device)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        lost = cuda_error()
        time.sleep(SETTLE_SECONDS)
        text = lost or text
        seconds = round(time.perf_counter() - began, 3)
        recorder.say(
            end=name, outcome="failed" if text else "passed", seconds=seconds, text=text[-2000:]
        )
        if text:
            print(f"failed: {name}: {text}", flush=True)
            code = 1
        if lost:
            break
    return code


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"no case is called {unknown[0]!r}; cases: {', '.join(CASES)}", file=sys.stderr)
        return 2
    # Nothing but the kernels: the other backends launch torch's own.
    os.environ.setdefault("FASTRAG_BACKEND", "triton")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run(names or list(CASES), device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
