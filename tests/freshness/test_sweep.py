"""The policy sweep: all vectors of one age, r passages a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrag import IndexRefresher
from fastrag.freshness import Refresh
from tests import tiny
from tests.freshness import drifting
from tests.freshness.test_service import all_vectors, questions

N, R = 11, 4
P = 3  # steps of a sweep


def moved(made: Any, step: int) -> Tensor:
    """Move the table as an optimiser step would, and return what it holds."""
    made.passage_encoder.vectors.data += 0.3 * questions(N, 8, seed=step)
    return made.passage_encoder.all()


def test_all_vectors_are_of_the_weights_at_the_start_of_a_sweep() -> None:
    """Stored together after P steps; each step encodes at most r passages."""
    made = drifting.retriever(questions(N, 8))
    service = IndexRefresher(made, f"sweep:{R}", samples=0)
    encoded: list[int] = []
    made.passage_encoder.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _module, given: encoded.append(len(given[0]))
    )
    tables = {0: made.passage_encoder.all()}  # type: ignore[union-attr,operator]
    for step in range(1, 4 * P + 2):
        tables[step] = moved(made, step)
        report = service.step(step)
        n_sweeps, within = divmod(step - 1, P)
        of = max(0, 1 + (n_sweeps - 1) * P)  # step of the weights of the stored vectors
        torch.testing.assert_close(all_vectors(made), tables[of])
        assert (report is None) == (within > 0 or n_sweeps == 0)
        if report is not None:
            assert report == Refresh(step, N, made.index.version)
        assert service.ledger.ages(step).unique().tolist() == [step - of]
        assert step - of < 2 * P
    assert encoded == [4, 4, 3] * 4  # the copy has the hook as well


def test_a_sweep_is_resumed_to_the_bit() -> None:
    runs = []
    for cut in (None, 6):
        made = drifting.retriever(questions(N, 8))
        service = IndexRefresher(made, f"sweep:{R}+map:2", seed=1)
        for step in range(1, 10):
            if step == cut:
                state = service.state_dict()
                assert 0 < len(state["sweep"]["vectors"]) < N
                service = IndexRefresher(made, f"sweep:{R}+map:2", seed=2)
                service.load_state_dict(state)
                assert service.state_dict()["sweep"] is state["sweep"]
            moved(made, step)
            rows = torch.tensor([[step % N, 2 * step % N, 3]])
            service.step(step, drifting.step_of(made, rows, questions(1, 8)))
        runs.append((all_vectors(made), service.ledger.encoded_at))
    for whole, cut_run in zip(*runs, strict=True):
        assert torch.equal(whole, cut_run)


def test_staleness_is_measured_during_a_sweep() -> None:
    made = drifting.retriever(questions(N, 8))
    service = IndexRefresher(made, "sweep:1", samples=8)
    for step in range(1, 9):
        moved(made, step)
        service.step(step)
    table: Any = made.passage_encoder
    true = 1.0 - (all_vectors(made) * table.all()).sum(1).mean()
    assert 0.5 * true < service.summary(8)["staleness"] < 2.0 * true


def test_an_encoder_that_fails_leaves_index_and_sweep() -> None:
    made = drifting.retriever(questions(N, 8))
    service = IndexRefresher(made, f"sweep:{R}", samples=0)
    moved(made, 1)
    service.step(1)
    before = all_vectors(made)
    lane: Any = service._lane
    lane._twin.vectors.data = lane._twin.vectors.data[:2]  # no vector for the third passage
    with pytest.raises(IndexError):
        service.step(2)
    assert torch.equal(all_vectors(made), before) and lane._n_made == 0
    lane._twin.vectors.data = made.passage_encoder.vectors.data.clone()  # type: ignore[union-attr]
    for step in (2, 3, 4):
        report = service.step(step)
    assert report is not None and report.n_passages == N


def test_what_does_not_go_with_a_sweep() -> None:
    made = drifting.retriever(questions(N, 8))
    with pytest.raises(ValueError, match="worker: expected None with sweep:4, .*, got cpu"):
        IndexRefresher(made, "sweep:4", worker="cpu").step(1)
    service = IndexRefresher(made, "sweep:4")
    state = service.state_dict()
    with pytest.raises(ValueError, match="sweep: expected a mapping or None, got 3"):
        service.load_state_dict(state | {"sweep": 3})
    service.load_state_dict(state | {"sweep": {"step": 1}})
    with pytest.raises(ValueError, match="sweep: expected the state of a sweep: 'vectors'"):
        service.step(1)
    model = tiny.rag_model(train_passage_encoder=True)
    with pytest.raises(ValueError, match="encoder: expected a module, got function"):
        IndexRefresher(model, "sweep:4", samples=0).step(1, encoder=lambda ids, mask: ids)
