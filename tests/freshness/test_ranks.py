"""Two processes that retrieve different passages write the same vectors into their indexes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from fastrag import IndexRefresher
from tests.freshness import drifting
from tests.freshness.test_service import all_vectors, questions

ROOT = Path(__file__).resolve().parents[2]


def train(rank: int, folder: str) -> None:
    sys.path.insert(0, str(ROOT))
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    made = drifting.retriever(questions(40, 8))
    table: Any = made.passage_encoder
    service = IndexRefresher(made, "rolling:3+map:2+write-back")
    draws = torch.Generator().manual_seed(rank)
    for step in range(1, 6):
        before = table.all()
        rows = torch.randint(40, (2, 3), generator=draws)
        seen = drifting.step_of(made, rows, questions(2, 8, seed=rank))
        table.vectors.data += 0.2 * questions(40, 8, seed=10 + step)
        service.step(step, seen)
        back = torch.cat(gathered(rows)).unique()
        mine = service.ledger.encoded_at[back] == step - 1
        torch.testing.assert_close(all_vectors(made)[back[mine]], before[back[mine]])
        assert (service.ledger.encoded_at[back] >= step - 1).all()
    vectors = gathered(all_vectors(made))
    assert torch.equal(vectors[0], vectors[1])
    with pytest.raises(ValueError, match="worker: expected None with several training processes"):
        IndexRefresher(made, "every:1", worker="cpu").step(6)
    distributed.destroy_process_group()


def gathered(tensor: Any) -> list[Any]:
    found: list[Any] = [None, None]
    distributed.all_gather_object(found, tensor)
    return found


@pytest.mark.slow
def test_ranks_write_what_all_have_retrieved(tmp_path: Path) -> None:
    multiprocessing.spawn(train, args=(str(tmp_path),), nprocs=2)
