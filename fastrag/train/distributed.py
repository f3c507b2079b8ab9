"""Training of one model in several processes, as torchrun starts them.

Each rank works on batches of its own; the gradients of all ranks are averaged by
DistributedDataParallel, and rank 0 alone writes files and lines. Every rank holds the whole index.
"""

from __future__ import annotations

import gc
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from fastrag.nn import RagModel
    from fastrag.train.trainer import RagTrainer


def launched_processes() -> int:
    """Return the number of processes that the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this is the first of the processes that the launcher started."""
    return os.environ.get("RANK", "0") == "0"


def check_processes(args: TrainingArguments) -> None:
    """Refuse arguments under which the processes of a launcher would not train together.

    transformers and accelerate would train in each process on the same data, or put two processes
    on one GPU. A single process that sees several GPUs uses the first one, with a warning.

    Args:
        args: the arguments; `n_gpu` may change.

    Raises:
        ValueError: the launcher started more processes than train together or than there are GPUs.
    """
    launched = launched_processes()
    if args.world_size != launched:
        raise ValueError(
            f"WORLD_SIZE: expected {launched} processes that train together, got "
            f"{args.world_size}; start them with torchrun, and on a machine without a GPU with "
            "use_cpu"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = torch.accelerator.device_count()
    if args.device.type != "cpu" and local > devices:
        raise ValueError(
            f"LOCAL_WORLD_SIZE: expected at most one process for each GPU of this machine, of "
            f"which there are {devices}, got {local}; lower --nproc-per-node, or set use_cpu"
        )
    if args.n_gpu > 1:
        warnings.warn(
            f"one process trains on one GPU of {args.n_gpu}; torchrun --nproc-per-node "
            f"{args.n_gpu} trains on all",
            stacklevel=3,
        )
        args._n_gpu = 1  # else transformers takes nn.DataParallel, whose copies share one index


def leave_processes(trainer: RagTrainer) -> None:
    """Leave the group of processes at the end of a program, if there is one.

    Args:
        trainer: the trainer that trained in it.
    """
    if not torch.distributed.is_initialized():
        return
    # The wrapper goes before its group: a reducer that holds the last reference to a gloo group
    # joins the group's threads while it holds the GIL, and one of them may be waiting for the GIL.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    torch.distributed.destroy_process_group()


class SamePassagesCallback(TrainerCallback):
    """Compare index and passages of all ranks before the first step.

    If ranks searched different passages, their gradients would be averaged without an error.

    Args:
        model: the model that owns both.
    """

    def __init__(self, model: RagModel) -> None:
        self.model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the checksums.

        Raises:
            ValueError: they differ; the same error on every rank.
        """
        if args.world_size == 1:
            return
        for name in ("index", "passages"):
            sums = gather_object([getattr(self.model, name).checksum()])
            for rank, each in enumerate(sums):
                if each != sums[0]:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got checksum {sums[0]} on rank 0 "
                        f"and {each} on rank {rank}"
                    )
