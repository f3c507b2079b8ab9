"""Run as a module: two gloo processes whose gradients are those of one (test_distributed)."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import batch, collator, questions, rag_model

SETTINGS = {"train_passage_encoder": True, "tau": 0.1, "learn_tau": True}


def work(rank: int, kind: str, rendezvous: str) -> None:
    """Train two steps on half of the batch; rank 0 compares with the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    count = (batch(kind, 4)["labels"] != -100).sum()
    model = rag_model(kind, **SETTINGS)
    wrapped = DistributedDataParallel(model)  # no find_unused_parameters: every parameter is used
    half = collator(kind)(questions(4)[2 * rank : 2 * rank + 2])
    for _ in range(2):
        wrapped.zero_grad()
        # DDP averages over ranks: the loss is scaled by their number, as Trainer does
        (2 * wrapped(**half, num_items_in_batch=count).loss).backward()
    if rank == 0:
        alone = rag_model(kind, **SETTINGS)
        alone(**batch(kind, 4), num_items_in_batch=count).loss.backward()
        for (name, one), two in zip(alone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
    # The wrapper goes before its group: a reducer that holds the last reference to a gloo group
    # joins the group's threads while it holds the GIL, and one of them may be waiting for the GIL.
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
