"""ContextBuilder: template, passage and question laid end to end as the generator's input.

    context = literal_0  slot_0  literal_1  slot_1  literal_2        (slots: passage and question)

The passage is cut on the right until everything fits; question and template never are. Tensors
only: the number of kernels does not depend on B or K, and nothing waits for a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrag.data.templates import BoundTemplate


class BuiltContext(NamedTuple):
    """What `ContextBuilder.build` returns.

    Attributes:
        ids: context token ids, `[B*K, L]` int64, the K contexts of a question together.
        mask: `[B*K, L]` int64, 1 at tokens; every row has some.
        n_cut: how many passages were cut, a 0-d int64 tensor on the device of the ids.
    """

    ids: Tensor
    mask: Tensor
    n_cut: Tensor


class ContextBuilder:
    """Build the generator's contexts from token ids.

    Args:
        template: a template bound to the generator's tokenizer (`Template.bind`). Contexts are
            padded on the left for kind "causal" and on the right for "seq2seq".
        max_context: the generator's window, in tokens.

    Raises:
        ValueError: the template alone fills the window.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from fastrag.nn import ContextBuilder
        >>> template = SimpleNamespace(kind="causal", slots=("passage", "question"), pad_id=0,
        ...                            literals=((1,), (2,), (3,)))
        >>> passages, question = torch.tensor([[[7, 8, 9]]]), torch.tensor([[5]])
        >>> context = ContextBuilder(template, max_context=6).build(
        ...     passages, torch.tensor([[3]]), question, torch.tensor([[1]]))
        >>> context.ids, int(context.n_cut)
        (tensor([[1, 7, 8, 2, 5, 3]]), 1)
    """

    def __init__(self, template: BoundTemplate, max_context: int) -> None:
        self.template = template
        self.max_context = max_context
        self.n_literals = sum(len(ids) for ids in template.literals)
        if max_context <= self.n_literals:
            raise ValueError(
                f"max_context: expected more than the template's {self.n_literals} tokens, got "
                f"{max_context}"
            )
        self._on_device: dict[torch.device, list[Tensor]] = {}

    def build(
        self, passage_ids: Tensor, passage_len: Tensor, prompt_ids: Tensor, prompt_mask: Tensor
    ) -> BuiltContext:
        """Lay the pieces of B questions with K passages each end to end.

        Args:
            passage_ids: `[B, K, Lp]` int64, right-padded.
            passage_len: `[B, K]` int64; 0 for a missing passage, whose context is the template
                with the question alone.
            prompt_ids: `[B, S]` int64, the questions in the generator's vocabulary, right-padded.
            prompt_mask: `[B, S]`, 1 at tokens.

        Returns:
            `BuiltContext`.

        Raises:
            ValueError: shapes disagree; question and template over the window (off the CPU, where
                reading a length would cost a wait, the width of `prompt_ids` counts as the
                question's).
        """
        n_questions, n_docs, passage_width = passage_ids.shape
        if prompt_ids.shape[0] != n_questions or prompt_mask.shape != prompt_ids.shape:
            raise ValueError(
                f"prompt_ids, prompt_mask: expected [B, S] with B = {n_questions}, got "
                f"{list(prompt_ids.shape)} and {list(prompt_mask.shape)}"
            )
        question_len = prompt_mask.long().sum(dim=1)
        room = self._room(question_len, prompt_ids.shape[1]).repeat_interleave(n_docs)  # [B*K]
        wanted = passage_len.reshape(-1)
        fills = {
            "passage": (passage_ids.flatten(0, 1), torch.minimum(wanted, room)),
            "question": (
                prompt_ids.repeat_interleave(n_docs, dim=0),
                question_len.repeat_interleave(n_docs),
            ),
        }
        total = fills["passage"][1] + fills["question"][1] + self.n_literals
        width = self._width(total, passage_width + prompt_ids.shape[1])
        ids = self._lay_out(fills, total, width)
        column = torch.arange(width, device=ids.device)
        mask = column >= (width - total)[:, None] if self._left else column < total[:, None]
        return BuiltContext(ids, mask.long(), (wanted > room).sum())

    @property
    def _left(self) -> bool:
        return self.template.kind == "causal"

    def _room(self, question_len: Tensor, width: int) -> Tensor:
        """Tokens that question and template leave for the passage."""
        room = self.max_context - self.n_literals - question_len
        longest, example = width, ""
        if room.device.type == "cpu" and len(question_len):
            worst = int(room.argmin())
            longest, example = int(question_len[worst]), f" (example {worst})"
        if longest + self.n_literals > self.max_context:
            raise ValueError(
                f"prompt_ids: expected question and template within max_context = "
                f"{self.max_context}, got {longest} + {self.n_literals} tokens{example}"
            )
        return room.clamp(min=0)

    def _width(self, total: Tensor, slots_width: int) -> int:
        """Columns of the batch: the longest row, or on a GPU, unread, a bound from the shapes."""
        if total.device.type == "cpu":
            return int(total.max())
        return min(self.max_context, slots_width + self.n_literals)

    def _lay_out(
        self, fills: dict[str, tuple[Tensor, Tensor]], total: Tensor, width: int
    ) -> Tensor:
        """Scatter every piece to its place; column `width` swallows what is padding or cut."""
        out = total.new_full((total.shape[0], width + 1), self.template.pad_id)
        at = width - total if self._left else torch.zeros_like(total)
        pieces = [
            (literal, torch.full_like(total, literal.numel())) for literal in self._literals(out)
        ]
        for i, slot in enumerate(self.template.slots):
            pieces.insert(2 * i + 1, fills[slot])
        for values, length in pieces:
            column = torch.arange(values.shape[-1], device=out.device)
            target = (at[:, None] + column).clamp(0, width)
            target = target.masked_fill(column >= length[:, None], width)
            out.scatter_(1, target, values.expand_as(target))
            at = at + length
        return out[:, :width]

    def _literals(self, like: Tensor) -> list[Tensor]:
        """The literal pieces on the device of `like`, copied there once."""
        if like.device not in self._on_device:
            self._on_device[like.device] = [
                torch.tensor(ids, dtype=torch.int64, device=like.device)
                for ids in self.template.literals
            ]
        return self._on_device[like.device]
