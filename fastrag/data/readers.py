"""Readers of passages and questions: JSONL, CSV/TSV, DPR's layouts, Hugging Face `datasets`.

Every reader is a generator, so `PassageStore.build` can read a corpus larger than memory. All
separated files are quoted as in RFC 4180: a field may be enclosed in double quotes, a double quote
inside it is doubled, and a quoted field may contain separators and line breaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrag.data.records import as_text, as_texts, check_unique, required_text, source_records
from fastrag.messages import shown

_PASSAGE_KEYS = ("id", "text")
_QUESTION_KEYS = ("question",)


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """One passage of the corpus.

    Args:
        id: unique in the corpus.
        title: may be empty.
        text: not empty.
    """

    id: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question; answers and passage labels may be absent.

    Args:
        id: unique in its file.
        question: not empty.
        answers: accepted answers; training takes the first or a random one, evaluation the best.
        positive_ids: ids of passages that contain the answer.
        negative_ids: ids of passages that are known not to contain it.
        relevance: grade of each of `positive_ids`, for nDCG; empty: all are 1.
        source_ids: ids of passages that the question was made of, which training can exclude.
        meta: other fields of the record.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    positive_ids: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    relevance: tuple[int, ...] = ()
    source_ids: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def positive(self) -> str | None:
        """The first of `positive_ids`, or `None`."""
        return self.positive_ids[0] if self.positive_ids else None


def read_passages(
    source: Any, format: str | None = None, *, unique: bool = True
) -> Iterator[Passage]:
    """Yield the passages of a file or data set.

    Records have `id` and `text`, and may have `title`. A separated file has a header row with these
    names, as DPR's `psgs_w100.tsv` (`id`, `text`, `title`) does.

    Args:
        source: a path (`.jsonl`, `.csv`, `.tsv`, each also with `.gz` or `.xz`), or a Hugging Face
            `datasets` object (anything with `column_names` that yields rows).
        format: `"jsonl"`, `"csv"` or `"tsv"`; `None`: as the file's name says.
        unique: reject an id that occurs twice, which takes memory for all ids. False: leave that to
            `PassageStore.build`.

    Yields:
        Passages in file order.

    Raises:
        ValueError: unreadable path, unknown format, malformed line, missing, wrong or repeated key
            or column, empty text, duplicate id, bytes that are not UTF-8. The message begins with
            `file:line:`, the line on which the record begins.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"id": "p1", "title": "France", "text": "Its capital is Paris."}')
        ...     file.flush()
        ...     next(read_passages(file.name)).text
        'Its capital is Paris.'
    """
    seen: dict[str, str] = {}
    for where, record in source_records(source, format, _PASSAGE_KEYS):
        passage = _passage(record, where)
        yield check_unique(passage, where, seen) if unique else passage


def read_questions(source: Any, format: str | None = None) -> Iterator[Question]:
    """Yield the questions of a file or data set.

    Records have `question`, and may have `id` (default: the number of the record, from 0),
    `answers` (a list or one text; `answer` is accepted too), `positive` or `positive_ids`,
    `negative` or `negative_ids`, `source_id` or `source_ids` (one id or a list). SQuAD's
    `{"answers": {"text": [...]}}` and TriviaQA's `{"answer": {"value": "a", "aliases": [...]}}` are
    read as well. A separated file has these names in its header; a file of two columns without a
    header has DPR's columns `question` and `['answer', ...]`.

    Args:
        source: as `read_passages`.
        format: as `read_passages`.

    Yields:
        Questions in file order.

    Raises:
        ValueError: as `read_passages`.
    """
    seen: dict[str, str] = {}
    for row, (where, record) in enumerate(source_records(source, format, _QUESTION_KEYS)):
        yield check_unique(to_question(record, where, default_id=str(row)), where, seen)


def to_question(record: Any, where: str = "question", default_id: str = "") -> Question:
    """Make a `Question` from a record and check it.

    Args:
        record: a `Question` (returned as it is) or a mapping with the keys of `read_questions`.
        where: place of the record, with which error messages begin.
        default_id: the id of a record without one.

    Raises:
        ValueError: missing key, wrong type or empty question.
    """
    if isinstance(record, Question):
        if not record.question.strip():
            raise ValueError(
                f"{where}: expected a question, got an empty text (id {shown(record.id)})"
            )
        return record
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a record, got {type(record).__name__}")
    rest = dict(record)
    question = required_text(record, "question", where)
    del rest["question"]
    identity = as_text(rest.pop("id", default_id or question), "id", where)
    answers = rest.pop("answers", None)
    single = rest.pop("answer", None)
    if answers is None:
        answers = single
    if isinstance(answers, Mapping):
        answers = _answers_of(answers, where)
    return Question(
        id=identity,
        question=question,
        answers=as_texts(answers, "answers", where),
        positive_ids=_ids(rest, ("positive", "positive_ids"), where),
        negative_ids=_ids(rest, ("negative", "negative_ids"), where),
        source_ids=_ids(rest, ("source_id", "source_ids"), where),
        meta=rest,
    )


def _passage(record: Any, where: str) -> Passage:
    if isinstance(record, Passage):
        return record
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a record, got {type(record).__name__}")
    title = record.get("title")
    if isinstance(title, str) and not title.strip():
        title = None
    return Passage(
        id=required_text(record, "id", where),
        title="" if title is None else as_text(title, "title", where),
        text=required_text(record, "text", where),
    )


def _answers_of(record: Mapping[str, Any], where: str) -> Any:
    """Return the answers of SQuAD, or those of TriviaQA with their aliases."""
    if "text" in record:
        return record["text"]
    if "value" in record:
        aliases = record.get("aliases")
        more = (aliases,) if isinstance(aliases, str) else as_texts(aliases, "aliases", where)
        return [record["value"], *more]
    raise ValueError(f"{where}: answers: expected the key text or value, got {shown(list(record))}")


def _ids(record: dict[str, Any], keys: tuple[str, str], where: str) -> tuple[str, ...]:
    key = keys[0]
    single, several = (record.pop(each, None) for each in keys)
    value = several if single is None else single
    if value is None or value == "":
        return ()
    if isinstance(value, str | int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, Sequence):
        raise ValueError(f"{where}: {key}: expected an id or a list, got {type(value).__name__}")
    return tuple(as_text(item, "id", f"{where}: {key}") for item in value)
