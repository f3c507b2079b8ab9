"""join_contexts against lists joined one by one."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.data.processor import join_contexts
from tests.tiny import TEMPLATE, tokenizer

ORDERS = [("passage", "question"), ("question", "passage")]


def padded(sequences):
    width = max(1, max(map(len, sequences)))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids, torch.tensor([len(sequence) for sequence in sequences])


def built(template, max_context, passages, questions):
    """Build from lists of lists."""
    flat, lengths = padded([passage for row in passages for passage in row])
    shape = (len(passages), len(passages[0]))
    prompts, prompt_len = padded(questions)
    mask = (torch.arange(prompts.shape[1]) < prompt_len[:, None]).long()
    passages = (flat.unflatten(0, shape), lengths.view(shape))
    return join_contexts(template, max_context, *passages, prompts, mask)


def expected(template, max_context, passages, questions):
    rows, n_cut = [], 0
    for question, row in zip(questions, passages, strict=True):
        for passage in row:
            room = max_context - sum(map(len, template.literals)) - len(question)
            n_cut += len(passage) > room
            pieces = {"passage": passage[:room], "question": question}
            first, second = template.slots
            one, two, three = template.literals
            rows.append([*one, *pieces[first], *two, *pieces[second], *three])
    return rows, n_cut


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_questions=st.integers(1, 4),
    n_docs=st.integers(1, 3),
    kind=st.sampled_from(["seq2seq", "causal"]),
    slots=st.sampled_from(ORDERS),
    literals=st.sampled_from([((90, 91), (92,), (93,)), ((), (), ()), ((90,), (), (91, 92))]),
    max_context=st.integers(10, 30),
)
def test_equals_lists(seed, n_questions, n_docs, kind, slots, literals, max_context):
    drawn = random.Random(seed)
    template = SimpleNamespace(kind=kind, slots=slots, literals=literals, pad_id=7)
    words = lambda most: [drawn.randint(10, 80) for _ in range(drawn.randint(0, most))]  # noqa: E731
    passages = [[words(25) for _ in range(n_docs)] for _ in range(n_questions)]
    questions = [words(4) + [11] for _ in range(n_questions)]
    context = built(template, max_context, passages, questions)
    rows, n_cut = expected(template, max_context, passages, questions)
    assert [
        ids[keep].tolist() for ids, keep in zip(context.ids, context.mask.bool(), strict=True)
    ] == rows
    assert int(context.n_cut) == n_cut
    if slots[0] == "question":
        assert context.prefix_len is None
    else:
        after = len(literals[2])
        lengths = torch.tensor([len(row) for row in rows]).view(n_questions, n_docs)
        own = torch.tensor([[len(question) + after] for question in questions])
        assert context.prefix_len.equal((lengths - own).flatten())
    assert context.ids.shape[1] == max(map(len, rows)) <= max_context
    assert (context.ids[context.mask == 0] == 7).all()
    edge = context.mask[:, -1] if kind == "causal" else context.mask[:, 0]
    assert edge.all() and (context.mask.diff(dim=1).abs().sum(dim=1) <= 1).all()


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_missing_passage_leaves_a_question(kind):
    template = TEMPLATE.bind(tokenizer(kind), kind)
    context = built(template, 16, [[[], [20, 21]]], [[30]])
    literals = [list(ids) for ids in template.literals]
    alone = context.ids[0][context.mask[0].bool()].tolist()
    assert alone == [*literals[0], *literals[1], 30, *literals[2]]
    assert int(context.n_cut) == 0


def test_bound_template_gives_the_joint_encoding():
    words = tokenizer("causal")
    template = TEMPLATE.bind(words, "causal")
    passage = words("ada likes red")["input_ids"]
    context = built(template, 16, [[passage]], [words("bob")["input_ids"]])
    assert words.decode(context.ids[0]) == TEMPLATE.render("ada likes red", "bob")


def test_width_needs_no_values_off_the_cpu():
    """On a GPU the width is a bound from the shapes; the surplus is padding."""
    template = SimpleNamespace(
        kind="seq2seq", slots=ORDERS[0], literals=((1,), (2,), (3,)), pad_id=0
    )
    join = functools.partial(join_contexts, template, 16)
    meta = torch.zeros(2, 3, 5, dtype=torch.int64, device="meta")
    prompts = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    context = join(meta, meta[..., 0], prompts, prompts)
    assert context.ids.shape == context.mask.shape == (6, 12)
    wide = torch.zeros(2, 14, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"within max_context = 16, got 14 \+ 3 tokens"):
        join(meta, meta[..., 0], wide, wide)


def test_rejects():
    template = SimpleNamespace(
        kind="causal", slots=ORDERS[0], literals=((1,), (2,), (3,)), pad_id=0
    )
    with pytest.raises(
        ValueError, match=r"within max_context = 6, got 4 \+ 3 tokens \(example 1\)"
    ):
        built(template, 6, [[[5]], [[5]]], [[6], [6, 6, 6, 6]])
    with pytest.raises(ValueError, match=r"expected \[B, S\] with B = 1, got \[2, 1\]"):
        join_contexts(
            template,
            6,
            torch.ones(1, 1, 1, dtype=torch.int64),
            torch.ones(1, 1, dtype=torch.int64),
            torch.ones(2, 1, dtype=torch.int64),
            torch.ones(2, 1, dtype=torch.int64),
        )
