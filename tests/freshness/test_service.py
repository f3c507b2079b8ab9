"""The service in one process: write-back, measured staleness, the map, encoding under a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrag import IndexRefresher
from fastrag.freshness import Refresh, lanes, refresher
from fastrag.freshness.staleness import age_histogram, drift_of, rank_correlation
from fastrag.index import encode_passages
from fastrag.nn.retriever import Retriever
from tests import tiny
from tests.freshness import drifting

ROWS = torch.tensor([[3, 5, 7], [5, 9, -1]])


def questions(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def all_vectors(made: Retriever) -> Tensor:
    return made.vectors(torch.arange(len(made.index)))


def true_drift(made: Retriever) -> float:
    table: Any = made.passage_encoder
    return float(drift_of(all_vectors(made), table.all()).mean())


# ---- write-back --------------------------------------------------------------------------------


def test_passages_that_the_step_encoded_are_written_back() -> None:
    """As made by the weights before the optimiser step; r further rows by those after it."""
    made = drifting.retriever(questions(12, 8))
    table: Any = made.passage_encoder
    service = IndexRefresher(made, "rolling:2+write-back", samples=0)
    table.vectors.data += 0.3 * questions(12, 8, seed=1)
    before = table.all()
    seen = drifting.step_of(made, ROWS[:, :2], questions(2, 8))  # rows 3, 5, 9
    table.vectors.data += 0.3 * questions(12, 8, seed=2)
    old, version = all_vectors(made), made.index.version
    assert service.step(8, seen) == Refresh(8, 2, version + 1, n_written_back=3)
    back, chosen = torch.tensor([3, 5, 9]), torch.tensor([0, 1])
    torch.testing.assert_close(all_vectors(made)[back], before[back])
    torch.testing.assert_close(all_vectors(made)[chosen], table.all()[chosen])
    rest = [2, 4, 6, 7, 8, 10, 11]
    assert torch.equal(all_vectors(made)[rest], old[rest])
    ages = dict(enumerate(service.ledger.ages(8).tolist()))
    assert ages == dict.fromkeys(rest, 8) | {3: 1, 5: 1, 9: 1, 0: 0, 1: 0}


def test_missing_hits_are_not_written() -> None:
    made = drifting.retriever(questions(12, 8))
    seen = drifting.step_of(made, ROWS.clamp(min=0), questions(2, 8))
    seen = seen._replace(hits=refresher_hits(seen.hits))
    report = IndexRefresher(made, "rolling:12+write-back", samples=0).step(2, seen)
    assert report is not None and report.n_written_back == 4


def refresher_hits(hits: Any) -> Any:
    return type(hits)(hits.scores, ROWS, hits.vectors, hits.version)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_vectors_with_dropout_are_not_stored(dropout: float) -> None:
    """With dropout, the retrieved passages are encoded again in eval mode."""
    made = tiny.rag_model(train_passage_encoder=True, dropout=dropout)
    with torch.no_grad():
        for parameter in made.passage_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    data = tiny.batch()
    found = made.retriever(data["input_ids"], data["attention_mask"])
    rows = found.hits.rows.unique()
    report = IndexRefresher(made, "map+write-back", samples=0).step(3, found)
    expected = (0, len(rows)) if dropout == 0.0 else (len(rows), 0)
    assert report is not None and (report.n_passages, report.n_written_back) == expected
    fresh = encode_passages(made.passage_encoder, made.passages)[rows]
    torch.testing.assert_close(made.retriever.vectors(rows), fresh)
    assert made.passage_encoder.training


def test_dropout_of_a_configuration_and_batch_statistics_count() -> None:
    assert not lanes.stochastic(tiny.encoder().train())
    assert lanes.stochastic(tiny.encoder(dropout=0.1).train())
    assert not lanes.stochastic(tiny.encoder(dropout=0.1).eval())
    assert lanes.stochastic(torch.nn.BatchNorm1d(3))
    hidden = tiny.encoder().train()
    hidden.model.config.attention_probs_dropout_prob = 0.1
    assert lanes.stochastic(hidden)


# ---- staleness ---------------------------------------------------------------------------------


def test_the_estimate_holds_against_the_true_drift() -> None:
    """The retrieved tenth drifts eight times as fast; only the corrected estimate is not misled."""
    n, dim = 200, 16
    made = drifting.retriever(questions(n, dim))
    table: Any = made.passage_encoder
    draws = torch.Generator().manual_seed(3)
    direction = torch.randn(n, dim, generator=draws)
    speed = torch.where(torch.arange(n) < n // 10, 0.08, 0.01)[:, None]
    service = IndexRefresher(made, "frozen", samples=16)
    ratios, retrieved = [], 0.0
    for step in range(1, 41):
        table.vectors.data += speed * direction
        rows = torch.randint(n // 10, (4, 5), generator=draws)
        assert service.step(step, drifting.step_of(made, rows, questions(4, dim))) is not None
        summary = service.summary(step) | {"true": true_drift(made)}
        if step > 10:
            ratios.append(summary["staleness"] / summary["true"])
        retrieved = summary["staleness_retrieved"]
    assert made.index.version == 1  # measured, not changed
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.1)
    assert retrieved > 3 * true_drift(made)
    exact = service.staleness(step=40)
    assert exact.drift == pytest.approx(true_drift(made), rel=1e-4)
    assert exact.ages == (*[0] * 9, 200) and exact.oldest == 40


def test_staleness_of_few_passages_by_hand() -> None:
    made = drifting.retriever(torch.eye(4))
    table: Any = made.passage_encoder
    table.vectors.data[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # row 0 has moved onto row 1
    query = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    found = IndexRefresher(made).staleness(query, k=2)
    # stored scores 4, 3, 2, 1; fresh scores 3, 3, 2, 1
    assert (found.drift, found.overlap, found.n_passages) == (0.25, 1.0, 4)
    assert found.rank_correlation == 1.0
    table.vectors.data[0] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # fresh scores 1, 3, 2, 1
    found = IndexRefresher(made).staleness(query, k=2)
    assert found.overlap == 0.5 and found.rank_correlation == pytest.approx(0.4)
    nothing = IndexRefresher(made).staleness()
    assert math.isnan(nothing.overlap) and nothing.drift == 0.25
    with pytest.raises(ValueError, match="n_passages: expected at least 1, got 0"):
        IndexRefresher(made).staleness(n_passages=0)
    made.passage_encoder = None
    with pytest.raises(ValueError, match="passage_encoder: expected a module to encode"):
        IndexRefresher(made).staleness()


def test_rank_correlation_and_histogram() -> None:
    stale = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(2, 4)
    fresh = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 1.0, 2.0]])
    torch.testing.assert_close(rank_correlation(stale, fresh), torch.tensor([-1.0, 0.8]))
    assert age_histogram(torch.tensor([0, 0, 9, 4])) == (2, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert age_histogram(torch.zeros(3)) == (3, *[0] * 9)


def test_a_drift_above_the_limit_rebuilds() -> None:
    made = drifting.retriever(questions(400, 8))
    table: Any = made.passage_encoder
    service, rebuilt = IndexRefresher(made, "drift:0.05"), []
    for step in range(1, 41):
        table.vectors.data += 0.1 * questions(400, 8, seed=5 + step // 10)
        report = service.step(step)
        if report is not None and report.n_passages == 400:
            rebuilt.append(step)
            torch.testing.assert_close(all_vectors(made), table.all())
        assert true_drift(made) < 0.15
    assert len(rebuilt) >= 2


# ---- the map -----------------------------------------------------------------------------------


def rotation(dim: int, angle: float) -> Tensor:
    generator = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7))
    return torch.linalg.matrix_exp(angle * (generator - generator.T) / math.sqrt(dim)).float()


def turned(policy: str, dtype: str = "float32", n_steps: int = 60) -> tuple[Retriever, Any, float]:
    """Train with a drift that is a rotation and some noise; return what is left of the top ten."""
    n, dim = 300, 16
    made = drifting.retriever(questions(n, dim), dtype)
    table: Any = made.passage_encoder
    service = IndexRefresher(made, policy, samples=8)
    turn, draws = rotation(dim, 0.02), torch.Generator().manual_seed(1)
    probes = questions(32, dim, seed=4)
    for step in range(1, n_steps + 1):
        noise = torch.randn(n, dim, generator=draws)
        table.vectors.data = table.vectors.data @ turn.T + 0.005 * noise
        probes = probes @ turn.T
        found = made.nearest(probes[step % 8 :: 8], 4)
        service.step(step, drifting.step_of(made, found.rows, probes[step % 8 :: 8]))
    return made, service, service.staleness(probes).overlap


def test_a_map_halves_the_lost_overlap_at_equal_encoding() -> None:
    """The same passages are encoded with and without it; alone and mixed with rolling."""
    policies = ("rolling:2", "rolling:2+map", "map:4", "rolling:2+map:orthogonal")
    lost = {each: 1.0 - turned(each)[2] for each in policies}
    assert lost["rolling:2"] > 0.2
    for each in policies[1:]:
        assert lost[each] < 0.55 * lost["rolling:2"], each


def test_a_map_touches_no_stored_vector_but_those_of_encoded_rows() -> None:
    made, service, _ = turned("map:4+write-back", n_steps=30)
    table: Any = made.passage_encoder
    start = drifting.retriever(questions(300, 16)).index.index_emb
    old = service.ledger.encoded_at == 0
    assert 0 < int(old.sum()) < 300
    assert torch.equal(made.index.index_emb[old], start[old])  # type: ignore[attr-defined]
    assert float(drift_of(all_vectors(made), table.all())[old].mean()) < 0.05
    assert float(drift_of(start, table.all())[old].mean()) > 0.1
    made, _, _ = turned("map:4", n_steps=30)  # alone it stores nothing
    assert torch.equal(made.index.index_emb, start) and made.vector_map  # type: ignore[attr-defined]
    # A vector is stored so that the map returns it.
    made.write(table.all()[:5], torch.arange(5))
    torch.testing.assert_close(all_vectors(made)[:5], table.all()[:5], rtol=1e-4, atol=1e-4)


def test_folding_a_map_changes_no_result() -> None:
    made, service, _ = turned("rolling:2+map", n_steps=30)
    query = questions(6, 16)
    before = made.nearest(query, 5, vectors=True)
    assert made.vector_map is not None
    made.fold_map()
    assert made.vector_map is None
    after = made.nearest(query, 5, vectors=True)
    assert torch.equal(after.rows, before.rows)
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.vectors, before.vectors, rtol=1e-4, atol=1e-4)
    service.step(31)  # goes on from the folded vectors
    assert service._map.base == 31
    service.finish(31)
    table: Any = made.passage_encoder
    torch.testing.assert_close(all_vectors(made), table.all())


def test_scores_and_missing_rows_through_a_map() -> None:
    """Scores are q . (A d + b); a missing row stays zero."""
    made, _, _ = turned("map:4", n_steps=30)
    made.index.remove(torch.arange(297))
    hits = made.nearest(questions(2, 16), 5, vectors=True)
    assert hits.rows[:, 3:].eq(-1).all() and hits.scores[:, 3:].isneginf().all()
    assert hits.vectors is not None and not hits.vectors[:, 3:].any()
    expected = torch.einsum("bd,bkd->bk", questions(2, 16), hits.vectors[:, :3])
    torch.testing.assert_close(hits.scores[:, :3], expected)


@pytest.mark.parametrize("kind", ["map:1", "map:orthogonal:1"])
def test_a_singular_fit_is_no_map_and_said_once(kind: str) -> None:
    made = drifting.retriever(torch.ones(90, 4))
    service = IndexRefresher(made, kind, samples=90)
    with pytest.warns(UserWarning, match="stored vectors that differ.*goes on with no map") as told:
        for step in range(1, 9):
            service.step(step)
    assert len(told) == 1 and made.vector_map is None


def test_a_schedule_that_ends_a_map_folds_it() -> None:
    made, service, _ = turned("0-20:map:8, 20-:rolling:2", n_steps=19)
    before = all_vectors(made)
    assert made.vector_map is not None
    service.step(20)
    assert made.vector_map is None
    assert (all_vectors(made) - before).norm(dim=1).lt(1e-4).sum() >= 280


# ---- encoding under the next step --------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stream_writes_in_the_next_step_what_the_weights_were(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change at once, and the mode of the encoder does not matter."""

    def stream(*given: Any) -> lanes.StreamLane:
        return lanes.StreamLane(*given[:3], torch.device(device))

    monkeypatch.setattr(refresher, "lane_of", stream)
    made = drifting.retriever(questions(12, 8))
    made.move_index = False
    table: Any = made.to(device).passage_encoder
    service = IndexRefresher(made, "rolling:5", batch_size=2, samples=0)
    start, fresh = all_vectors(made), []
    for step in range(1, 4):
        table.vectors.data += 0.3 * questions(12, 8, seed=step).to(device)
        fresh.append(table.all().cpu())
        report = service.step(step)
        table.train(step != 2)
        assert (report is None) == (step == 1)
    assert service.ledger.encoded_at.tolist() == [*[1] * 5, *[2] * 5, 0, 0]
    expected = torch.cat([fresh[0][:5], fresh[1][5:10], start[10:]])
    torch.testing.assert_close(all_vectors(made), expected)
    service.flush()  # as before a checkpoint
    torch.testing.assert_close(all_vectors(made)[10:], fresh[2][10:])
