"""Corpora and questions of any content: records, or one line that names the file and the line."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.data import Passage, Question, read_passages, read_questions
from fastrag.data.benchmarks import PASSAGES, QUESTIONS, read_benchmark, read_benchmark_passages
from tests.fuzz.effort import effort

READERS: list[Callable[..., Any]] = [read_passages, read_questions]
KEYS = ["id", "text", "title", "question", "answers", "answer", "positive", "negative_ids", "value"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**20, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["['a']", "[", "[{[]: 1}]", "[1e999]", "\ud800", "[-'a']", "x" * 10**4])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "aliases"]), inner, max_size=3)
    ),
    max_leaves=5,
)
RECORDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
PIECES = [
    *(
        b'"',
        b'""',
        b",",
        b"\t",
        b"\n",
        b"\r\n",
        b"\r",
        b"id",
        b"text",
        b"question",
        b"answers",
        b"a",
    ),
    *(b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b" ", b"[", b"{", b"}", b":"),
    *(b"id,text\n", b"id\ttext\n", b"1,a\n", b'{"id": "1", "text": "a"}\n', b"9" * 5000, b"1e400"),
    *(b'{"id": "2", "id": "3"}\n', b"[" * 2000, b'{"question": "q", "answers": "[1"}\n', b"NaN"),
]
BYTES = st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join) | st.binary(max_size=60)
NAMES = ["f.jsonl", "f.csv", "f.tsv", "f.jsonl.gz", "f.csv.xz"]


def read_all(read: Callable[..., Any], source: Any, where: str) -> None:
    """Read to the end; an error is a ValueError that begins with a place in the source."""
    try:
        for item in read(source):
            assert isinstance(item, Passage | Question)
            assert item.id.strip() and item.id.encode()
    except ValueError as error:
        message = str(error)
        assert re.match(where, message), message
        assert "\n" not in message and len(message) < 800, message


@pytest.mark.parametrize("examples", effort(quick=150, slow=1500))
def test_any_bytes(examples: int, tmp_path: Path) -> None:
    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(BYTES, st.sampled_from(NAMES), st.integers(0, 3), st.integers(0, 40))
    def check(data: bytes, name: str, damage: int, place: int) -> None:
        if name.endswith(".gz"):
            data = gzip.compress(data)
        elif name.endswith(".xz"):
            data = lzma.compress(data)
        if damage == 1:
            data = data[: -1 - place]
        elif damage == 2 and data:
            data = data[: place % len(data)] + b"\x7f" + data[place % len(data) + 1 :]
        path = tmp_path / name
        path.write_bytes(data)
        for read in READERS:
            read_all(read, path, re.escape(str(path)) + r":\d+: ")

    check()


@pytest.mark.parametrize("examples", effort(quick=150, slow=1500))
def test_any_records(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"

    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(st.lists(RECORDS | VALUES, max_size=4))
    def check(records: list[Any]) -> None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        dataset = Rows(records)
        for read in READERS:
            read_all(read, path, re.escape(str(path)) + r":\d+: ")
            read_all(read, dataset, r"dataset row \d+: ")

    check()


FORM_KEYS = [
    *("_id", "id", "question", "Question", "answer", "Answer", "answers", "context", "title"),
    *("supporting_facts", "paragraphs", "paragraph_text", "is_supporting", "answer_aliases"),
    *("input", "output", "provenance", "wikipedia_id", "wikipedia_title", "start_paragraph_id"),
    *("end_paragraph_id", "positive_ctxs", "negative_ctxs", "text", "possible_answers", "Value"),
    *("QuestionId", "Aliases", "sentences", "ctxs"),
]
FORM_VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FORM_KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES_OF_ALL = dict.fromkeys(("_id", "id", "question", "Question", "QuestionId", "input"), "a")
FORM_RECORDS = st.dictionaries(st.sampled_from(FORM_KEYS), FORM_VALUES, max_size=6).flatmap(
    lambda record: st.sampled_from([record, NAMES_OF_ALL | record, record | NAMES_OF_ALL])
)


@pytest.mark.parametrize("examples", effort(quick=60, slow=1000))
def test_any_records_of_published_forms(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    forms = [(read_benchmark, form) for form in QUESTIONS if form != "beir"]
    forms += [(read_benchmark_passages, form) for form in PASSAGES if form != "beir"]

    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(st.lists(FORM_RECORDS, max_size=3), st.booleans())
    def check(records: list[Any], listed: bool) -> None:
        texts = [json.dumps(record) for record in records]
        path.write_text(f"[{','.join(texts)}]" if listed else "".join(f"{t}\n" for t in texts))
        for read, form in forms:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_all(functools.partial(read, form), path, re.escape(str(path)) + r":\d+")

    check()


class Rows(list[Any]):
    """Rows with the one attribute that tells a data set."""

    column_names = None
