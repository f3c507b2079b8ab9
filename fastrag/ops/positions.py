"""Label positions that count, and the rows of hidden states behind them.

A position is p = b * T + t. Behind it stand the K rows hidden[b, :, t], one for each passage; they
always travel together, so that a marginal over passages never crosses a chunk. On a CPU only the
positions whose label counts are visited. A GPU may not be asked for their number, so there either
`valid_rows` says which they are (made on the host by the collator) or all B*T are visited; what
does not count then has weight zero and its hidden states are read as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops import checks

# The label that does not count, where no other is given: as in torch's cross_entropy and in the
# batches of transformers. The oracle in fastrag/reference.py, which imports nothing, has its own.
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Chunk:
    """G positions and their n = G * K rows, position-major."""

    position: Tensor  # [G], B*T where the entry is padding
    example: Tensor  # [G], b
    counts: Tensor  # [G] bool
    gold: Tensor  # [n], label
    row: Tensor  # [n], (b * K + k) * T + t, B*K*T where the entry is padding
    x: Tensor  # [n, H], in the dtype of the operands of products


class Positions:
    """Visits the rows of hidden [B, K, T, H] by slices of counted positions."""

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        counted: Tensor,
        present: Tensor | None,
        valid_rows: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """counted [B, T]: labels that count; present [B, K]: passages that exist (None: all)."""
        self.hidden, self.present, self.dtype = hidden, present, dtype
        n_examples, _, n_tokens, _ = hidden.shape
        self.n_positions = n_examples * n_tokens
        self.labels = torch.where(counted, labels, 0).reshape(-1)
        # The entry behind the last position is where the padding of valid_rows points.
        self.counted = torch.nn.functional.pad(counted.reshape(-1), (0, 1))
        self.per_example: list[int] | None = None
        if checks.readable(hidden):
            self.index = counted.reshape(-1).nonzero().squeeze(1)
            self.per_example = counted.sum(1).tolist()
        elif valid_rows is not None:
            self.index = _padded(valid_rows, self.n_positions)
        else:
            self.index = torch.arange(self.n_positions, device=hidden.device)
            self.per_example = [n_tokens] * n_examples

    def __len__(self) -> int:
        return self.index.numel()

    def everything(self) -> Chunk:
        return self.gather(slice(0, len(self)))

    def gather(self, part: slice) -> Chunk:
        """Returns the positions `part` with a copy of their hidden states."""
        _, n_passages, n_tokens, width = self.hidden.shape
        position = self.index[part]
        counts = self.counted[position]
        place = position.clamp(max=self.n_positions - 1)
        example, token = place // n_tokens, place % n_tokens
        x = self.hidden[example, :, token].to(self.dtype).contiguous()  # [G, K, H]
        keep = counts.unsqueeze(1)
        if self.present is not None:
            keep = keep & self.present[example]
        x.masked_fill_(~keep.expand(x.shape[:2]).unsqueeze(2), 0.0)
        passage = torch.arange(n_passages, device=x.device)
        row = (example.unsqueeze(1) * n_passages + passage) * n_tokens + token.unsqueeze(1)
        padding = (position == self.n_positions).unsqueeze(1)
        row = torch.where(padding, n_passages * self.n_positions, row)
        gold = self.labels[place].repeat_interleave(n_passages)
        return Chunk(position, example, counts, gold, row.view(-1), x.view(-1, width))


def check_labels(labels: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """Returns the bool mask [B, T] of counted labels outside [0, V).

    Raises:
        ValueError: on a CPU, where looking costs nothing, if there is any.
    """
    bad = counted & ((labels < 0) | (labels >= vocab_size))
    if checks.readable(labels) and bool(bad.any()):
        b, t = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"labels: expected values in [0, {vocab_size}) or ignore_index, "
            f"got {int(labels[b, t])} at [{b}, {t}]"
        )
    return bad


def check_scores(scores: Tensor) -> None:
    """Checks on a CPU, where looking costs nothing, that scores [B, K] are finite or -inf.

    Raises:
        ValueError: if one is NaN or +inf.
    """
    if not checks.readable(scores):
        return
    bad = scores.isnan() | (scores == torch.inf)
    if bool(bad.any()):
        b, k = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"doc_scores: expected finite values, or -inf for a missing passage, "
            f"got {float(scores[b, k])} at [{b}, {k}]"
        )


def check_valid_rows(valid_rows: Tensor, counted: Tensor) -> Tensor:
    """Returns the bool mask [B] of examples whose counted positions are not each listed once.

    Raises:
        ValueError: on a CPU, if valid_rows is not the counted positions in ascending order.
    """
    if not checks.readable(valid_rows):
        listed = _padded(valid_rows, counted.numel())
        times = torch.zeros(counted.numel() + 1, dtype=torch.int32, device=counted.device)
        times.scatter_add_(0, listed, torch.ones_like(listed, dtype=torch.int32))
        return ((times[:-1].view(counted.shape) != 1) & counted).any(1)
    listed = valid_rows[valid_rows >= 0].long()
    expected = counted.reshape(-1).nonzero().squeeze(1)
    if not torch.equal(listed, expected):
        raise ValueError(
            f"valid_rows: expected the ascending positions b * T + t of the {expected.numel()} "
            f"labels that count, padded with -1, got {listed.numel()} positions that differ"
        )
    return torch.zeros_like(counted[:, 0])


def _padded(valid_rows: Tensor, n_positions: int) -> Tensor:
    """valid_rows with every entry that is no position, -1 among them, sent behind the last one."""
    inside = (valid_rows >= 0) & (valid_rows < n_positions)
    return torch.where(inside, valid_rows, n_positions).long()
