"""What the public functions promise as a set; each op has a test file of its own in tests/ops."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
import sys

import pytest
import torch

import fastrag.functional as F
from fastrag.info import collect, info, main
from fastrag.ops import backends, workspace


@pytest.mark.parametrize("name", F.__all__)
def test_is_documented(name: str) -> None:
    """Style: a sentence, an equation, and the sections in their order; every argument by name."""
    function = getattr(F, name)
    doc = inspect.getdoc(function)
    places = [doc.find(f"\n{s}:\n") for s in ("Args", "Returns", "Raises", "Note", "Example")]
    assert all(place > 0 for place in places) and places == sorted(places)
    assert doc.splitlines()[0].endswith(".")
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in doc
    assert "Memory:" in doc and ">>>" in doc


def test_import_is_lean() -> None:
    """Importing the functions needs torch alone: no triton, no transformers, no CUDA context."""
    code = (
        "import sys, fastrag.functional, fastrag.reference, fastrag.info, torch; "
        "loaded = {'triton', 'transformers', 'fastrag.kernels.doc_scores'} & set(sys.modules); "
        "print(sorted(loaded), torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[] False"


def test_a_training_step_through_all_of_it() -> None:
    """Search, score, marginalise, descend: the loss falls and the query learns to retrieve."""
    index = torch.eye(6)
    query = torch.full((1, 6), 0.1, requires_grad=True)
    outputs = torch.zeros(6, 1, 4)  # what the generator says given each passage: [N, T, V]
    outputs[4, 0, 2] = 5.0  # only passage 4 explains label 2
    labels = torch.tensor([[2]])
    losses = []
    for _ in range(60):
        rows = F.mips_topk(query, index, 5)[1]
        scores = F.doc_scores(query, index, rows=rows)
        loss = F.rag_token_nll(outputs[rows], torch.eye(4), labels, scores)
        (grad,) = torch.autograd.grad(loss, query)
        query = (query - 2.0 * grad).detach().requires_grad_()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 1.0 < losses[0] + 0.2
    assert F.mips_topk(query, index, 1)[1].item() == 4


@pytest.mark.parametrize("value", ["0", "-5", "1e6", "many"])
def test_workspace_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workspace.WORKSPACE_VARIABLE, value)
    one = torch.ones(1, 1, dtype=torch.float64)  # which torch searches, by blocks
    with pytest.raises(ValueError, match="FASTRAG_WORKSPACE_BYTES: expected a positive number"):
        F.mips_topk(one, one, 1)


def test_even_slices() -> None:
    assert workspace.even_slices(0, 4) == []
    assert workspace.even_slices(9, 4) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    for total in range(1, 40):
        for limit in range(1, 12):
            cut = workspace.even_slices(total, limit)
            assert [i for s in cut for i in range(s.start, s.stop)] == list(range(total))
            assert len(cut) == -(-total // limit)


def _forget() -> None:
    backends._probe.cache_clear()
    backends._able.cache_clear()


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _forget()
    try:
        assert backends.why_not("torch") == ""
        assert backends.why_not("triton") in (
            "torch sees no CUDA device",
            "the package triton is not installed",
        )
        monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
        with pytest.raises(RuntimeError, match="FASTRAG_BACKEND=triton cannot run doc_scores: "):
            F.doc_scores(torch.ones(1, 2), torch.ones(1, 3, 2))
    finally:
        _forget()


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := backends.why_not("cpp"):
        pytest.skip(reason)
    monkeypatch.setenv(backends.ISA_VARIABLE, "sse9")
    one = torch.ones(1, 1)
    message = r"^FASTRAG_CPU_ISA: expected one of .*scalar.*, got 'sse9'$"
    with pytest.raises(ValueError, match=message):
        F.mips_topk(one, one, 1)
    with pytest.raises(ValueError, match=message):
        F.rag_token_nll(one.view(1, 1, 1, 1), one, torch.zeros(1, 1).long(), one)


def test_info_names_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.why_not("cpp"):
        assert collect()["instruction_sets"] == []
        return
    from fastrag import _C

    best, *_, least = _C.instruction_sets()
    assert f"backend cpp: available, {best}" in info()
    monkeypatch.setenv(backends.ISA_VARIABLE, least)
    assert f"backend cpp: available, {least}" in info()
    reasons = {"amx": "the operating system refuses tiles", "avx512": "no"}
    monkeypatch.setattr(_C, "missing_instruction_sets", lambda: reasons)
    ending = "; not run here: amx (the operating system refuses tiles), avx512 (no)\n"
    assert ending in info()


def test_each_instruction_set_runs_or_has_a_reason() -> None:
    _C = pytest.importorskip("fastrag._C", reason="the extension module is not built")
    missing = _C.missing_instruction_sets()
    assert all(missing.values()) and not set(missing) & set(_C.instruction_sets())
    x86 = {"amx", "avx512", "avx2"} if platform.machine() in ("x86_64", "AMD64") else set()
    assert x86 <= {*missing, *_C.instruction_sets()}
    assert _C.instruction_sets(emulated=True) == [*_C.instruction_sets(), "amx-emulated"]


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    found = collect()
    # Where a wheel comes from may stand in the one and not in the other.
    version = torch.__version__.partition("+")[0]
    assert found["packages"]["torch"].partition("+")[0] == version
    assert set(found["backends"]) == set(backends.names())
    fastest = "torch" if found["backends"]["cpp"] else "cpp"
    assert found["ops"]["marginal_nll"]["cpu"] == fastest
    ops = {"doc_scores", "token_logp", "marginal_nll", "mips_topk", "head_products", "mixture_logp"}
    assert set(found["ops"]) == ops
    text = info()
    main()
    assert capsys.readouterr().out.split() == text.split()  # wrapped at the terminal's width
    assert found["fastrag"]["tree"] in text and found["fastrag"]["kernels"] in text
