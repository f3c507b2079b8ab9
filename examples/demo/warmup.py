"""Cloze warm-up of the generator: fill in words left out of a passage that it can read.

Unsupervised: it looks at passages alone, never at a question or an answer, and does not touch the
retriever. It teaches the generator that what is asked for stands in the passage.

    input  <passage> <sep> <up to 3 words> <mask> <up to 3 words>      target  <the 1 to 4 words>
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from examples.demo.models import MASK, SEPARATOR
from fastrag.data import Passage

MAX_WORDS = 4  # left out
SHOWN_WORDS = 3  # on each side of the gap
RAMP_STEPS = 20
DECAY_SHARE = 0.3


def make_cloze(text: str, draw: random.Random) -> tuple[str, str]:
    """Leave some words out of a text.

    Args:
        text: a passage of two words or more.
        draw: source of randomness.

    Returns:
        source, target: the generator's input and the words left out.
    """
    words = text.split()
    length = draw.randint(1, min(MAX_WORDS, len(words) - 1))
    start = draw.randrange(len(words) - length + 1)
    end = start + length
    before = " ".join(words[max(0, start - SHOWN_WORDS) : start])
    after = " ".join(words[end : end + SHOWN_WORDS])
    return f"{text}{SEPARATOR}{before}{MASK}{after}", " ".join(words[start:end])


def warm_up(
    generator: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    passages: Sequence[Passage],
    *,
    steps: int = 250,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train the generator on clozes.

    Args:
        generator: changed in place.
        tokenizer: its tokenizer.
        passages: the corpus.
        steps: optimiser steps.
        batch_size: clozes per step.
        learning_rate: highest rate; the last `DECAY_SHARE` of the steps decays it linearly.
        seed: of the drawing.
        progress: show a progress bar.

    Returns:
        Mean loss over the last tenth of the steps.
    """
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(
        generator.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    n_decay = max(1.0, DECAY_SHARE * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / RAMP_STEPS, 0.05 + (steps - step) / n_decay)
    )
    generator.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="cloze warm-up", unit="step", disable=not progress) as bar:
        for _ in range(steps):
            clozes = [make_cloze(draw.choice(passages).text, draw) for _ in range(batch_size)]
            sources, targets = zip(*clozes, strict=True)
            batch = tokenizer(list(sources), padding=True, return_tensors="pt")
            answers = tokenizer(list(targets), padding=True, return_tensors="pt")
            labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
            loss = generator(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
            bar.update()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last) if last else float("nan")
