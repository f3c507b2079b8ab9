"""What doc_scores refuses: wrong arguments, forward-mode derivatives and second ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastrag.functional as F

from .codes import random_codes
from .score_inputs import finite, inputs, int8_inputs


@pytest.mark.parametrize("place", [0, 1])
def test_forward_mode_is_refused(place: int) -> None:
    query, index, rows = inputs()
    args = [query.detach(), index]

    def f(x: Tensor) -> Tensor:
        return F.doc_scores(*[x if i == place else args[i] for i in (0, 1)], rows=rows)

    with pytest.raises(RuntimeError, match="doc_scores does not support forward-mode"):
        torch.func.jvp(f, (args[place],), (torch.ones_like(args[place]),))


@pytest.mark.parametrize("name", ["scale", "offset"])
def test_int8_forward_mode_is_refused(name: str) -> None:
    query, stored, rows = int8_inputs(torch.float32)
    more = stored.options()

    def f(x: Tensor) -> Tensor:
        return F.doc_scores(query.detach(), stored.codes, rows=rows, **more | {name: x})

    with pytest.raises(RuntimeError, match="doc_scores does not support forward-mode"):
        torch.func.jvp(f, (more[name],), (torch.ones(5),))


@pytest.mark.parametrize("stored", ["float64", "int8"])
def test_double_backward_is_refused(stored: str) -> None:
    query, index, rows = inputs()
    codes = random_codes(9, 5)
    passages = (index, {}) if stored == "float64" else (codes.codes, codes.options())
    scores = finite(F.doc_scores(query, passages[0], rows=rows, **passages[1]))
    grad = torch.autograd.grad(scores.square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="doc_scores does not support double backward"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_emb": torch.zeros(3)}, r"query_emb: expected \[B, D\], got \[3\] float32"),
        ({"query_emb": torch.zeros(3, 5).long()}, "query_emb: expected a floating point dtype"),
        ({"passage_emb": torch.zeros(9, 4)}, r"passage_emb: expected \[N, D\].*\[\*, 5\], got"),
        ({"passage_emb": torch.zeros(2, 4, 5)}, r"passage_emb: expected \[B, K, D\].*\[3, \*, 5"),
        (
            {"passage_emb": torch.zeros(3, 0, 5), "rows": None},
            r"passage_emb: expected at least one .* K = 0 .*query_emb \[3, 5\].* \[3, 0, 5\]",
        ),
        (
            {"passage_emb": torch.zeros(3, 0, 5), "rows": torch.zeros(3, 0).long()},
            "passage_emb: expected at least one passage per question",
        ),
        ({"passage_emb": torch.zeros(0, 5)}, "passage_emb: expected at least one row"),
        ({"rows": None}, r"rows: expected \[B, K\] because passage_emb is the index matrix"),
        (
            {"rows": torch.zeros(3, 0).long()},
            r"rows: expected at least one .* K = 0 .*passage_emb \[9, 5\].*rows \[3, 0\] int64",
        ),
        ({"rows": torch.zeros(3, 4)}, "rows: expected int64 or int32, got .* float32"),
        ({"rows": torch.full((3, 4), 9)}, r"rows: expected values in \[0, 9\).* got 9 at \[0, 0"),
        ({"rows": torch.full((3, 4), -2)}, r"rows: expected values in .* got -2 at \[0, 0\]"),
        ({"tau": 0.0}, "tau: expected a positive number, got 0.0"),
        ({"tau": "warm"}, "tau: expected a positive number, got 'warm'"),
        ({"tau": float("nan")}, "tau: expected a positive number, got nan"),
        ({"tau": torch.tensor(-1.0)}, "tau: expected a positive number, got -1.0"),
        ({"tau": torch.ones(1)}, "tau: expected a positive number or a 0-d tensor"),
    ],
)
def test_rejects_bad_input(changes: dict[str, object], message: str) -> None:
    query, index, rows = inputs(torch.float32)
    args = {"query_emb": query, "passage_emb": index, "rows": rows, **changes}
    with pytest.raises(ValueError, match=message):
        F.doc_scores(args.pop("query_emb"), args.pop("passage_emb"), **args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, r"scale: expected \[D\] float32 .* passage_emb \[9, 5\] int8, got None"),
        ({"scale": 0.1}, "scale: expected a tensor, got float"),
        ({"scale": torch.ones(4)}, r"scale: expected \[D\] with sizes \[5\], got \[4\] float32"),
        ({"scale": torch.tensor(0.1)}, r"scale: expected \[D\] with sizes \[5\], got \[\] float32"),
        ({"scale": torch.ones(9, 1)}, r"scale: expected \[D\] with sizes \[5\], got \[9, 1\]"),
        ({"scale": torch.ones(5).half()}, r"scale: expected float32, got \[5\] float16"),
        ({"scale": torch.ones(5).double()}, r"scale: expected float32, got \[5\] float64"),
        ({"scale": torch.ones(5, device="meta")}, "one device, got .*scale on meta"),
        (
            {"scale": torch.ones(5, requires_grad=True)},
            r"scale: expected a tensor without requires_grad.* got \[5\] float32 with",
        ),
        ({"offset": torch.ones(6)}, r"offset: expected \[D\] with sizes \[5\], got \[6\] float32"),
        ({"offset": torch.ones(5).long()}, r"offset: expected float32, got \[5\] int64"),
        ({"offset": torch.ones(5, device="meta")}, "one device, got .*offset on meta"),
        (
            {"offset": torch.ones(5, requires_grad=True)},
            r"offset: expected a tensor without requires_grad",
        ),
        (
            {"passage_emb": torch.zeros(9, 5)},
            r"scale: expected None, .* int8 .* got \[5\] float32 with passage_emb \[9, 5\]",
        ),
        (
            {"passage_emb": torch.zeros(9, 5), "scale": None},
            r"offset: expected None, .* int8 .* got \[5\] float32 with passage_emb \[9, 5\]",
        ),
        (
            {"passage_emb": torch.zeros(9, 5, dtype=torch.uint8)},
            r"passage_emb: expected a floating point dtype or int8, got \[9, 5\] uint8",
        ),
        ({"passage_emb": None}, "passage_emb: expected a tensor, got NoneType"),
    ],
)
def test_int8_rejects_bad_input(changes: dict[str, object], message: str) -> None:
    query, stored, rows = int8_inputs(torch.float32)
    args = {"passage_emb": stored.codes, "rows": rows, **stored.options(), **changes}
    with pytest.raises(ValueError, match=message):
        F.doc_scores(query, args.pop("passage_emb"), **args)
