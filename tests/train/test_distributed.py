"""Processes of a launcher: they train together on the same passages, or nothing trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrag.train import RagTrainer, build_model, distributed, training_config
from tests import tiny
from tests.cli.commands import torchrun
from tests.settings import rag_config


@pytest.mark.slow
def test_ranks_agree(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "-m", "tests.train.ranks", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_is_told_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = rag_config({"training.bf16": bf16}).training_arguments()
    assert args.use_cpu and args.bf16 == bf16


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cpu", "fp16", r"^training\.fp16: expected false on a CPU, got True$"),
        ("gpu", "bf16", r"^training\.bf16: expected false on a GPU without bfloat16, got True$"),
    ],
)
def test_a_precision_that_the_device_lacks(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, message: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device == "gpu")
    monkeypatch.setattr(training_config, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        rag_config({f"training.{precision}": True}).training_arguments()


def test_processes_that_would_not_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = rag_config({"training.output_dir": str(tmp_path)}).training_arguments()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^WORLD_SIZE: expected 2 processes .*, got 1; start"):
        RagTrainer(tiny.rag_model(), args, tiny.collator(), tiny.questions())
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(type(args), "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="^LOCAL_WORLD_SIZE: expected .* there are 1, got 2;"):
        distributed.check_processes(args)


def test_one_process_uses_one_gpu(tmp_path: Path) -> None:
    args = rag_config({"training.output_dir": str(tmp_path)}).training_arguments()
    args._n_gpu = 4
    with pytest.warns(UserWarning, match="^one process trains on one GPU of 4; torchrun"):
        trainer = RagTrainer(tiny.rag_model(), args, tiny.collator(), tiny.questions())
    assert trainer.args.n_gpu == 1 and args.n_gpu == 4  # the caller's arguments stay as they were


def test_several_processes_need_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^retriever\.index: expected .* several processes train"):
        build_model(rag_config({"training.output_dir": str(tmp_path)}))


@pytest.mark.parametrize("part", ["index", "passages"])
def test_other_passages_on_another_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model = tiny.rag_model()
    callback = distributed.SamePassagesCallback(model)
    args = rag_config({"training.output_dir": str(tmp_path)}).training_arguments()
    monkeypatch.setattr(type(args), "world_size", 2)
    checksum = getattr(model, part).checksum()
    unused: Any = None
    monkeypatch.setattr(distributed, "gather_object", lambda sums: sums * 2)
    callback.on_train_begin(args, unused, unused)
    other = {checksum: "0"}
    monkeypatch.setattr(
        distributed, "gather_object", lambda sums: [sums[0], other.get(sums[0], sums[0])]
    )
    with pytest.raises(ValueError, match=f"^{part}: .* {checksum} on rank 0 and 0 on rank 1$"):
        callback.on_train_begin(args, unused, unused)
