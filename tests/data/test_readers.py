from __future__ import annotations

import csv
import gzip
import json
import lzma
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.data import Passage, Question, read_passages, read_questions

PASSAGES = [
    Passage("p1", "Paris", "Paris is the capital of France."),
    Passage("p2", "", 'A "quoted" text,\nwith a line break\tand a tab.'),
    Passage("3", "Ünïcode", "東京"),
]
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write_text(path, text):
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_jsonl(tmp_path, suffix):
    records = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    path = write_text(tmp_path / f"p.jsonl{suffix}", jsonl(records))
    assert list(read_passages(path)) == PASSAGES
    assert list(read_passages(str(path))) == PASSAGES


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.tsv.gz", "p.csv.xz"])
def test_separated(tmp_path, name):
    path = tmp_path / name
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="," if ".csv" in name else "\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([p.id, p.text, p.title] for p in PASSAGES)
    assert list(read_passages(path)) == PASSAGES


def test_dpr_passages(tmp_path):
    # the first rows of psgs_w100.tsv, as DPR writes them
    text = (
        "id\ttext\ttitle\n"
        '1\t"Aaron Aaron ( or ; ""Ahärôn"") is a prophet, high priest"\tAaron\n'
        "2\tGod at Sinai granted Aaron the priesthood\tAaron\n"
    )
    path = write_text(tmp_path / "psgs_w100.tsv", text)
    assert list(read_passages(path)) == [
        Passage("1", "Aaron", 'Aaron Aaron ( or ; "Ahärôn") is a prophet, high priest'),
        Passage("2", "Aaron", "God at Sinai granted Aaron the priesthood"),
    ]


def test_a_field_may_be_longer_than_the_csv_default(tmp_path):
    long = "word " * 100_000
    path = write_text(tmp_path / "p.csv", f"id,text\n1,{long}\n")
    assert [len(p.text) for p in read_passages(path)] == [len(long)]


def test_dpr_questions(tmp_path):
    rows = [
        "who got the first nobel prize in physics\t['Wilhelm Conrad Röntgen']",
        'who is it\t"[\'O""Neil\', ""D\'Arcy""]"',
    ]
    path = write_text(tmp_path / "nq-test.csv", "\n".join(rows) + "\n")
    first, second = read_questions(path, format="tsv")
    assert first == Question(
        "0", "who got the first nobel prize in physics", ("Wilhelm Conrad Röntgen",)
    )
    assert second.answers == ('O"Neil', "D'Arcy")
    with pytest.raises(ValueError, match=r"nq-test.csv:1: .*pass format='tsv'"):
        list(read_questions(path))


def test_questions(tmp_path):
    records = [
        {"id": "a", "question": "q?", "answers": ["x", "y", "x"], "positive": "p1", "field": "f"},
        {"id": 7, "question": "r?", "answers": "[Verse 1", "positive_ids": ["p1", "p2"]},
        {"question": "s?", "answer": "z", "negative_ids": [3], "positive": None},
        {"id": "sq", "question": "t?", "answers": {"text": ["u"], "answer_start": [0]}},
        {"id": "tq", "question": "u?", "answer": {"value": "v", "aliases": ["v", "w"], "type": 1}},
        {"id": "t1", "question": "v?", "answer": {"value": "v", "aliases": "Vee"}},
        {"id": "s1", "question": "w?", "answers": {"text": "Paris"}},
    ]
    a, b, c, d, e, f, g = read_questions(write_text(tmp_path / "q.jsonl", jsonl(records)))
    assert a == Question("a", "q?", ("x", "y"), ("p1",)) and a.meta == {"field": "f"}
    assert a.positive == "p1"
    assert b == Question("7", "r?", ("[Verse 1",), ("p1", "p2"))
    assert c == Question("2", "s?", ("z",), (), ("3",)) and c.positive is None
    assert d.answers == ("u",) and e.answers == ("v", "w")
    assert f.answers == ("v", "Vee") and g.answers == ("Paris",)  # one is a list of one


def test_question_tables(tmp_path):
    path = write_text(
        tmp_path / "q.csv", 'id,question,answers,positive\nx,q?,"[""a"", ""b""]",p1\ny,r?,plain,\n'
    )
    assert list(read_questions(path)) == [
        Question("x", "q?", ("a", "b"), ("p1",)),
        Question("y", "r?", ("plain",)),
    ]


def test_datasets_objects():
    datasets = pytest.importorskip("datasets")
    records = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    dataset = datasets.Dataset.from_list(records)
    assert list(read_passages(dataset)) == PASSAGES
    assert list(read_passages(dataset.to_iterable_dataset())) == PASSAGES
    with pytest.raises(ValueError, match=r"dataset: expected columns \['question'\], got"):
        list(read_questions(dataset))
    with pytest.raises(ValueError, match=r"expected one split, got a dict of splits \['dev'\]"):
        list(read_passages(datasets.DatasetDict(dev=dataset)))
    with pytest.raises(ValueError, match="dataset row 1: expected unique ids, got 'p1' again"):
        list(read_passages(datasets.Dataset.from_list([records[0], records[0]])))


class Rows(list):
    """Rows with the one attribute that tells a data set."""

    column_names = None


@pytest.mark.parametrize("read", [read_passages, read_questions])
def test_a_row_that_is_no_mapping(read):
    for row in (["p1", "text"], None, 5, "text"):
        with pytest.raises(ValueError, match="dataset row 0: expected a record, got"):
            list(read(Rows([row])))


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "1", "text": "a"}\r\n\r\n{"id": "2", "text": "b"}\r\n')
    assert [p.id for p in read_passages(path)] == ["1", "2"]
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text\r\n1,a\r\n")
    assert [p.id for p in read_passages(path)] == ["1"]


def test_reading_is_lazy(tmp_path):
    path = write_text(tmp_path / "p.jsonl", '{"id": "1", "text": "a"}\nnot json\n')
    assert next(iter(read_passages(path))).id == "1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"id": "1", "text": "a"}\n{"id": \n', r"p\.jsonl:2: expected one JSON obj"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1: expected one JSON object, got maximum recursion"),
        ("p.jsonl", b'{"id": "1", "title": "\\udc00", "text": "a"}', r":1: title: .*surrogate"),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl:1: expected a JSON object, got list"),
        ("p.jsonl", b'{"id": "1"}\n', r"p\.jsonl:1: text: expected text, got nothing"),
        ("p.jsonl", b'{"id": "1", "text": 5}\n', r"p\.jsonl:1: text: expected text, got int"),
        ("p.jsonl", b'{"id": "1", "text": " "}\n', r"p\.jsonl:1: text: .*got an empty one"),
        ("p.jsonl", b'{"_id": 1, "text": "a"}\n', r":1: id: .* nothing next to \['_id', 'text'\]"),
        ("p.jsonl", b'{"id": "1", "text": "a", "title": 1}\n', r":1: title: expected text"),
        ("p.jsonl", b'{"id": "1", "text": "\\ud800"}\n', r":1: text: .*half of a surrogate pair"),
        (
            "p.jsonl",
            b'{"id": "1", "text": "a"}\n\n{"id": "1", "text": "b"}\n',
            r"p\.jsonl:3: expected unique ids, got '1' again \(first 1\)",
        ),
        (
            "p.jsonl",
            b'{"id": "1", "text": "a"}\n{"id": "2", "text": "\xe9"}\n',
            r"p\.jsonl:2: expected UTF-8, got byte 0xe9",
        ),
        ("p.csv", b"id,text\n1,a\n2,\xff\n", r"p\.csv:3: expected UTF-8, got byte 0xff"),
        ("p.csv", b"id,text\n1,a\n2,b,c\n", r"p\.csv:3: expected 2 fields, got 3"),
        ("p.csv", b"id,text,text\n1,a,b\n", r"p\.csv:1: expected distinct .*, got 'text' twice$"),
        ("p.csv", b"id,text,, \n1,a,b,c\n", r"p\.csv:1: expected distinct .*, got '' twice$"),
        ("p.csv", b'id,text\n1,"a\n\n"\n2,b,c\n', r"p\.csv:5: expected 2 fields, got 3"),
        ("p.jsonl", b'{"id": "1", "id": "2", "text": "a"}', r"p\.jsonl:1: .* the key 'id' twice$"),
        ("p.jsonl", b'{"id": ' + b"9" * 5000 + b"}", r"p\.jsonl:1: expected one JSON object, got"),
        ("p.csv", b"id,body\n1,a\n", r"p\.csv:1: expected a header with \['id', 'text'\]"),
        ("p.csv", b'id,text\n1,"a"b\n', r"p\.csv:2: expected double-quoted fields"),
        ("p.csv", b'id,text\n1,"a\n', r"p\.csv:2: expected double-quoted fields"),
        ("p.tsv", b"id\ttext\n1\t\n", r"p\.tsv:2: text: expected text, got an empty one"),
        ("p.jsonl.gz", b"not gzip", r"p\.jsonl\.gz:1: expected readable data"),
        ("p.jsonl.xz", b"not xz", r"p\.jsonl\.xz:1: expected readable data"),
        ("p.json", b"{}", r"p\.json: expected a name ending in"),
    ],
)
def test_rejects_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_passages(path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "question: expected text, got nothing"),
        ({"question": ""}, "question: expected text, got an empty one"),
        ({"question": "q", "answers": 5}, "answers: expected a list of texts, got int"),
        ({"question": "q", "answers": [5]}, "answers: expected text, got int"),
        ({"question": "q", "answer": {"a": 1}}, r"answers: .* text or value, got \['a'\]"),
        ({"question": "q", "answer": {"value": "a", "aliases": 5}}, "aliases: expected a list of"),
        ({"question": "q", "answers": "[{[]: 1}]"}, "answers: expected a list such as"),
        ({"question": "q", "answers": "[" + "[" * 1000 + "]"}, "answers: expected a list such as"),
        ({"question": "q", "answers": [""]}, "answers: expected text, got an empty one"),
        ({"question": "q", "answers": "[1, "}, None),
        ({"question": "q", "answers": "[a]"}, "answers: expected a list such as"),
        ({"question": "q", "positive": {}}, "positive: expected an id or a list, got dict"),
        ({"question": "q", "positive": [[]]}, "positive: id: expected text, got list"),
    ],
)
def test_rejects_bad_questions(tmp_path, record, message):
    path = write_text(tmp_path / "q.jsonl", jsonl([record]))
    if message is None:  # only a cell in brackets is read as a list
        assert next(read_questions(path)).answers == ("[1, ",)
        return
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: {message}"):
        list(read_questions(path))


def test_truncated_archives_are_named(tmp_path):
    records = [{"id": str(i), "text": f"text {i * 7919}"} for i in range(5000)]
    for suffix in (".gz", ".xz"):
        path = write_text(tmp_path / f"p.jsonl{suffix}", jsonl(records))
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ValueError, match=rf"p\.jsonl\{suffix}:\d+: expected readable data"):
            list(read_passages(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_foreign_bytes_name_their_line(tmp_path, suffix):
    """Lines before it are read; what follows it, a torn archive say, is not looked at."""
    lines = [b'{"id": "%d", "text": "text %d"}\n' % (i, i * 7919) for i in range(5000)]
    lines[3000] = b'{"id": "3000", "text": "\xe9"}\n'
    path = tmp_path / f"p.jsonl{suffix}"
    with OPENERS.get(path.suffix, open)(path, "wb") as file:
        file.write(b"".join(lines))
    path.write_bytes(path.read_bytes()[:-100])
    passages = read_passages(path)
    assert [next(passages).id for _ in range(3000)] == [str(i) for i in range(3000)]
    with pytest.raises(
        ValueError, match=rf"p\.jsonl{re.escape(suffix)}:3001: expected UTF-8, got byte 0xe9$"
    ):
        next(passages)


def test_unreadable_sources(tmp_path):
    with pytest.raises(ValueError, match="missing.jsonl: no such file or directory$"):
        list(read_passages(tmp_path / "missing.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder.jsonl: is a directory$"):
        list(read_passages(tmp_path / "folder.jsonl"))
    with pytest.raises(ValueError, match=r"^a\\x00b.jsonl: embedded null byte$"):
        list(read_passages("a\0b.jsonl"))
    with pytest.raises(ValueError, match="source: expected a path or a datasets object, got int"):
        list(read_passages(5))
    with pytest.raises(ValueError, match="format= one of .* got 'parquet'"):
        list(read_passages(tmp_path / "x", format="parquet"))


TEXTS = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\ufeff"), min_size=1
).filter(lambda text: text.strip() == text)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXTS, st.just("") | TEXTS), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    expected = [Passage(str(i), title, text) for i, (text, title) in enumerate(rows)]
    records = [{"id": p.id, "title": p.title, "text": p.text} for p in expected]
    assert list(read_passages(write_text(folder / "p.jsonl", jsonl(records)))) == expected
    for name, delimiter in (("p.csv", ","), ("p.tsv", "\t")):
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "title", "text"])
            writer.writerows([p.id, p.title, p.text] for p in expected)
        assert list(read_passages(folder / name)) == expected
