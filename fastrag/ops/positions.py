"""Label positions that count, with their rows of hidden states, and the checks of their values.

A position is p = b * T + t. It has K rows hidden[b, :, t], one for each passage, which stay
together so that a marginal over passages never crosses a chunk. On a CPU only positions whose label
counts are visited. A GPU cannot be asked for their number without waiting, so there either
`valid_rows` lists them (from a caller who has the labels on the host) or all B*T are visited;
positions that do not count then have weight zero, and their hidden states are read as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops import checks, late_errors

# The default label that does not count: that of torch's cross_entropy and of batches of
# transformers. The oracle in fastrag/reference.py, which imports nothing of ours, has its own.
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
    """Visit the rows of hidden [B, K, T, H] by slices of counted positions."""

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
        # The padding of valid_rows points to the entry behind the last position.
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
        self.n_visited = self.index.numel()

    def everything(self) -> Chunk:
        return self.gather(slice(0, self.n_visited))

    def gather(self, part: slice) -> Chunk:
        """Return the positions `part` with a copy of their hidden states."""
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
    """Return the bool mask [B, T] of counted labels outside [0, V).

    Raises:
        ValueError: on a CPU if there is any; elsewhere if an earlier call found a fault.
    """
    bad = counted & (labels.clamp(0, vocab_size - 1) != labels)
    _raise_or_record((labels * bad, _label_error, vocab_size))
    return bad


def check_values(
    labels: Tensor, counted: Tensor, vocab_size: int, scores: Tensor, valid_rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check labels, scores [B, K], which are finite or -inf, and valid_rows, all in one go.

    Returns:
        The bool mask [B, T] of counted labels outside [0, V), and the bool mask [B] of examples
        whose counted positions valid_rows does not list once each; None without valid_rows.

    Raises:
        ValueError: on a CPU if a value is wrong; elsewhere if an earlier call found a fault.
    """
    bad = counted & (labels.clamp(0, vocab_size - 1) != labels)
    # The threshold keeps what is not at most the largest number: +inf and NaN.
    wrong_score = torch.threshold(scores, torch.finfo(scores.dtype).max, 0.0)
    # A bad label is not 0, which is in every vocabulary.
    wrong_label = (labels * bad, _label_error, vocab_size)
    if valid_rows is None:
        _raise_or_record((wrong_score, _score_error), wrong_label)
        return bad, None
    listed = _padded(valid_rows, counted.numel())
    times = torch.zeros(counted.numel() + 1, dtype=torch.int32, device=counted.device)
    times.scatter_add_(0, listed, torch.ones_like(listed, dtype=torch.int32))
    wrong = (times[:-1].view(counted.shape) - 1) * counted
    _raise_or_record((wrong_score, _score_error), (wrong, _valid_rows_error), wrong_label)
    if checks.readable(valid_rows):
        expected = counted.reshape(-1).nonzero().squeeze(1)
        if not torch.equal(valid_rows[valid_rows >= 0].long(), expected):
            raise ValueError(f"{_VALID_ROWS}, got these and others, or in another order")
    return bad, (wrong != 0).any(1)


def _raise_or_record(*findings: late_errors.Finding) -> None:
    if not checks.readable(findings[0][0]):
        late_errors.send(findings)
        return
    for found, wording, *settings in findings:
        if found.any():
            raise ValueError(late_errors.word(found, wording, settings))


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
    """Return valid_rows with entries that are no position, such as -1, sent behind the last one."""
    inside = (valid_rows >= 0) & (valid_rows < n_positions)
    return torch.where(inside, valid_rows, n_positions).long()
