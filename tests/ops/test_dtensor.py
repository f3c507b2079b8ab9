"""An unresolved DTensor is refused: an op would see this rank's shard, or fail far from here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastrag.functional as F

from .cases import IGNORE, LOSSES, both_marginals, make


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Distributes a tensor over a mesh of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rendezvous: Path = tmp_path_factory.mktemp("ranks") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x, mesh, [Shard(0) if x.dim() else Replicate()])
    dist.destroy_process_group()


def refused(name: str) -> Any:
    """Expects the error, which names the argument and both ways out."""
    message = (
        rf"^{name}: expected a plain tensor, got a DTensor \[.*\] \w+ with placements \(.*\). Call "
        rf"the loss inside the forward .* root group .*, or pass {name}\.full_tensor\(\)$"
    )
    return pytest.raises(ValueError, match=message)


@both_marginals
@pytest.mark.parametrize(
    "name",
    ["hidden", "weight", "labels", "doc_scores", "bias", "normalizer", "example_weight",
     "valid_rows"],
)  # fmt: skip
def test_losses(marginal: str, name: str, shard: Any) -> None:
    p = make(head="bias")
    inputs: dict[str, Tensor] = {
        **{k: x.detach() for k, x in p.leaves().items()},
        "labels": p.labels,
        "normalizer": torch.tensor(7.0),
        "example_weight": torch.ones(2),
        "valid_rows": (p.labels != IGNORE).view(-1).nonzero()[:, 0].int(),
    }
    expected = LOSSES[marginal](**inputs)
    inputs[name] = shard(inputs[name])
    with refused(name):
        LOSSES[marginal](**inputs)
    inputs[name] = inputs[name].full_tensor()
    assert torch.equal(LOSSES[marginal](**inputs), expected)


def test_parameter(shard: Any) -> None:
    """What fully_shard leaves in a module: a parameter that is a DTensor."""
    p = make()
    weight = torch.nn.Parameter(shard(p.weight.detach()))
    with refused("weight"):
        F.rag_token_nll(p.hidden, weight, p.labels, p.doc_scores)


@pytest.mark.parametrize("name", ["hidden", "weight", "labels", "bias"])
def test_token_logp(name: str, shard: Any) -> None:
    p = make(head="bias")
    inputs = {"hidden": p.hidden, "weight": p.weight, "labels": p.labels, "bias": p.bias}
    inputs = {k: x.detach() for k, x in inputs.items()}
    inputs[name] = shard(inputs[name])
    with refused(name):
        F.token_logp(**inputs)


@pytest.mark.parametrize("name", ["query_emb", "passage_emb", "rows", "scale", "offset", "tau"])
def test_doc_scores(name: str, shard: Any) -> None:
    codes = name in ("scale", "offset")
    inputs = {
        "query_emb": torch.randn(2, 4),
        "passage_emb": torch.randint(-9, 9, (5, 4)).to(torch.int8 if codes else torch.float32),
        "rows": torch.tensor([[0, 1, -1], [2, 3, 4]]),
        "tau": torch.tensor(2.0),
    }
    if codes:
        inputs |= {"scale": torch.ones(4), "offset": torch.zeros(4)}
    F.doc_scores(**inputs)
    inputs[name] = shard(inputs[name])
    with refused(name):
        F.doc_scores(**inputs)
