"""A collator whose random choices do not depend on when a batch is made."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrag.data import RagCollator


class ResumableCollator:
    """Draws a batch's random answers from a seed of the batch itself.

    A data loader makes batches ahead of the step that uses them, so draws from the global random
    state would differ after a resume and would shift the draws of the model. Here the seed comes
    from the run's seed, the epoch and the questions, and the global state stays untouched.

    Args:
        collator: the collator.
        seed: the run's seed.

    Attributes:
        epoch: set by the trainer at each epoch, so that another pass draws other answers.
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
