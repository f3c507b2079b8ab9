from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.data import Question, RagCollator, Template
from fastrag.data.collator import pad_ids, valid_rows

QUESTIONS = [
    Question("q0", "where is Paris?", ("Paris is the capital", "France")),
    Question("q1", "what is the capital of Germany?", ("Berlin",)),
]


@pytest.fixture
def collator(family):
    return RagCollator(family("bert"), family("gpt2"), kind="causal")


def test_batch(family, collator):
    batch = collator(QUESTIONS)
    encoder = family("bert")([q.question for q in QUESTIONS], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], encoder["input_ids"])
    assert torch.equal(batch["attention_mask"], encoder["attention_mask"])
    for i, question in enumerate(QUESTIONS):
        prompt = collator.bound.question_ids(question.question)
        assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == prompt
        assert batch["prompt_mask"][i].tolist() == sorted(batch["prompt_mask"][i].tolist())[::-1]
        answer = collator.bound.answer_ids(question.answers[0])
        assert batch["labels"][i, : len(answer)].tolist() == answer
        assert set(batch["labels"][i, len(answer) :].tolist()) <= {-100}
    assert all(
        batch[key].dtype == torch.int64
        for key in ("input_ids", "attention_mask", "prompt_ids", "prompt_mask", "labels")
    )


def test_eos_is_a_label_where_pad_is_eos(family, collator):
    tokenizer = family("gpt2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = collator(QUESTIONS)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]
    counted = (labels != -100).sum(dim=1).tolist()
    assert counted == [len(collator.bound.answer_ids(q.answers[0])) for q in QUESTIONS]


def test_valid_rows_are_the_counted_labels(collator):
    batch = collator(QUESTIONS)
    expected = (batch["labels"].flatten() != -100).nonzero().flatten()
    assert batch["valid_rows"].dtype == torch.int32 and batch["valid_rows"].numel() == 256
    assert batch["valid_rows"][: len(expected)].tolist() == expected.tolist()
    assert set(batch["valid_rows"][len(expected) :].tolist()) == {-1}


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_valid_rows_property(lengths):
    ids, mask = pad_ids([[7] * n for n in lengths], -100)
    rows = valid_rows(lengths, ids.shape[1])
    assert rows.numel() % 256 == 0 and rows.numel() > 0
    kept = rows[rows >= 0]
    assert kept.tolist() == mask.flatten().nonzero().flatten().tolist()
    assert (ids.flatten()[kept.long()] == 7).all() and (ids == 7).sum() == sum(lengths)


def test_batch_equals_one_by_one(collator):
    together = collator(QUESTIONS)
    for i, question in enumerate(QUESTIONS):
        alone = collator([question])
        for key in ("input_ids", "prompt_ids", "labels"):
            width = alone[key].shape[1]
            assert torch.equal(together[key][i, :width], alone[key][0])


def test_seq2seq_labels_are_the_tokenizers_own(family):
    collator = RagCollator(family("bert"), family("bart"))
    labels = collator(QUESTIONS)["labels"]
    expected = family("bart")(text_target="Berlin")["input_ids"]
    assert labels[1, : len(expected)].tolist() == expected


def test_mappings_are_questions(collator):
    records = [{"question": q.question, "answers": list(q.answers)} for q in QUESTIONS]
    for key, value in collator(QUESTIONS).items():
        assert torch.equal(collator(records)[key], value)


def test_without_answers_there_are_no_labels(collator, family):
    batch = collator([{"question": "where?"}])
    assert set(batch) == {"input_ids", "attention_mask", "prompt_ids", "prompt_mask"}
    strict = RagCollator(family("bert"), family("gpt2"), kind="causal", require_answers=True)
    with pytest.raises(ValueError, match="question 'x': expected answers .training needs them"):
        strict([{"id": "x", "question": "where?"}])


def test_random_answers_follow_torchs_seed(family):
    collator = RagCollator(family("bert"), family("gpt2"), kind="causal", answer_choice="random")
    first, second = (collator.bound.answer_ids(answer) for answer in QUESTIONS[0].answers)

    def draw(seed):
        torch.manual_seed(seed)
        return [collator(QUESTIONS[:1])["labels"][0].tolist() for _ in range(20)]

    drawn = draw(0)
    assert drawn == draw(0)
    assert first in drawn and second in drawn


def test_limits(family):
    collator = RagCollator(
        family("bert"),
        family("gpt2"),
        kind="causal",
        max_answer=2,
        max_question=4,
        question_prefix="query: ",
    )
    batch = collator(QUESTIONS)
    full = collator.bound.answer_ids(QUESTIONS[0].answers[0])
    assert batch["labels"][0].tolist() == full[:2]  # cut, its end token too
    assert batch["input_ids"].shape[1] == 4
    cls, sep = family("bert").cls_token_id, family("bert").sep_token_id
    assert batch["input_ids"][:, 0].tolist() == [cls, cls]
    assert batch["input_ids"][:, -1].tolist() == [sep, sep]


def test_the_tokenizers_own_limit_cuts_the_encoders_question(family):
    assert family("bert").model_max_length == 64
    batch = RagCollator(family("bert"), family("gpt2"))([{"question": "where is Paris? " * 50}])
    assert batch["input_ids"].shape == (1, 64)


def test_question_and_template_over_the_window(family):
    bound = Template.default("causal").bind(family("gpt2"), "causal")
    n_template = bound.n_literal_tokens
    n_question = len(bound.question_ids(QUESTIONS[1].question))
    roomy = RagCollator(
        family("bert"), family("gpt2"), kind="causal", max_context=n_template + n_question + 1
    )
    assert roomy([QUESTIONS[1]])["prompt_ids"].shape == (1, n_question)
    tight = RagCollator(
        family("bert"), family("gpt2"), kind="causal", max_context=n_template + n_question
    )
    with pytest.raises(ValueError, match=rf"question 'q1'.*{n_question} \+ {n_template} tokens"):
        tight(QUESTIONS[1:])
    short = RagCollator(family("bert"), family("gpt2"), kind="causal", max_prompt=n_question - 1)
    with pytest.raises(
        ValueError, match=rf"at most max_prompt = {n_question - 1} tokens in .* got"
    ):
        short(QUESTIONS[1:])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least one question"),
        ([{"question": "  "}], r"examples\[0\]: question: expected text, got an empty one"),
        ([Question("q9", " ", ("a",))], "q9"),
        ([{"answers": ["a"]}], r"examples\[0\]: question: expected text, got nothing"),
        ([{"question": "a", "answers": ["b"]}, {"id": "x", "question": "c"}], "question 'x'"),
        ([{"question": "a", "answers": [""]}], "answers: expected text, got an empty one"),
        ([Question("q8", "a", (" ",))], "question 'q8': expected an answer, got an empty text"),
        (["a"], r"examples\[0\]: expected a record, got str"),
    ],
)
def test_rejects_bad_examples(collator, examples, message):
    with pytest.raises(ValueError, match=message):
        collator(examples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer_choice": "last"}, "answer_choice: expected 'first' or 'random', got 'last'"),
        ({"max_answer": 0}, "max_answer: expected at least 1 token or None, got 0"),
        ({"max_context": 3}, "max_context: expected more than the template's"),
        ({"max_question": 2}, "max_question: expected more than the tokenizer's 2"),
        ({"kind": "other"}, "kind: expected one of"),
    ],
)
def test_rejects_bad_arguments(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        RagCollator(family("bert"), family("gpt2"), **arguments)


def test_rejects_what_is_no_tokenizer(family):
    with pytest.raises(ValueError, match="^question_tokenizer: expected a tokenizer .* NoneType$"):
        RagCollator(None, None)
    with pytest.raises(ValueError, match="^generator_tokenizer: expected a tokenizer .* got str$"):
        RagCollator(family("bert"), "gpt2")
