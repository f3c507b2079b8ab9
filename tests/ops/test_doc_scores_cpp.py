"""doc_scores in C++: every storage, threads, instruction sets, rows that are not there.

test_doc_scores.py runs it beside the torch backend.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from fastrag import reference
from fastrag.ops import backends
from fastrag.ops.doc_scores import doc_scores, doc_scores_backward_op
from fastrag.testing import assert_close

from .codes import random_codes
from .score_inputs import inputs
from .test_doc_scores import TAU, both

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")

each_storage = pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "int8"])
_GRADIENT = torch.linspace(-1.0, 1.0, 1002).view(2, 501)
UPSTREAM = _GRADIENT, _GRADIENT.cos()


@pytest.fixture(autouse=True)
def _in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpp")


def many(stored: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Enough of it for several threads, with components beyond the last whole cache line."""
    query, index, rows = inputs(torch.float32, (2, 501, 1043, 300))
    rows[1, 3::7] = -1
    if stored == "int8":
        codes = random_codes(300, 1043)
        return query, codes.codes, codes.scale, codes.offset, rows
    return query, index.to(getattr(torch, stored)), None, None, rows


def every_number(stored: str, fresh: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    query, passages, scale, offset, rows = many(stored)
    leaves = [query]
    if fresh:
        passages = passages[rows.clamp(min=0)]
        leaves += [passages.requires_grad_()] if scale is None else []
    scores, prior = both(query, passages, rows, scale=scale, offset=offset)
    return [scores, prior, *torch.autograd.grad((scores, prior), leaves, UPSTREAM)]


@pytest.mark.parametrize("fresh", [False, True], ids=["gathered", "fresh"])
@each_storage
def test_threads_change_no_bit(stored: str, fresh: bool) -> None:
    """Five of them cut the sum over the passages of two questions by columns."""
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(every_number(stored, fresh))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@each_storage
def test_instruction_sets_agree(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: they only widen what is stored."""
    expected = every_number(stored)
    for isa in _C.instruction_sets():
        monkeypatch.setenv(backends.ISA_VARIABLE, isa)
        assert all(torch.equal(a, b) for a, b in zip(every_number(stored), expected, strict=True))


@each_storage
def test_beside_torch(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both against float64, of many passages with several missing."""
    found = every_number(stored)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    plain = every_number(stored)
    torch.manual_seed(0)
    query, passages, scale, offset, rows = many(stored)
    exact = query.detach().double().requires_grad_()
    options = {name: None if x is None else x.double() for name, x in
               (("scale", scale), ("offset", offset))}  # fmt: skip
    scores = reference.doc_scores(exact, passages.double(), rows, TAU, **options)
    prior = reference.log_prior(scores)
    grad = torch.autograd.grad((scores, prior), exact, [g.double() for g in UPSTREAM])
    for name, a, b, c in zip(
        ("scores", "prior", "query"), found, plain, (scores, prior, *grad), strict=True
    ):
        assert_close(a, b, c, name=name)


def test_what_is_missing_is_not_read() -> None:
    """Neither the row before the index, nor its first, nor a query times the gradient zero."""
    query, index, rows = inputs(torch.float32)
    around = torch.full((11, 5), torch.nan)
    around[2:10] = index[1:]
    rows.clamp_(min=1)
    rows[0, -1] = rows[1, 1] = -1
    found = torch.autograd.grad(both(query, around[1:10], rows)[1][:, 2].sum(), query)[0]
    expected = torch.autograd.grad(both(query, index, rows)[1][:, 2].sum(), query)[0]
    assert found.isfinite().all() and torch.equal(found, expected)
    query.detach()[0, 0] = torch.inf
    fresh = index[rows.clamp(min=0)].requires_grad_()
    dfresh = torch.autograd.grad(both(query, fresh, rows)[1][:, 2].sum(), fresh)[0]
    assert (dfresh[rows < 0] == 0).all() and dfresh[0, 0].isnan().any()


def test_refuses_a_row_beyond_the_index() -> None:
    """Past the public function, which has refused it: nothing is read outside the index."""
    query, index, rows = inputs(torch.float32)
    rows[2, 1] = 9
    message = r"rows: expected values below 9, or -1 for none, got 9 at \[2, 1\]"
    with pytest.raises(ValueError, match=message):
        doc_scores(query.detach(), index, rows, TAU)
    with pytest.raises(ValueError, match=message):
        doc_scores_backward_op(
            None, torch.ones(3, 4), torch.zeros(3, 4), query.detach(), index, rows, TAU, True, False
        )


def test_memory_comes_as_an_array_or_as_dlpack() -> None:
    query, index, rows = (x.detach() for x in inputs(torch.float32))
    results = []
    for give in (torch.Tensor.numpy, to_dlpack):
        out = torch.empty(2, 3, 4)
        _C.doc_scores(*map(give, (query, index, rows)), TAU, None, None, 1, "", *map(give, out))
        results.append(out)
    assert torch.equal(*results) and results[0][1, 1].isfinite().all()


@pytest.mark.parametrize(
    ("place", "given", "message"),
    [
        (0, torch.zeros(3, 5).double(), r"query_emb: expected float32 \[n, n\], got format ''"),
        (0, torch.zeros(3, 1, 5), r"query_emb: expected .* got format 'f' \[3, 1, 5\]"),
        (0, torch.zeros(5, 3).t(), r"query_emb: expected numbers without gaps .* \[4, 12\] bytes"),
        (1, torch.zeros(9, 6), r"index_emb: expected float32 \[n, 5\], got format 'f' \[9, 6\]"),
        (1, torch.zeros(9, 5).bool(), r"index_emb: expected float32 \[n, 5\], got format '\?'"),
        (2, torch.zeros(3, 4).int(), r"rows: expected int64 \[3, n\], got format 'i' \[3, 4\]"),
        (8, torch.zeros(4, 3), r"scores: expected float32 \[3, 4\], got format 'f' \[4, 3\]"),
    ],
)
def test_refuses_other_memory(place: int, given: Tensor, message: str) -> None:
    query, index, rows = (x.detach() for x in inputs(torch.float32))
    out = torch.empty(2, 3, 4)
    args = [query, index, rows, TAU, None, None, 1, "", *out]
    args[place] = given
    with pytest.raises(ValueError, match=message):
        _C.doc_scores(*(to_dlpack(x) if isinstance(x, Tensor) else x for x in args))


def test_refuses_what_is_no_memory() -> None:
    """Nor a capsule that has been taken already."""
    used = to_dlpack(torch.zeros(3, 5))
    from_dlpack(used)
    for x in (used, [1.0], None):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _C.doc_scores(x, x, x, TAU, None, None, 1, "", x, x)
