"""Cloze warm-up of the generator: say what was left out of a passage that it can read.

Self-supervised: it looks at passages alone, never at a question, an answer or a label, and does not
touch the retriever. It teaches the generator that what is asked for stands in the passage.

    input  <passage> <sep> <title> <mask>                          target  a salient span
    input  <passage> <sep> <up to 3 words> <mask> <up to 3 words>  target  the 1 to 4 words between

A salient span is a name or a number that the title does not hold (cf. Guu et al. 2020, sec. 3.4):
what a passage says about its title. Such spans teach where names of several words end.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from examples.demo.models import MASK, SEPARATOR, TEMPLATE
from fastrag.data import Passage

MAX_WORDS = 4  # left out
SHOWN_WORDS = 3  # on each side of the gap
SALIENT_SHARE = 0.6  # of the clozes
RARE = 0.005  # a word is rare if at most this share of the passages holds it
PUNCTUATION = ".,"
RAMP_STEPS = 20
DECAY_SHARE = 0.3


def salient_spans(passages: Sequence[Passage]) -> list[list[str]]:
    """Find the names and numbers in each passage that its title does not hold.

    A span is a run of words with capitals or digits, at least one of them rare. The first word of
    a sentence has a capital in any case: it counts only if it is rare.

    Args:
        passages: the corpus.

    Returns:
        The spans of each passage, without punctuation around them.
    """
    holders = Counter(word for passage in passages for word in set(_words(passage.text)))
    most = RARE * len(passages)
    found = []
    for passage in passages:
        known = _words(passage.title.lower())
        spans: list[str] = []
        run: list[str] = []
        for place, raw in enumerate([*passage.text.split(), ""]):
            word = raw.strip(PUNCTUATION)
            named = any(char.isupper() or char.isdigit() for char in word)
            if named and word.lower() not in known and (place or holders[word] <= most):
                run.append(raw)
            if run and (run[-1] is not raw or raw[-1] in PUNCTUATION):
                span = " ".join(run).strip(PUNCTUATION)
                if any(holders[each] <= most for each in _words(span)):
                    spans.append(span)
                run = []
        found.append(spans)
    return found


def _words(text: str) -> list[str]:
    return [word.strip(PUNCTUATION) for word in text.split()]


def make_cloze(passage: Passage, spans: Sequence[str], draw: random.Random) -> tuple[str, str]:
    """Leave something out of a passage's text.

    Args:
        passage: a passage of two words or more.
        spans: its salient spans; may be empty.
        draw: source of randomness.

    Returns:
        source, target: the generator's input and the words left out.
    """
    context = TEMPLATE.render_passage(passage) + SEPARATOR
    if spans and draw.random() < SALIENT_SHARE:
        return f"{context}{passage.title}{MASK}", draw.choice(spans)
    words = passage.text.split()
    length = draw.randint(1, min(MAX_WORDS, len(words) - 1))
    start = draw.randrange(len(words) - length + 1)
    end = start + length
    before = " ".join(words[max(0, start - SHOWN_WORDS) : start])
    after = " ".join(words[end : end + SHOWN_WORDS])
    return f"{context}{before}{MASK}{after}", " ".join(words[start:end]).rstrip(".")


def clozes(passages: Sequence[Passage], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Make clozes without end: one of every passage, in random order, then the next round."""
    spans = salient_spans(passages)
    while True:
        for row in draw.sample(range(len(passages)), len(passages)):
            yield make_cloze(passages[row], spans[row], draw)


def warm_up(
    generator: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    passages: Sequence[Passage],
    *,
    steps: int = 150,
    batch_size: int = 32,
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
    source = clozes(passages, random.Random(seed))
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
            sources, targets = zip(*itertools.islice(source, batch_size), strict=True)
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
