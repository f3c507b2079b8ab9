"""Batches of a training step: the count of their label tokens, and a reproducible collator."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.data import RagCollator


def count_label_tokens(
    batches: Sequence[Mapping[str, Any]],
    group: torch.distributed.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Count the label tokens of all micro-batches of an optimiser step, on all ranks.

    The count is the `num_items_in_batch` of `RagModel.forward`: the gradients of the micro-batches
    then add up to the gradient of one large batch. DistributedDataParallel averages the gradients
    of the ranks, so the loss has to be multiplied by the number of ranks.

    Args:
        batches: the micro-batches of this rank, with `labels` `[B, T]`; -100 is not counted.
        group: the ranks to add up; None: all, if torch.distributed is initialised.
        device: device on which the ranks' counts are added up; None: the labels' device.

    Returns:
        The count, int64 `[]`. Nothing waits for a GPU.

    Raises:
        ValueError: there are no batches, or one has no labels.

    Example:
        >>> count_label_tokens([{"labels": torch.tensor([[5, 6, -100], [7, -100, -100]])}])
        tensor(3)
    """
    if not batches or any(batch.get("labels") is None for batch in batches):
        raise ValueError(
            f"batches: expected batches with labels, got {len(batches)} batches"
            + (" without labels" if batches else "")
        )
    count = torch.stack([batch["labels"].ne(IGNORE_INDEX).sum() for batch in batches]).sum()
    count = count.to(device) if device is not None else count
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count, group=group)
    return count


class ResumableCollator:
    """Draw the random answers of a batch from a seed of its own.

    A data loader makes batches ahead of the step that uses them, so draws from the global random
    state would differ after a resume and would shift the draws of the model. Here the seed is
    made of the run's seed, the epoch and the questions, and the global state stays untouched.

    Args:
        collator: the collator.
        seed: the run's seed.

    Attributes:
        epoch: set by the trainer, so that each pass over the questions draws other answers.
    """

    def __init__(self, collator: RagCollator, seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = 0

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Make one batch."""
        if getattr(self.collator, "answer_choice", "first") == "first":
            return self.collator(examples)
        content = "\0".join(
            str(each["question"] if isinstance(each, dict) else each.question) for each in examples
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                zlib.crc32(f"{self.seed}\0{self.epoch}\0{content}".encode())
            )
            return self.collator(examples)
