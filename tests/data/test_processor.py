"""RagProcessor from outside: batches, passages, contexts, answers, folders and refusals."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag import PassageStore, RagProcessor
from fastrag.data import Passage, Question, RagCollator, Template
from fastrag.data.tokenization import pad_ids

QUESTIONS = [
    Question("q0", "where is Paris?", ("Paris is the capital", "France")),
    Question("q1", "what is the capital of Germany?", ("Berlin",)),
]


PASSAGES = [
    Passage("p0", "Paris", "the capital of France"),
    Passage("p1", "", "Berlin is in Germany </s> [SEP]"),
]


@pytest.fixture
def make(family):
    """make(**settings) -> a processor of a BERT and a GPT-2, or of another generator."""

    def made(generator="gpt2", kind="causal", **settings):
        return RagProcessor(family("bert"), family(generator), kind=kind, **settings)

    return made


@pytest.fixture
def processor(make):
    return make()


def test_batch(family, processor):
    batch = processor.collate(QUESTIONS)
    encoder = family("bert")([q.question for q in QUESTIONS], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], encoder["input_ids"])
    assert torch.equal(batch["attention_mask"], encoder["attention_mask"])
    for i, question in enumerate(QUESTIONS):
        prompt = processor.bound.question_ids(question.question)
        assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == prompt
        assert batch["prompt_mask"][i].tolist() == sorted(batch["prompt_mask"][i].tolist())[::-1]
        answer = processor.bound.answer_ids(question.answers[0])
        assert batch["labels"][i, : len(answer)].tolist() == answer
        assert set(batch["labels"][i, len(answer) :].tolist()) <= {-100}
    assert all(
        batch[key].dtype == torch.int64
        for key in ("input_ids", "attention_mask", "prompt_ids", "prompt_mask", "labels")
    )


def test_eos_is_a_label_where_pad_is_eos(family, processor):
    tokenizer = family("gpt2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = processor.collate(QUESTIONS)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]
    counted = (labels != -100).sum(dim=1).tolist()
    assert counted == [len(processor.bound.answer_ids(q.answers[0])) for q in QUESTIONS]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_masks_come_from_lengths(lengths):
    ids, mask = pad_ids([[7] * n for n in lengths], -100)
    assert mask.sum(dim=1).tolist() == lengths
    assert torch.equal(ids == 7, mask.bool()) and (ids[mask == 0] == -100).all()


def test_batch_equals_one_by_one(processor):
    together = processor.collate(QUESTIONS)
    assert {len(x) for x in together.values()} == {len(QUESTIONS)}  # any part may be cut along B
    for i, question in enumerate(QUESTIONS):
        alone = processor.collate([question])
        for key in ("input_ids", "prompt_ids", "labels"):
            width = alone[key].shape[1]
            assert torch.equal(together[key][i, :width], alone[key][0])


def test_seq2seq_labels_are_the_tokenizers_own(family, make):
    labels = make("bart", "seq2seq").collate(QUESTIONS)["labels"]
    expected = family("bart")(text_target="Berlin")["input_ids"]
    assert labels[1, : len(expected)].tolist() == expected


def test_mappings_are_questions(processor):
    records = [{"question": q.question, "answers": list(q.answers)} for q in QUESTIONS]
    for key, value in processor.collate(QUESTIONS).items():
        assert torch.equal(processor.collate(records)[key], value)


def test_without_answers_there_are_no_labels(processor):
    batch = processor.collate([{"question": "where?"}])
    assert set(batch) == {"input_ids", "attention_mask", "prompt_ids", "prompt_mask"}
    strict = RagCollator(processor, require_answers=True)
    with pytest.raises(ValueError, match="question 'x': expected answers .training needs them"):
        strict([{"id": "x", "question": "where?"}])


def test_random_answers_follow_torchs_seed(processor):
    collator = RagCollator(processor, answer_choice="random")
    first, second = (processor.bound.answer_ids(answer) for answer in QUESTIONS[0].answers)

    def draw(seed):
        torch.manual_seed(seed)
        return [collator(QUESTIONS[:1])["labels"][0].tolist() for _ in range(20)]

    drawn = draw(0)
    assert drawn == draw(0)
    assert first in drawn and second in drawn


def test_limits(family, make):
    processor = make(max_answer=2, max_question=4, question_prefix="query: ")
    batch = processor.collate(QUESTIONS)
    full = processor.bound.answer_ids(QUESTIONS[0].answers[0])
    assert batch["labels"][0].tolist() == full[:2]  # cut, its end token too
    assert batch["input_ids"].shape[1] == 4
    cls, sep = family("bert").cls_token_id, family("bert").sep_token_id
    assert batch["input_ids"][:, 0].tolist() == [cls, cls]
    assert batch["input_ids"][:, -1].tolist() == [sep, sep]


def test_the_tokenizers_own_limit_cuts_the_encoders_question(family, processor):
    """With a warning, which is not repeated, and without a change of the generator's copy."""
    assert family("bert").model_max_length == 64
    long = {"question": "where is Paris? " * 50, "id": "q7"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        processor.collate([{"question": "where is Paris?"}])
        assert not seen
        batches = [processor.collate([long]) for _ in range(2)]
    assert [str(each.message).partition(";")[0] for each in seen] == [
        "question 'q7': cut to the encoder's 64 tokens"
    ]
    assert batches[0]["input_ids"].shape == (1, 64) and batches[0]["prompt_ids"].shape[1] == 200


def test_question_and_template_over_the_window(make):
    bound = make().bound
    n_template = bound.n_literal_tokens
    n_question = len(bound.question_ids(QUESTIONS[1].question))
    roomy = make(max_context=n_template + n_question + 1)
    assert roomy.collate([QUESTIONS[1]])["prompt_ids"].shape == (1, n_question)
    tight = make(max_context=n_template + n_question)
    with pytest.raises(ValueError, match=rf"question 'q1'.*{n_question} \+ {n_template} tokens"):
        tight.collate(QUESTIONS[1:])
    short = make(max_prompt=n_question - 1)
    with pytest.raises(
        ValueError, match=rf"at most max_prompt = {n_question - 1} tokens in .* got"
    ):
        short.collate(QUESTIONS[1:])


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
def test_rejects_bad_examples(processor, examples, message):
    with pytest.raises(ValueError, match=message):
        processor.collate(examples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_answer": 0}, "max_answer: expected at least 1 token or None, got 0"),
        ({"max_context": 3}, "max_context: expected more than the template's"),
        ({"max_question": 2}, "max_question: expected more than the tokenizer's 2"),
        ({"max_context": None}, "max_context: expected a whole number, got None"),
        ({"max_passage": "9"}, "max_passage: expected a whole number, got '9'"),
        ({"kind": "other"}, "kind: expected one of"),
        ({"template": "plain"}, "template: expected a Template or None, got str"),
        ({"passage_tokenizer": "bert"}, "passage_tokenizer: expected a tokenizer .* got str"),
    ],
)
def test_rejects_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**arguments)


def test_the_collator_rejects_bad_arguments(processor):
    with pytest.raises(ValueError, match="answer_choice: expected 'first' or .* got 'last'"):
        RagCollator(processor, answer_choice="last")
    with pytest.raises(ValueError, match="^processor: expected a RagProcessor, got Template"):
        RagCollator(Template.default("causal"))


def test_rejects_what_is_no_tokenizer(family):
    with pytest.raises(ValueError, match="^question_tokenizer: expected a tokenizer .* NoneType$"):
        RagProcessor(None, None)
    with pytest.raises(ValueError, match="^generator_tokenizer: expected a tokenizer .* got str$"):
        RagProcessor(family("bert"), "gpt2")


def test_contexts_are_what_the_template_renders(family, processor):
    """Retrieved passages and questions come together as the tokenizer would encode the whole."""
    store = PassageStore.build(PASSAGES, processor)
    batch = processor.collate(QUESTIONS)
    rows = torch.tensor([[1, 0], [0, -1]])
    contexts = processor.contexts(store, rows, batch["prompt_ids"], batch["prompt_mask"])
    texts = family("gpt2").batch_decode(
        [ids[keep] for ids, keep in zip(contexts.ids, contexts.mask.bool(), strict=True)]
    )
    rendered = [*map(processor.template.render_passage, PASSAGES), ""]
    expected = [
        processor.template.render(rendered[row], question.question)
        for question, of in zip(QUESTIONS, rows.tolist(), strict=True)
        for row in of
    ]
    assert [text.split() for text in texts] == [text.split() for text in expected]
    assert int(contexts.n_cut) == 0


def test_contexts_are_cut_at_max_context(make):
    bound = make().bound
    width = bound.n_literal_tokens + len(bound.question_ids(QUESTIONS[0].question)) + 3
    processor = make(max_context=width)
    store = PassageStore.build(PASSAGES, processor)
    batch = processor.collate(QUESTIONS[:1])
    contexts = processor.contexts(store, torch.tensor([[0, 1]]), batch["prompt_ids"])
    assert contexts.ids.shape == (2, width) and bool(contexts.mask.all())
    assert int(contexts.n_cut) == 2 and store.lengths("generator").min() > 3
    n_vocab = len(processor.generator_tokenizer)
    with pytest.raises(ValueError, match=rf"prompt_ids: expected token ids in \[0, {n_vocab}\)"):
        processor.contexts(store, torch.tensor([[0]]), torch.tensor([[n_vocab]]))


def test_passages_are_cut_and_prefixed_for_the_encoder(family, make):
    processor = make(passage_prefix="where ", max_passage=5)
    tokens = processor.tokenize(PASSAGES)
    whole = family("bert")("where Paris: the capital of France")["input_ids"]
    assert tokens["encoder"][0] == [*whole[:4], whole[-1]]
    assert tokens["generator"] == [processor.bound.passage_ids(each) for each in PASSAGES]


def test_decode_drops_padding_and_special_tokens(processor):
    labels = processor.collate(QUESTIONS)["labels"]
    assert (labels == -100).any()
    assert processor.decode(labels) == ["Paris is the capital", "Berlin"]


@pytest.mark.parametrize("own", [False, True], ids=["one_encoder", "own_passage_tokenizer"])
def test_a_saved_processor_comes_back(family, make, tmp_path, own):
    processor = make(
        "bart",
        "seq2seq",
        template=Template("{passage} // {question}", passage="{text} ({title})"),
        passage_tokenizer=family("t5") if own else None,
        question_prefix="query: ",
        passage_prefix="where ",
        max_question=9,
        max_prompt=40,
        max_answer=None,
        max_passage=6,
        max_context=77,
    )
    processor.save_pretrained(tmp_path)
    again = RagProcessor.from_pretrained(tmp_path)
    assert again.streams() == processor.streams()
    assert (again.template, again.kind) == (processor.template, "seq2seq")
    for name in ("question", "prompt", "answer", "passage", "context"):
        assert getattr(again, f"max_{name}") == getattr(processor, f"max_{name}")
    for key, value in processor.collate(QUESTIONS).items():
        assert torch.equal(again.collate(QUESTIONS)[key], value)
    assert again.tokenize(PASSAGES) == processor.tokenize(PASSAGES)
    assert (tmp_path / "passage_encoder").exists() == own
    assert RagProcessor.from_pretrained(tmp_path, max_context=99).max_context == 99


def test_damaged_folders_are_named(processor, tmp_path):
    with pytest.raises(ValueError, match="processor.json: expected a JSON file, got No such file"):
        RagProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor.json").read_text())
    for change, message in (
        ({"max_context": None}, "processor.json: max_context: expected a whole number"),
        ({"kind": "other"}, "processor.json: kind: expected one of"),
        ({"template": {}}, "processor.json: template: expected the key"),
        ({"depth": 3}, "processor.json: expected the keys"),
    ):
        (tmp_path / "processor.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            RagProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor.json").write_text(json.dumps(settings))
    (tmp_path / "generator" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="generator: expected a tokenizer, found none"):
        RagProcessor.from_pretrained(tmp_path)


def test_for_encoders_takes_prefixes_and_lengths(family):
    class Encoder:
        prefix = "query: "
        max_length = 12

    def fitting(**settings):
        tokenizers = family("bert"), family("gpt2")
        return RagProcessor.for_encoders(Encoder(), None, *tokenizers, kind="causal", **settings)

    one = fitting()
    assert (one.question_prefix, one.passage_prefix) == ("query: ", "")
    assert (one.max_question, one.max_passage) == (12, 256)
    assert fitting(max_question=5, max_passage=7).max_question == 5
    assert fitting(max_question=50).max_question == 12
