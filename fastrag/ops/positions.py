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

from fastrag.ops import checks, late_errors

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
        elif valid_rows is not None and self.n_positions:  # else its padding would point nowhere
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


def check_label_values(labels: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """Returns the bool mask [B, T] of counted labels outside [0, V).

    The last of the checks of every op: what they found goes out here, if the host may not look.

    Raises:
        ValueError: on a CPU, where looking costs nothing, if there is any; on a GPU if an earlier
            call found a label, a score or a list of rows that it should have refused.
    """
    bad = counted & (labels.clamp(0, vocab_size - 1) != labels)
    # A bad label is not 0, which is a word of every vocabulary.
    late_errors.check(labels * bad, _label_error, vocab_size)
    late_errors.send(labels.device)
    return bad


def check_scores(scores: Tensor) -> None:
    """Checks that scores [B, K] are finite or -inf.

    Raises:
        ValueError: on a CPU, where looking costs nothing, if one is NaN or +inf.
    """
    # Keeps what is not at most the largest number: +inf and NaN.
    late_errors.check(torch.threshold(scores, torch.finfo(scores.dtype).max, 0.0), _score_error)


def check_valid_rows(valid_rows: Tensor, counted: Tensor) -> Tensor:
    """Returns the bool mask [B] of examples whose counted positions are not each listed once.

    Raises:
        ValueError: on a CPU, if valid_rows is not the counted positions in ascending order.
    """
    listed = _padded(valid_rows, counted.numel())
    times = torch.zeros(counted.numel() + 1, dtype=torch.int32, device=counted.device)
    times.scatter_add_(0, listed, torch.ones_like(listed, dtype=torch.int32))
    wrong = (times[:-1].view(counted.shape) - 1) * counted
    late_errors.check(wrong, _valid_rows_error)
    if checks.readable(valid_rows):
        expected = counted.reshape(-1).nonzero().squeeze(1)
        if not torch.equal(valid_rows[valid_rows >= 0].long(), expected):
            raise ValueError(f"{_VALID_ROWS}, got these and others, or in another order")
    return (wrong != 0).any(1)


_VALID_ROWS = (
    "valid_rows: expected the ascending positions b * T + t of all labels that count, each once, "
    "padded with -1"
)


def _label_error(place: list[int], value: int, vocab_size: int) -> str:
    return f"labels: expected values in [0, {vocab_size}) or ignore_index, got {value} at {place}"


def _score_error(place: list[int], value: float) -> str:
    return (
        f"doc_scores: expected finite values, or -inf for a missing passage, got {value} at {place}"
    )


def _valid_rows_error(place: list[int], value: int) -> str:
    return f"{_VALID_ROWS}, got that of {place} {value + 1} times"


def _padded(valid_rows: Tensor, n_positions: int) -> Tensor:
    """valid_rows with every entry that is no position, -1 among them, sent behind the last one."""
    inside = (valid_rows >= 0) & (valid_rows < n_positions)
    return torch.where(inside, valid_rows, n_positions).long()
