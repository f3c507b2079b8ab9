"""Run by torchrun: what every rank of a distributed run has to agree on (test_distributed)."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object

from fastrag.train import RagTrainer, count_label_tokens
from fastrag.train.distributed import leave_processes
from tests import tiny
from tests.settings import rag_config


def trainer(folder: Path) -> RagTrainer:
    config = rag_config(
        {
            "retriever.index": "idx",
            "retriever.train_passage_encoder": True,
            "refresh.policy": "every:2",
            "training.output_dir": str(folder),
            "training.max_steps": 3,
            "training.per_device_train_batch_size": 2,
            "training.logging_steps": 1,
            "training.report_to": [],
            "training.disable_tqdm": True,
        }
    )
    model = tiny.rag_model(train_passage_encoder=True)
    return RagTrainer(model, config, tiny.collator(), tiny.questions())


def same_on_all_ranks(run: RagTrainer) -> None:
    """After training, weights and index are equal to the bit."""
    sums = {
        name: hashlib.sha256(p.detach().numpy()).hexdigest()
        for name, p in run.model.named_parameters()
    }
    first, second = gather_object([sums | {"index": run.model.index.checksum()}])
    assert first == second


def other_passages_are_refused(run: RagTrainer) -> None:
    """On all ranks, before a step is done."""
    if run.args.process_index == 1:
        run.model.index.update(torch.tensor([0]), torch.ones(1, 16))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(ValueError, match="index: expected the same on all ranks, .* on rank 1$"):
        run.train()
    assert all(torch.equal(before[name], p) for name, p in run.model.named_parameters())


if __name__ == "__main__":
    run = trainer(Path(sys.argv[1]) / "same")
    assert (run.args.world_size, run.args.device.type) == (2, "cpu")
    labels = torch.ones(2, 3 + run.args.process_index)
    assert count_label_tokens([{"labels": labels}]).item() == 2 * 3 + 2 * 4
    run.train()
    same_on_all_ranks(run)
    other = trainer(Path(sys.argv[1]) / "other")
    other_passages_are_refused(other)
    leave_processes(other)
