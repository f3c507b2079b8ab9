"""MapFit against literal least squares; VectorMap and its inverse."""

from __future__ import annotations

import pytest
import torch

from fastrag.freshness.maps import FLAT_SHARE, RIDGE, MapFit, VectorMap

D = 3


def test_the_fit_is_the_literal_weighted_least_squares() -> None:
    """Rows sqrt(w) [x, 1, tau x, tau], and one row for each coefficient that is held small."""
    draws = torch.Generator().manual_seed(0)
    fit, half_life = MapFit(D, half_life=5), 5
    pairs = []
    for step in range(12):
        x = torch.randn(6, D, generator=draws, dtype=torch.float64)
        y = x @ torch.randn(D, D, generator=draws, dtype=torch.float64) + 0.1 * step
        pairs.append((x, y))
        if step:
            fit.forget()
        fit.add(x, y)
    tau = torch.arange(-11.0, 1.0, dtype=torch.float64)[:, None].expand(-1, 6).flatten()
    weight = 0.5 ** (-tau / half_life)
    x, y = (torch.cat(each) for each in zip(*pairs, strict=True))
    wide = torch.cat([x, torch.ones(72, 1)], 1)
    n, mean = weight.sum(), (weight[:, None] * x).sum(0) / weight.sum()
    variance = (weight * x.square().sum(1)).sum() / n - mean.square().sum()
    spread = (weight * tau.square()).sum() / n + 1.0
    trend = (RIDGE + FLAT_SHARE * n / D) * variance * spread
    ridge = torch.cat([(RIDGE * variance).expand(D), torch.zeros(1), trend.expand(D + 1)]).double()
    design = weight.sqrt()[:, None] * torch.cat([wide, tau[:, None] * wide], 1)
    design = torch.cat([design, ridge.sqrt().diag()])
    target = torch.cat([weight.sqrt()[:, None] * (y - x), torch.zeros(2 * D + 2, D)])
    found = torch.linalg.lstsq(design, target).solution[: D + 1].T
    solved = fit.solve()
    assert solved is not None and fit.n_pairs == pytest.approx(float(n))
    assert fit.mean_age == pytest.approx(float(-(weight * tau).sum() / n))
    torch.testing.assert_close(solved.matrix, (found[:, :D] + torch.eye(D)).float())
    torch.testing.assert_close(solved.offset, found[:, D].float())


@pytest.mark.parametrize("kind", ["affine", "orthogonal"])
def test_a_drift_is_met_where_it_is_now(kind: str) -> None:
    """A rotation that goes on at constant speed, seen for 60 steps: no lag, and no bias."""
    speed = torch.tensor([[0.0, -0.02, 0.0], [0.02, 0.0, 0.0], [0.0, 0.0, 0.0]])
    draws, fit = torch.Generator().manual_seed(0), MapFit(D, kind)  # type: ignore[arg-type]
    for step in range(60):
        fit.forget()
        x = torch.randn(50, D, generator=draws)
        now = torch.linalg.matrix_exp(step * speed)
        fit.add(x, x @ now.T + 0.5)
    found = fit.solve()
    assert found is not None
    torch.testing.assert_close(found.matrix, now, rtol=0.0, atol=0.02)
    torch.testing.assert_close(found.offset, torch.full((D,), 0.5), rtol=0.0, atol=0.02)
    if kind == "orthogonal":
        torch.testing.assert_close(found.matrix @ found.matrix.T, torch.eye(D))


def test_a_pair_counts_half_after_as_many_as_the_vectors_are_wide() -> None:
    fit = MapFit(100)
    for n_pairs in (20.0, 37.4, 52.6):
        fit.add(torch.randn(20, 100), torch.randn(20, 100))
        assert fit.n_pairs == pytest.approx(n_pairs, abs=0.1)  # 20 pairs of 100: times 2 ** -0.2
        fit.forget()


def test_few_pairs_give_no_map_and_bad_ones_are_told() -> None:
    assert MapFit(D).solve() is None
    with pytest.raises(ValueError, match="half_life: expected at least 1 step or None, got 0"):
        MapFit(D, half_life=0)
    fit = MapFit(D)
    fit.add(torch.ones(50, D), torch.randn(50, D))
    with pytest.raises(ValueError, match="map: expected stored vectors that differ, got equal"):
        fit.solve()
    flat = MapFit(D)
    x = torch.randn(5000, D)
    flat.add(x, x * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="matrix: expected an invertible map, got condition"):
        flat.solve()


def test_a_map_and_its_inverse() -> None:
    torch.manual_seed(0)
    made = VectorMap(torch.eye(D) + 0.3 * torch.randn(D, D), torch.randn(D))
    vectors, query = torch.randn(2, 5, D), torch.randn(4, D)
    torch.testing.assert_close(made.passages(made.stored(vectors)), vectors)
    mapped, shift = made.questions(query)
    scores = mapped @ vectors[0].T + shift[:, None]
    torch.testing.assert_close(scores, query @ made.passages(vectors[0]).T)
    again = VectorMap(**made.state_dict())
    assert torch.equal(again.stored(vectors), made.stored(vectors))
    for matrix, offset, message in (
        (torch.ones(D, D), torch.zeros(D), "matrix: expected an invertible map"),
        (torch.ones(D, 2), torch.zeros(D), r"matrix: expected \[D, D\], got \[3, 2\]"),
        (torch.eye(D), torch.zeros(2), r"offset: expected \[3\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorMap(matrix, offset)
