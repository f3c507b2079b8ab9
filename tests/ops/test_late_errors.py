"""What only values on a GPU can tell: NaN at once, an error in the next call, none after that."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrag.functional as F
from fastrag.ops import backends, late_errors
from fastrag.ops.positions import check_values

from .cases import IGNORE, LOSSES, SHAPES, Problem, both_marginals, grads, make

CPU = torch.device("cpu")


def spoil(p: Problem, what: str) -> tuple[dict[str, Tensor], str]:
    """Puts a fault into the second example; returns options of the call and the error to come."""
    valid = torch.tensor([0, 1, 2, 4, 5, 6, 7], dtype=torch.int32)  # position 3 is ignored
    with torch.no_grad():
        if what in ("label", "label below 0"):
            p.labels[1, 2] = value = 7 if what == "label" else -7
            return {}, rf"^labels: expected values in \[0, 7\) .* got {value} at \[1, 2\]"
        if what in ("nan", "inf"):
            p.doc_scores[1, 0] = float(what)
            return {}, rf"^doc_scores: expected finite values, .* got {what} at \[1, 0\]"
    valid[-1], times = {"lacking": (-1, 0), "twice": (6, 2)}[what]
    place = [1, 3] if what == "lacking" else [1, 2]
    start = r"^valid_rows: expected the ascending positions b \* T \+ t .* got that of \["
    return {"valid_rows": valid}, rf"{start}{place[0]}, {place[1]}\] {times} times"


@both_marginals
@pytest.mark.parametrize("what", ["label", "label below 0", "nan", "inf", "lacking", "twice"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_told_by_the_next_call(
    marginal: str, what: str, reduction: str, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    """NaN, ValueError, and the record is clear; the text is that of a CPU, and says where."""
    good = make()
    expected = LOSSES[marginal](*good.args(), reduction=reduction)
    p = copy.deepcopy(good)
    options, message = spoil(p, what)
    loss = LOSSES[marginal](*p.args(), reduction=reduction, **options)
    assert loss.isnan().any()
    with pytest.raises(ValueError, match=message + r" \(in an earlier call, on cpu\)$"):
        LOSSES[marginal](*good.args(), reduction=reduction)
    for _ in range(2):
        assert torch.equal(LOSSES[marginal](*good.args(), reduction=reduction), expected)
    monkeypatch.undo()  # a CPU
    with pytest.raises(ValueError, match=message + "$"):
        LOSSES[marginal](*p.args(), reduction=reduction, **options)


@both_marginals
@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
@pytest.mark.parametrize("what", ["label", "nan", "inf", "twice"])
def test_nan_for_that_example_only(
    marginal: str, backend: str, what: str, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    """Triton in its interpreter."""
    if reason := backends.why_not(backend):
        pytest.skip(reason)
    if backend == "triton" and not backends.interpreting():
        pytest.skip("its launchers take CPU tensors under TRITON_INTERPRET=1")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, backend)
    p = make().to(torch.float32)
    expected = LOSSES[marginal](*p.args(), reduction="none")
    options, message = spoil(p, what)
    loss = LOSSES[marginal](*p.args(), reduction="none", **options)
    assert torch.equal(loss[:1], expected[:1]) and loss[1].isnan()
    with pytest.raises(ValueError, match=message):
        LOSSES[marginal](*make().to(torch.float32).args())


def test_token_logp(late: None) -> None:
    """Told by the backward already, which is a call of its own, and by another op."""
    p = make()
    p.labels[0, 1] = 99
    logp = F.token_logp(p.hidden, p.weight, p.labels)
    assert logp[0, :, 1].isnan().all() and logp[1].isfinite().all()
    with pytest.raises(ValueError, match=r"got 99 at \[0, 1\] \(in an earlier call, on cpu\)"):
        logp.sum().backward()
    F.token_logp(p.hidden, p.weight, p.labels)
    with pytest.raises(ValueError, match=r"got 99 at \[0, 1\] \(in an earlier call, on cpu\)"):
        F.rag_token_nll(*make().args())


@both_marginals
def test_all_faults_of_a_call_are_told_together(marginal: str, late: None) -> None:
    p = make()
    with torch.no_grad():
        p.doc_scores[1, 2] = torch.nan
        p.labels[1, 0] = 8
    LOSSES[marginal](*p.args())
    with pytest.raises(ValueError, match=r"doc_scores: .* got nan at \[1, 2\]; labels: .* got 8 "):
        LOSSES[marginal](*make().args())
    LOSSES[marginal](*make().args())


def test_the_first_fault_is_kept(monkeypatch: pytest.MonkeyPatch, late: None) -> None:
    """However many calls pass before the host sees it: a later one, good or bad, hides nothing."""
    raise_late = late_errors.raise_late
    monkeypatch.setattr(late_errors, "raise_late", lambda device: None)  # the copy is on its way
    for value, t in ((71, 3), (5, 3), (72, 0)):
        p = make()
        p.labels[1, t] = value
        F.rag_token_nll(*p.args())
    other = make(SHAPES["one token"])
    other.labels[2, 0] = 73  # another shape has a record of its own
    F.rag_token_nll(*other.args())
    monkeypatch.setattr(late_errors, "raise_late", raise_late)
    with pytest.raises(ValueError, match=r"got 71 at \[1, 3\]; .* got 73 at \[2, 0\] \(in"):
        F.rag_token_nll(*make().args())
    F.rag_token_nll(*make().args())


class Launches(TorchDispatchMode):
    """The operations that are run, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_good_call_launches_little(late: None) -> None:
    """Two operations for each check and one copy; the one number that is read is the host's."""
    p = make()
    counted = p.labels != IGNORE
    for _ in range(2):
        with Launches() as launches:
            check_values(p.labels, counted, 7, p.doc_scores.detach(), None)
    made = ["clamp", "ne", "bitwise_and", "threshold", "mul"]  # what a CPU looks at
    look = ["any", "_local_scalar_dense"]
    assert launches.names == [*made, *look, *["where", "any"] * 2, "copy_"]


def test_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the error is raised at once: no record is made, and none is asked for."""
    late_errors.forget()
    F.rag_token_nll(*make().args())
    assert not late_errors._devices


def test_compiled(late: None) -> None:
    """The records are kept where the op runs, not where it is traced."""
    p = make()
    compiled = torch.compile(F.rag_token_nll, fullgraph=True, backend="aot_eager")
    compiled(*p.args())
    p.labels[1, 2] = 7
    loss = compiled(*p.args())
    assert loss.isnan()
    with pytest.raises(ValueError, match=r"labels: .* got 7 at \[1, 2\] \(in an earlier call"):
        compiled(*p.args())


def test_inference_mode(late: None) -> None:
    """Records made there may be written outside of it, and the other way round."""
    p = make()
    with torch.inference_mode():
        F.rag_token_nll(*p.args())
    F.rag_token_nll(*p.args())
    p.labels[1, 2] = 7
    F.rag_token_nll(*p.args())
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got 7 at \[1, 2\]"):
        F.rag_token_nll(*p.args())


def test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, late: None) -> None:
    """Nothing is raised and no memory is taken: what is known by then is recorded all the same."""
    p, new = make(), make(SHAPES["one token"])
    monkeypatch.setattr(late_errors, "_capturing", lambda device: True)
    p.labels[1, 2] = 7
    F.rag_token_nll(*p.args())
    assert not late_errors._devices
    monkeypatch.setattr(late_errors, "_capturing", lambda device: False)
    F.rag_token_nll(*make().args())  # warms up
    monkeypatch.setattr(late_errors, "_capturing", lambda device: True)
    here = late_errors._devices[CPU]
    here.used = len(here.block)
    n_records = len(here.records)
    new.labels[0, 0] = 7
    F.rag_token_nll(*new.args())  # another shape, and no room for it
    assert len(here.records) == n_records and not here.seen.any()
    for _ in range(2):
        F.rag_token_nll(*p.args())
    assert here.seen.any()
    monkeypatch.setattr(late_errors, "_capturing", lambda device: False)
    with pytest.raises(ValueError, match=r"got 7 at \[1, 2\]"):
        F.rag_token_nll(*p.args())


def test_many_shapes(monkeypatch: pytest.MonkeyPatch, late: None) -> None:
    """Blocks are added as shapes come, until there are too many; those still compute."""
    monkeypatch.setattr(late_errors, "_BLOCK_BYTES", 2048)
    monkeypatch.setattr(late_errors, "MAX_RECORDS", 20)
    told = 0
    for n_tokens in range(1, 40):
        p = make((2, 3, n_tokens, 5, 7))
        p.labels[1, 0] = 50
        assert F.rag_token_nll(*p.args(), reduction="none")[1].isnan()
        try:
            late_errors.raise_late(CPU)
        except ValueError:
            told += 1
    assert len(late_errors._devices[CPU].records) == 20  # one of scores, the others of labels
    assert told == 19


def test_threads_share_the_records(late: None) -> None:
    p = make()
    p.labels[1, 2] = 7
    thread = threading.Thread(target=F.rag_token_nll, args=p.args())
    thread.start()
    thread.join()
    with pytest.raises(ValueError, match=r"got 7 at \[1, 2\] \(in an earlier call, on cpu\)"):
        F.rag_token_nll(*make().args())


def test_a_flag_without_a_fault_raises_nothing(late: None) -> None:
    """As two streams at one record could leave it, or a copy that was on its way at the error."""
    p, bad = make(), make()
    bad.labels[1, 2] = 7
    expected = F.rag_token_nll(*p.args())
    F.rag_token_nll(*bad.args())
    with pytest.raises(ValueError, match=r"got 7 at \[1, 2\]"):
        F.rag_token_nll(*p.args())
    here = late_errors._devices[CPU]
    assert not here.seen.any()
    here.seen.fill_(True)
    assert torch.equal(F.rag_token_nll(*p.args()), expected)
    assert not here.seen.any()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("n_listed", [None, 0, 4], ids="valid_rows={}".format)
def test_empty(sizes: tuple[int, int, int], n_listed: int | None) -> None:
    """Also where valid_rows is nothing but padding."""
    p = make((*sizes, 5, 7), padding=False, missing=False)
    valid_rows = None if n_listed is None else torch.full((n_listed,), -1, dtype=torch.int32)
    for _ in range(2):
        loss = F.rag_token_nll(*p.args(), valid_rows=valid_rows)
        assert all((g == 0).all() for g in grads(loss, p).values())


@pytest.mark.slow  # a process of its own imports all of torch
def test_exit_is_silent() -> None:
    code = (
        "import torch, fastrag.functional as F; from fastrag.ops import checks; "
        "checks.readable = lambda x: False; "
        "F.token_logp(torch.zeros(1, 1, 1, 4), torch.zeros(7, 4), torch.tensor([[9]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
