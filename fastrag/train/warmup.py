"""Warm start of encoders without questions: pairs of texts that belong together, from the corpus.

    ict     a sentence of a passage, and the passage without it      Lee et al. 2019
    title   the title of a passage, and its text
    spans   two spans of one passage, cropped independently          Izacard et al. 2022

Each pair is a question and its positive passage; the passages of the other pairs of a batch are the
negative ones (`fastrag.nn.contrastive.in_batch_nll`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastrag.data import Passage, Template
from fastrag.data.processor import MAX_PASSAGE, shortest
from fastrag.data.tokenization import encode_framed, pad_ids
from fastrag.messages import shown
from fastrag.nn.contrastive import in_batch_nll
from fastrag.nn.retriever import NORMALIZED_TAU

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Share of the pairs of ict whose passage keeps the sentence: words in common are a signal as well.
_KEPT = 0.1
_SPAN = (0.1, 0.5)  # share of the words of a passage in a span
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_TEMPLATE = Template.default("causal")

Pair = tuple[str, str]


def inverse_cloze(passage: Passage, rng: random.Random) -> Pair | None:
    """Return a sentence of a passage and the rest; None for a passage of one word.

    A passage of one sentence gives a run of a third of its words.

    Example:
        >>> passage = Passage("p", "Radium", "It glows. It was found in 1898.")
        >>> inverse_cloze(passage, random.Random(1))
        ('It glows.', 'Radium: It was found in 1898.')
    """
    sentences = _SENTENCE_END.split(passage.text.strip())
    if len(sentences) > 1:
        place, n = rng.randrange(len(sentences)), 1
    else:
        sentences = passage.text.split()
        n = max(1, len(sentences) // 3)
        if len(sentences) < 2:
            return None
        place = rng.randrange(len(sentences) - n + 1)
    question = " ".join(sentences[place : place + n])
    if rng.random() < _KEPT:
        return question, _TEMPLATE.render_passage(passage)
    rest = " ".join(sentences[:place] + sentences[place + n :])
    return question, _TEMPLATE.render_passage(Passage(passage.id, passage.title, rest))


def title_and_text(passage: Passage, rng: random.Random) -> Pair | None:
    """Return the title of a passage and its text; None without a title.

    Example:
        >>> title_and_text(Passage("p", "Radium", "It glows."), random.Random(0))
        ('Radium', 'It glows.')
    """
    return (passage.title, passage.text) if passage.title.strip() else None


def two_spans(passage: Passage, rng: random.Random) -> Pair | None:
    """Return two spans of a passage's words, which may overlap; None for a passage of one word.

    Example:
        >>> two_spans(Passage("p", "", "a b c d e f g h"), random.Random(0))
        ('d e f g', 'h')
    """
    words = _TEMPLATE.render_passage(passage).split()
    if len(words) < 2:
        return None
    return _span(words, rng), _span(words, rng)


TASKS: dict[str, Callable[[Passage, random.Random], Pair | None]] = {
    "ict": inverse_cloze,
    "title": title_and_text,
    "spans": two_spans,
}


def warm_up(
    question_encoder: nn.Module,
    passage_encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    *,
    passage_tokenizer: PreTrainedTokenizerBase | None = None,
    task: str = "ict",
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    tau: float | None = None,
    max_question: int = 64,
    max_passage: int = MAX_PASSAGE,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train encoders on pairs of texts of a corpus, before there is a single question.

        loss = -log exp(q_b . d_b / tau) / sum_j exp(q_b . d_j / tau),  j over the batch

    The learning rate rises over the first tenth of the steps and then falls to 0. The encoders are
    changed in place, and keep their modes.

    Args:
        question_encoder: maps `(input_ids, attention_mask)` to `[B, D]`; its attributes `prefix`
            and `max_length` are used if it has them.
        passage_encoder: the same for passages; may share its weights, or be the same module.
        tokenizer: of the question encoder.
        passages: the corpus.
        passage_tokenizer: of the passage encoder; None: the same.
        task: "ict", "title" or "spans", see `TASKS`.
        steps: number of steps.
        batch_size: pairs per step. A larger batch has more negatives.
        learning_rate: largest learning rate of AdamW.
        tau: temperature; None: 0.05 if both encoders normalise, else 1.
        max_question: tokens of a question; longer texts are cut.
        max_passage: tokens of a passage; longer texts are cut.
        seed: of the choice of passages and texts.
        progress: show a progress bar with the loss.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a number out of range, an unknown task, or fewer than two passages of which the
            task makes pairs.

    Example:
        >>> losses = warm_up(encoder, encoder, tokenizer, passages, steps=100)    # doctest: +SKIP
    """
    for name, value in (("steps", steps), ("batch_size", batch_size - 1)):
        if value < 1:
            raise ValueError(
                f"{name}: expected an integer >= {1 if name == 'steps' else 2}, got "
                f"{steps if name == 'steps' else batch_size}"
            )
    if task not in TASKS:
        raise ValueError(f"task: expected one of {tuple(TASKS)}, got {shown(task)}")
    encoders = (question_encoder, passage_encoder)
    if tau is None:
        both = all(getattr(each, "normalize", False) for each in encoders)
        tau = NORMALIZED_TAU if both else 1.0
    sides = [
        (encoder, each, getattr(encoder, "prefix", ""), shortest(longest, _limit(encoder)))
        for encoder, each, longest in (
            (question_encoder, tokenizer, max_question),
            (passage_encoder, passage_tokenizer or tokenizer, max_passage),
        )
    ]
    rng = random.Random(seed)
    pairs = _Pairs(passages, task, rng)
    parameters = list(
        dict.fromkeys(p for each in encoders for p in each.parameters() if p.requires_grad)
    )
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / rise, (steps - i) / max(1, steps - rise)),
    )
    modes = [(part, part.training) for each in encoders for part in each.modules()]
    losses: list[Tensor] = []
    bar = tqdm(range(steps), desc=f"warm-up ({task})", disable=not progress)
    try:
        for each in encoders:
            each.train()
        for _ in bar:
            vectors = [
                _encode(*side, [pair[i] for pair in batch])
                for batch in [pairs.draw(batch_size)]
                for i, side in enumerate(sides)
            ]
            rows = torch.arange(len(vectors[0]), device=vectors[0].device).unsqueeze(1)
            loss = in_batch_nll(vectors[0], vectors[1].unsqueeze(1), rows, rows, tau).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if progress:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}")
    finally:
        bar.close()
        for part, mode in modes:
            part.training = mode
    return torch.stack(losses).tolist()


class _Pairs:
    """Draw pairs from passages in a random order, each once before any is repeated."""

    def __init__(self, passages: Sequence[Passage], task: str, rng: random.Random) -> None:
        self.passages, self.task, self.rng = passages, task, rng
        self._order: list[int] = []
        self._made = 0

    def draw(self, n: int) -> list[Pair]:
        """Return pairs of n different passages, or of fewer if there are no more."""
        made: dict[int, Pair] = {}
        for _ in range(2):  # what is left of one order, and the next
            while self._order and len(made) < n:
                place = self._order.pop()
                pair = TASKS[self.task](self.passages[place], self.rng)
                if pair is not None:
                    made[place] = pair
            if len(made) < n:
                self._order = list(range(len(self.passages)))
                self.rng.shuffle(self._order)
                self._order = [each for each in self._order if each not in made]
        if len(made) < 2:
            raise ValueError(
                f"passages: expected at least two of which {self.task} makes pairs, got "
                f"{len(made)} among {len(self.passages)}"
            )
        return list(made.values())


def _encode(
    encoder: nn.Module,
    tokenizer: Any,
    prefix: str,
    max_length: int | None,
    texts: Sequence[str],
) -> Tensor:
    framed = encode_framed(tokenizer, [prefix + text.strip() for text in texts], max_length)
    ids, mask = pad_ids(framed, tokenizer.pad_token_id or 0)
    device = next(encoder.parameters()).device
    vectors: Tensor = encoder(ids.to(device), mask.to(device))
    return vectors


def _limit(encoder: nn.Module) -> int | None:
    limit: int | None = getattr(encoder, "max_length", None)
    return limit


def _span(words: Sequence[str], rng: random.Random) -> str:
    n = max(1, round(rng.uniform(*_SPAN) * len(words)))
    start = rng.randrange(len(words) - n + 1)
    return " ".join(words[start : start + n])
