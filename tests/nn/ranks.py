"""Run as a module: two gloo processes that train as one does (test_distributed)."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from fastrag.nn import RagModel
from tests.tiny import batch, collator, questions, rag_model, same_weights

SETTINGS = {"train_passage_encoder": True, "tau": 0.1, "learn_tau": True}


def work(rank: int, kind: str, wrapper: str, rendezvous: str) -> None:
    """Train on half of the batch; rank 0 compares with the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    half = collator(kind)(questions(4)[2 * rank : 2 * rank + 2])
    {"ddp": replicated, "fsdp": sharded}[wrapper](rank, kind, half)
    dist.destroy_process_group()


def replicated(rank: int, kind: str, half: dict[str, torch.Tensor]) -> None:
    """Steps under DistributedDataParallel have the gradients of one process.

    In the last one each rank prunes other contexts.
    """
    count = (batch(kind, 4)["labels"] != -100).sum()
    model = rag_model(kind, **SETTINGS)
    # The wrapper goes before its group: a reducer that holds the last reference to a gloo group
    # joins the group's threads while it holds the GIL, and one of them may be waiting for the GIL.
    wrapped = DistributedDataParallel(model)  # no find_unused_parameters: every parameter is used
    for model.prune in (None, None, 0.2):
        wrapped.zero_grad()
        # DDP averages over ranks: the loss is scaled by their number, as Trainer does
        (2 * wrapped(**half, num_items_in_batch=count).loss).backward()
    if rank == 0:
        alone = rag_model(kind, **SETTINGS, prune=0.2)
        alone(**batch(kind, 4), num_items_in_batch=count).loss.backward()
        for (name, one), two in zip(alone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def sharded(rank: int, kind: str, half: dict[str, torch.Tensor]) -> None:
    """Three steps under fully_shard, each with a refresh, have the losses of one process.

    Embedding and head stay in the root's group, which is gathered while the loss is computed.
    """
    count = (batch(kind, 4)["labels"] != -100).sum()
    settings = {**SETTINGS, "learn_tau": False}  # torch shards no scalar
    model, alone = rag_model(kind, **settings), rag_model(kind, **settings)
    generator = model.generator
    blocks = (
        [*generator.encoder.block, *generator.decoder.block]
        if kind == "seq2seq"
        else generator.model.layers
    )
    for part in (model.question_encoder, model.passage_encoder, *blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone)]
    for _ in range(3):
        loss = model(**half, num_items_in_batch=count).loss
        whole = alone(**batch(kind, 4), num_items_in_batch=count).loss
        (2 * loss).backward()
        whole.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        torch.testing.assert_close(loss, whole.detach())
        for each in (model, alone):
            each.refresh_index()
    asked = {name: tensor for name, tensor in half.items() if name != "labels"}
    with pytest.raises(ValueError, match="generator: expected whole weights, got the shards"):
        model.generate(**asked)
    register_fsdp_forward_method(model, "generate")
    assert torch.equal(model.generate(**asked).sequences, alone.generate(**asked).sequences)
    with pytest.raises(ValueError, match="model: expected whole weights to save"):
        model.save_pretrained("nowhere")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    again: RagModel = rag_model(kind, **settings, seed=9)
    again.index = alone.index
    again.load_state_dict(state)
    same_weights(again, alone)


if __name__ == "__main__":
    mp.spawn(work, tuple(sys.argv[1:]), nprocs=2)
