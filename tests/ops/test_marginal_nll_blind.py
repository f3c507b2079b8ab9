"""RAG-Token and RAG-Sequence where the host may not look at values, as on a GPU; `valid_rows`."""

from __future__ import annotations

import pytest
import torch

from fastrag import reference

from .cases import (
    IGNORE,
    LOSSES,
    SHAPES,
    both_marginals,
    grads,
    make,
    oracle,
    with_and_without_smoothing,
)


@both_marginals
def test_valid_rows(marginal: str) -> None:
    p = make()
    valid = (p.labels != IGNORE).view(-1).nonzero().squeeze(1).int()
    valid = torch.nn.functional.pad(valid, (0, 5), value=-1)
    torch.testing.assert_close(
        LOSSES[marginal](*p.args(), valid_rows=valid), LOSSES[marginal](*p.args())
    )
    with pytest.raises(ValueError, match="valid_rows: expected the ascending positions"):
        LOSSES[marginal](*p.args(), valid_rows=valid.flip(0))


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("listed", [False, True], ids=["all positions", "valid_rows"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_blind(
    marginal: str,
    smoothing: float,
    listed: bool,
    shape: tuple[int, ...],
    workspace: str,
    blind: None,
) -> None:
    """Positions that do not count are visited, examples are cut anywhere: the same in the end."""
    p = make(shape, head="softcap")
    with torch.no_grad():
        if shape[0] > 1:
            p.doc_scores[1] = -torch.inf  # its positions stand in valid_rows all the same
        p.hidden[0, :, p.labels[0] == IGNORE] = torch.nan
    valid = torch.nn.functional.pad((p.labels != IGNORE).view(-1).nonzero()[:, 0], (0, 9), value=-1)
    options = {**p.head(), "label_smoothing": smoothing, "valid_rows": valid if listed else None}
    loss, posterior = LOSSES[marginal](
        *p.args(), **options, reduction="none", return_posterior=True
    )
    finite = p.to(torch.float64)
    finite.hidden = p.hidden.detach().nan_to_num(0.0).requires_grad_()
    true, true_posterior = oracle(marginal, finite, smoothing)
    torch.testing.assert_close(loss, true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior, true_posterior, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(loss)
    found, expected = grads(loss, p, upstream), grads(true, finite, upstream)
    found_mean = grads(LOSSES[marginal](*p.args(), **options), p)
    expected_mean = grads(
        reference.reduce(oracle(marginal, finite, smoothing)[0], p.labels), finite
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found_mean[name], expected_mean[name], rtol=1e-11, atol=1e-12)


@both_marginals
@pytest.mark.parametrize("what", ["label", "score", "infinite score"])
def test_blind_bad_values_are_nan(marginal: str, what: str, workspace: str, blind: None) -> None:
    """The example's loss and gradients are NaN, and those of the other as if it were alone."""
    p = make()
    with torch.no_grad():
        if what == "label":
            p.labels[1, 2] = 7
        else:
            p.doc_scores[1, 0] = torch.nan if what == "score" else torch.inf
    loss = LOSSES[marginal](*p.args(), reduction="none")
    alone = LOSSES[marginal](
        p.hidden[:1], p.weight, p.labels[:1], p.doc_scores[:1], reduction="none"
    )
    assert loss[1].isnan()
    torch.testing.assert_close(loss[:1], alone)
    found = grads(LOSSES[marginal](*p.args()), p)
    assert found["hidden"][1].isnan().any() and found["doc_scores"][1].isnan().any()
    assert found["hidden"][0].isfinite().all() and found["doc_scores"][0].isfinite().all()


@both_marginals
@pytest.mark.parametrize("kind", ["beyond", "lacking", "twice"])
def test_blind_wrong_valid_rows_are_nan(
    marginal: str, kind: str, workspace: str, blind: None
) -> None:
    """A list that is not that of the labels is no fault in memory and no silently wrong loss."""
    p = make()
    expected = LOSSES[marginal](*p.args(), reduction="none")
    valid = [0, 1, 2, 4, 5, 6, 7]  # of 2 * 4 positions; 3 is ignored
    valid[-1] = {"beyond": 8, "lacking": -1, "twice": 6}[kind]
    rows = torch.tensor(valid, dtype=torch.int32)
    loss = LOSSES[marginal](*p.args(), reduction="none", valid_rows=rows)
    assert loss[1].isnan()
    torch.testing.assert_close(loss[0], expected[0])
    found = grads(LOSSES[marginal](*p.args(), valid_rows=rows), p)
    assert found["hidden"][1].isnan().any() and found["weight"].isnan().any()
    assert found["doc_scores"][1].isnan().all() and found["doc_scores"][0].isfinite().all()
