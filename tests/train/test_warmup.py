"""Warm start of encoders from a corpus alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from fastrag.data import Passage
from fastrag.train.warmup import TASKS, inverse_cloze, two_spans, warm_up
from tests.tiny import encoder, passages, tokenizer

PASSAGE = Passage("p", "ada", "ada likes red . bob likes blue . cleo likes green .")


def test_pairs_belong_to_their_passage():
    whole_text = f"{PASSAGE.title}: {PASSAGE.text}"
    words = Counter(whole_text.split())
    rng = random.Random(0)
    kept = 0
    for _ in range(200):
        question, rest = inverse_cloze(PASSAGE, rng)
        whole = Counter(question.split()) + Counter(rest.split())
        assert rest.startswith("ada: ") and question in PASSAGE.text
        kept += whole != words
        if whole != words:
            assert Counter(rest.split()) == words
        for span in two_spans(PASSAGE, rng):
            assert span in whole_text
            assert 1 <= len(span.split()) <= 7
    assert 5 <= kept <= 40  # a tenth keeps the sentence


@pytest.mark.parametrize("task", TASKS)
def test_loss_falls_and_modes_stay(task):
    one, other = encoder().eval(), encoder(seed=1)
    before = one.model.embeddings.word_embeddings.weight.detach().clone()
    losses = warm_up(
        one, other, tokenizer("encoder"), passages(), task=task, steps=30, batch_size=8,
        learning_rate=1e-3,
    )  # fmt: skip
    # In the passages of two words, half of the questions of ict are the word that all have.
    least = 0.95 if task == "ict" else 0.8
    assert len(losses) == 30 and sum(losses[-5:]) < least * sum(losses[:5])
    assert not one.training and other.training
    assert not torch.equal(before, one.model.embeddings.word_embeddings.weight)
    again = warm_up(
        encoder(), encoder(seed=1), tokenizer("encoder"), passages(), task=task, steps=2,
        batch_size=8, learning_rate=1e-3,
    )  # fmt: skip
    assert again[0] == losses[0]  # by the seed


def test_rejects():
    made = (encoder(), encoder(), tokenizer("encoder"))
    for settings, message in (
        ({"task": "cloze"}, "task: expected one of"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"batch_size": 1}, "batch_size: expected an integer >= 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            warm_up(*made, passages(), **settings)
    untitled = [Passage(each.id, "", each.text) for each in passages()]
    with pytest.raises(ValueError, match="at least two of which title makes pairs, got 0 among 12"):
        warm_up(*made, untitled, task="title", steps=1)
