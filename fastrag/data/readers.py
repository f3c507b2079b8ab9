"""Readers of passages and questions: JSONL, CSV/TSV, DPR's layouts, Hugging Face `datasets`.

Every reader is a generator, so `PassageStore.build` can read a corpus larger than memory. All
separated files are quoted as in RFC 4180: a field may be enclosed in double quotes, a double quote
inside it is doubled, and a quoted field may contain separators and line breaks.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import gzip
import json
import lzma
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fastrag.messages import clipped, reason, refusal, shown

FORMATS = ("jsonl", "csv", "tsv")
_SUFFIX_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
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
        meta: other fields of the record.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    positive_ids: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    relevance: tuple[int, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def positive(self) -> str | None:
        """The first of `positive_ids`, or `None`."""
        return self.positive_ids[0] if self.positive_ids else None


def read_passages(source: Any, format: str | None = None) -> Iterator[Passage]:
    """Yield the passages of a file or data set.

    Records have `id` and `text`, and may have `title`. A separated file has a header row with these
    names, as DPR's `psgs_w100.tsv` (`id`, `text`, `title`) does.

    Args:
        source: a path (`.jsonl`, `.csv`, `.tsv`, each also with `.gz` or `.xz`), or a Hugging Face
            `datasets` object (anything with `column_names` that yields rows).
        format: `"jsonl"`, `"csv"` or `"tsv"`; `None`: as the file's name says.

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
    for where, record in _records(source, format, _PASSAGE_KEYS):
        yield _unique(_passage(record, where), where, seen)


def read_questions(source: Any, format: str | None = None) -> Iterator[Question]:
    """Yield the questions of a file or data set.

    Records have `question`, and may have `id` (default: the number of the record, from 0),
    `answers` (a list or one text; `answer` is accepted too), `positive` or `positive_ids`,
    `negative` or `negative_ids` (one id or a list). SQuAD's `{"answers": {"text": [...]}}` and
    TriviaQA's `{"answer": {"value": "a", "aliases": [...]}}` are read as well. A separated file has
    these names in its header; a file of two columns without a header has DPR's columns `question`
    and `['answer', ...]`.

    Args:
        source: as `read_passages`.
        format: as `read_passages`.

    Yields:
        Questions in file order.

    Raises:
        ValueError: as `read_passages`.
    """
    seen: dict[str, str] = {}
    for row, (where, record) in enumerate(_records(source, format, _QUESTION_KEYS)):
        yield _unique(to_question(record, where, default_id=str(row)), where, seen)


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
    question = _required(record, "question", where)
    del rest["question"]
    identity = _text(rest.pop("id", default_id or question), "id", where)
    answers = rest.pop("answers", None)
    single = rest.pop("answer", None)
    if answers is None:
        answers = single
    if isinstance(answers, Mapping):
        answers = _answers_of(answers, where)
    return Question(
        id=identity,
        question=question,
        answers=_texts(answers, "answers", where),
        positive_ids=_ids(rest, "positive", where),
        negative_ids=_ids(rest, "negative", where),
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
        id=_required(record, "id", where),
        title="" if title is None else _text(title, "title", where),
        text=_required(record, "text", where),
    )


def _unique(item: Any, where: str, seen: dict[str, str]) -> Any:
    if item.id in seen:
        raise ValueError(
            f"{where}: expected unique ids, got {shown(item.id)} again (first {seen[item.id]})"
        )
    seen[item.id] = where.rpartition(":")[2] if ":" in where else where
    return item


def _answers_of(record: Mapping[str, Any], where: str) -> Any:
    """Return the answers of SQuAD, or those of TriviaQA with their aliases."""
    if "text" in record:
        return record["text"]
    if "value" in record:
        aliases = record.get("aliases")
        more = (aliases,) if isinstance(aliases, str) else _texts(aliases, "aliases", where)
        return [record["value"], *more]
    raise ValueError(f"{where}: answers: expected the key text or value, got {shown(list(record))}")


def _required(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(
            f"{where}: {key}: expected text, got nothing next to {shown(list(record))}"
        )
    return _text(record[key], key, where)


def _text(value: Any, key: str, where: str) -> str:
    """Return a required text; an id may be an integer in a JSON file."""
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # Python limits the number of digits
            raise ValueError(f"{where}: {key}: expected text, got {shown(value)}") from None
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where}: {key}: expected text, got {got}")
    if not value.strip():
        raise ValueError(f"{where}: {key}: expected text, got an empty one")
    if _lone_surrogate(value) is not None:
        raise ValueError(f"{where}: {key}: expected text, got half of a surrogate pair")
    return value


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = _list_literal(value, key, where)
    if not isinstance(value, Sequence):
        raise ValueError(f"{where}: {key}: expected a list of texts, got {type(value).__name__}")
    return tuple(dict.fromkeys(_text(item, key, where) for item in value))


def _ids(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    single, several = record.pop(key, None), record.pop(f"{key}_ids", None)
    value = several if single is None else single
    if value is None or value == "":
        return ()
    if isinstance(value, str | int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, Sequence):
        raise ValueError(f"{where}: {key}: expected an id or a list, got {type(value).__name__}")
    return tuple(_text(item, "id", f"{where}: {key}") for item in value)


def _list_literal(value: str, key: str, where: str) -> list[Any]:
    """Return the texts in a cell: a list `["a", "b"]` (JSON, or Python as in DPR), or one text."""
    if not value.strip():
        return []
    if not (value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return [value]
    for parse in (json.loads, _python_literal):
        try:
            parsed = parse(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # a cell may be nested too deeply, and a key of a dict may be a list
        if isinstance(parsed, list):
            return parsed
    raise ValueError(f"{where}: {key}: expected a list such as ['a', 'b'], got {shown(value)}")


def _python_literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an answer may contain an invalid escape sequence
        return ast.literal_eval(text)


def _records(source: Any, format: str | None, required: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each record of any source with its place."""
    if hasattr(source, "column_names"):
        yield from _dataset_records(source, required)
        return
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"source: expected a path or a datasets object, got {type(source).__name__}"
        )
    path = Path(source)
    if format is None:
        stem = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
        format = _SUFFIX_FORMATS.get(stem.suffix.lower())
    if format not in FORMATS:
        got = shown(path.name if format is None else format)
        raise ValueError(
            f"{clipped(path)}: expected a name ending in {sorted(_SUFFIX_FORMATS)} (and .gz or "
            f".xz), or format= one of {list(FORMATS)}, got {got}"
        )
    if format == "jsonl":
        yield from _jsonl_records(path)
    else:
        yield from _table_records(path, "," if format == "csv" else "\t", required)


def _dataset_records(dataset: Any, required: Sequence[str]) -> Iterator[tuple[str, Any]]:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise ValueError(
            f"dataset: expected one split, got a dict of splits {shown(list(columns))}"
        )
    if columns is not None and not set(required) <= set(columns):
        raise ValueError(f"dataset: expected columns {list(required)}, got {shown(list(columns))}")
    for row, record in enumerate(dataset):
        yield f"dataset row {row}", record


def _open(path: Path) -> TextIO:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    # utf-8-sig: a byte order mark, which spreadsheets write, is not part of the first key.
    # surrogateescape: the decoder reads ahead, so its own error could not name the line.
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    try:
        return openers.get(path.suffix, open)(path, "rt", **how)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(refusal(error, path)) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield lines; a ValueError for damaged data or bytes that are not UTF-8 names the line."""
    number = 1
    with _open(path) as file:
        try:
            for line in file:
                if (escaped := _lone_surrogate(line)) is not None:
                    byte = f"0x{ord(escaped) & 0xFF:02x}"
                    raise ValueError(f"{path}:{number}: expected UTF-8, got byte {byte}")
                yield line
                number += 1
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"{path}:{number}: expected readable data, got {reason(error)}"
            ) from error


def _lone_surrogate(text: str) -> str | None:
    """Return the first half of a surrogate pair in a text, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected one JSON object, got {reason(error)}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError for a repeated key, which json accepts."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the key {shown(_repeated([key for key, _ in pairs]))} twice")
    return record


def _repeated(names: Sequence[str]) -> str | None:
    """Return the first name that occurs twice in a list."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _table_records(
    path: Path, delimiter: str, required: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    # The csv module's limit is global, and its default of 128 KiB is too small for passages.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for line, cells in _csv_rows(reader, path):
        where = f"{path}:{line}"
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if set(required) <= set(header):
                if (name := _repeated(header)) is not None:
                    raise ValueError(f"{where}: expected distinct columns, got {shown(name)} twice")
                continue
            if list(required) == list(_QUESTION_KEYS) and len(cells) == 2:
                header = ["question", "answers"]
            else:
                hint = "; tab-separated? pass format='tsv'" if "\t" in header[0] else ""
                raise ValueError(
                    f"{where}: expected a header with {list(required)}, got {shown(header)}{hint}"
                )
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} fields, got {len(cells)}")
        yield where, dict(zip(header, cells, strict=True))


def _csv_rows(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line on which it begins."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: expected double-quoted fields, got {reason(error)}"
            ) from error
        yield line, cells
