"""Label positions that count, their hidden states, and the checks of labels and scores.

A position is p = b * T + t. It has K rows hidden[b, :, t], one for each passage, which are always
in one chunk, because the marginal is a sum over them. On a CPU, only positions whose label counts
are visited. On a GPU, reading their number would wait for the device. There, a caller who has the
labels on the host can list the positions in `valid_rows`; otherwise all B*T are visited, and
positions that do not count have weight zero and hidden states of zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops import checks, late_errors

# The default label that does not count, as in torch's cross_entropy and transformers' batches.
# fastrag/reference.py repeats it, because it imports nothing of ours.
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Chunk:
    """G positions and their n = G * K rows of hidden states, position-major."""

    position: Tensor  # [G], B*T where the entry is padding
    example: Tensor  # [G], b
    counted: Tensor  # [G] bool, whether the label counts
    gold: Tensor  # [n], label
    chunk_rows: Tensor  # [n], (b * K + k) * T + t, B*K*T where the entry is padding
    x: Tensor  # [n, H], in the dtype of the operands of products


class Positions:
    """The counted positions of hidden [B, K, T, H], which `gather` reads slice by slice."""

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
        # The padding of valid_rows points to the entry after the last position.
        self.counted = torch.nn.functional.pad(counted.reshape(-1), (0, 1))
        self.per_example: list[int] | None = None
        if checks.readable(hidden):
            self.index = counted.reshape(-1).nonzero().squeeze(1)
            self.per_example = counted.sum(1).tolist()
        elif valid_rows is not None and self.n_positions:  # its padding needs a position to read
            self.index = _padded(valid_rows, self.n_positions)
        else:
            self.index = torch.arange(self.n_positions, device=hidden.device)
            self.per_example = [n_tokens] * n_examples
        self.n_visited = self.index.numel()

    def everything(self) -> Chunk:
        return self.gather(slice(0, self.n_visited))

    def gather(self, part: slice) -> Chunk:
        """Return a slice of the counted positions as a chunk, which copies their hidden states."""
        _, n_passages, n_tokens, width = self.hidden.shape
        position = self.index[part]
        counted = self.counted[position]
        place = position.clamp(max=self.n_positions - 1)
        example, token = place // n_tokens, place % n_tokens
        x = self.hidden[example, :, token].to(self.dtype).contiguous()  # [G, K, H]
        keep = counted.unsqueeze(1)
        if self.present is not None:
            keep = keep & self.present[example]
        x.masked_fill_(~keep.expand(x.shape[:2]).unsqueeze(2), 0.0)
        passage = torch.arange(n_passages, device=x.device)
        row = (example.unsqueeze(1) * n_passages + passage) * n_tokens + token.unsqueeze(1)
        padding = (position == self.n_positions).unsqueeze(1)
        row = torch.where(padding, n_passages * self.n_positions, row)
        gold = self.labels[place].repeat_interleave(n_passages)
        return Chunk(position, example, counted, gold, row.view(-1), x.view(-1, width))


def check_label_values(labels: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """Return the bool mask [B, T] of counted labels outside [0, V).

    Raises:
        ValueError: on a CPU, a label is outside; on a GPU, an earlier call found a fault.
    """
    bad = counted & (labels.clamp(0, vocab_size - 1) != labels)
    _raise_or_record((labels * bad, _label_error, vocab_size))
    return bad


def check_values(
    labels: Tensor, counted: Tensor, vocab_size: int, scores: Tensor, valid_rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check labels, scores [B, K], which must be finite or -inf, and valid_rows.

    Returns:
        The bool mask [B, T] of counted labels outside [0, V), and the bool mask [B] of examples
        with a counted position that valid_rows does not list exactly once (None without
        valid_rows).

    Raises:
        ValueError: on a CPU, a value is wrong; on a GPU, an earlier call found a fault.
    """
    bad = counted & (labels.clamp(0, vocab_size - 1) != labels)
    # The result is 0 for all scores except +inf and NaN.
    wrong_score = torch.threshold(scores, torch.finfo(scores.dtype).max, 0.0)
    # A bad label is never 0, because every vocabulary has a token id 0.
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
            raise ValueError(late_errors.message(found, wording, settings))


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
    """Return valid_rows with n_positions in place of entries that are not positions, such as -1."""
    inside = (valid_rows >= 0) & (valid_rows < n_positions)
    return torch.where(inside, valid_rows, n_positions).long()
