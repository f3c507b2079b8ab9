"""Contexts: template, passage and question joined token by token into the generator's input.

    context = literal_0  slot_0  literal_1  slot_1  literal_2        (slots: passage and question)

The passage is cut on the right until everything fits; question and template are never cut. The
number of kernels does not depend on B or K, and nothing waits for a GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastrag.data.templates import BoundTemplate


class Contexts(NamedTuple):
    """The generator's inputs for B questions with K passages each.

    Attributes:
        ids: context token ids, `[B*K, L]` int64, the K contexts of a question next to each other;
            padded on the left for a causal generator, on the right for a seq2seq one.
        mask: `[B*K, L]` int64, 1 at tokens; every row has some.
        n_cut: how many passages were cut, a 0-d int64 tensor on the device of the ids.
    """

    ids: Tensor
    mask: Tensor
    n_cut: Tensor


def join_contexts(
    template: BoundTemplate,
    max_context: int,
    passage_ids: Tensor,
    passage_len: Tensor,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
) -> Contexts:
    """Join the pieces of B questions with K passages each.

    Args:
        template: a template bound to the generator's tokenizer.
        max_context: longest context, in tokens.
        passage_ids: `[B, K, Lp]` int64, right-padded.
        passage_len: `[B, K]` int64; 0 for a missing passage, whose context is the template with the
            question alone.
        prompt_ids: `[B, S]` int64, the questions in the generator's vocabulary.
        prompt_mask: `[B, S]`, 1 at tokens.

    Returns:
        `Contexts`.

    Raises:
        ValueError: shapes disagree, or question and template are longer than `max_context` (off the
            CPU, where reading a length would cost a wait, the width of `prompt_ids` counts as the
            question's length).

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> template = SimpleNamespace(kind="causal", slots=("passage", "question"), pad_id=0,
        ...                            literals=((1,), (2,), (3,)))
        >>> passages, question = torch.tensor([[[7, 8, 9]]]), torch.tensor([[5]])
        >>> contexts = join_contexts(
        ...     template, 6, passages, torch.tensor([[3]]), question, torch.tensor([[1]]))
        >>> contexts.ids, int(contexts.n_cut)
        (tensor([[1, 7, 8, 2, 5, 3]]), 1)
    """
    n_questions, n_docs, passage_width = passage_ids.shape
    if prompt_ids.shape[0] != n_questions or prompt_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"prompt_ids, prompt_mask: expected [B, S] with B = {n_questions}, got "
            f"{list(prompt_ids.shape)} and {list(prompt_mask.shape)}"
        )
    device = passage_ids.device
    prompt_mask = prompt_mask.bool()
    n_literals = sum(map(len, template.literals))
    room = max_context - n_literals - prompt_mask.sum(dim=1)  # [B], tokens left for the passage
    _check_room(room, n_literals, prompt_ids.shape[1], max_context)
    kept = torch.minimum(passage_len, room.clamp(min=0)[:, None])  # [B, K]
    slots = {
        "passage": (passage_ids, torch.arange(passage_width, device=device) < kept[..., None]),
        "question": (prompt_ids[:, None], prompt_mask[:, None]),
    }
    first, second, third = _on_device(template.literals, device)
    pieces = (first, slots[template.slots[0]], second, slots[template.slots[1]], third)
    # [B*K, W]: all pieces side by side, with their padding
    tokens, present = (
        torch.cat([x.expand(n_questions, n_docs, -1) for x in part], dim=2).flatten(0, 1)
        for part in zip(*pieces, strict=True)
    )
    place = present.cumsum(dim=1)  # 1 for the first token of a context
    total = place[:, -1:]
    # On a GPU the longest row is not read; the shapes bound it.
    width = int(total.max()) if device.type == "cpu" else min(max_context, tokens.shape[1])
    column = torch.arange(width, device=device)
    if template.kind == "causal":
        place = place + (width - total)
        mask = column >= width - total
    else:
        mask = column < total
    # Column 0 receives the padding of all pieces and is dropped.
    ids = tokens.new_full((len(tokens), width + 1), template.pad_id)
    ids.scatter_(1, place.masked_fill(~present, 0), tokens)
    return Contexts(ids[:, 1:], mask.long(), (kept < passage_len).sum())


def _check_room(room: Tensor, n_literals: int, width: int, max_context: int) -> None:
    """Raise ValueError if a question and the template are longer than the window."""
    longest, example = width, ""
    if room.device.type == "cpu" and len(room):
        worst = int(room.argmin())
        longest, example = max_context - n_literals - int(room[worst]), f" (example {worst})"
    if longest + n_literals > max_context:
        raise ValueError(
            f"prompt_ids: expected question and template within max_context = {max_context}, got "
            f"{longest} + {n_literals} tokens{example}"
        )


@functools.lru_cache(maxsize=64)
def _on_device(
    literals: tuple[tuple[int, ...], ...], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Ids and mask of each literal; cached, because a copy to a GPU in each step costs a wait."""
    tensors = [torch.tensor(ids, dtype=torch.int64, device=device) for ids in literals]
    return [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in tensors]
