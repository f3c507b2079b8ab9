"""Readers of passages and questions: JSONL, CSV/TSV, DPR's layouts, Hugging Face `datasets`.

Every reader is a generator, so that a corpus larger than memory can flow into `PassageStore.build`.
One quoting rule for all separated files, RFC 4180: a field may stand in double quotes, a double
quote inside is doubled, and a quoted field may hold separators and line breaks.
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
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

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
        positive_ids: ids of passages that hold the answer.
        negative_ids: ids of passages that are known not to.
        meta: whatever else the record carried.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    positive_ids: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def positive(self) -> str | None:
        """The first of `positive_ids`, or `None`."""
        return self.positive_ids[0] if self.positive_ids else None


def read_passages(source: Any, format: str | None = None) -> Iterator[Passage]:
    """Reads passages.

    Records have `id` and `text`, and may have `title`. A separated file has a header row with these
    names, as DPR's `psgs_w100.tsv` (`id`, `text`, `title`) does.

    Args:
        source: a path (`.jsonl`, `.csv`, `.tsv`, each also with `.gz` or `.xz`), or a Hugging Face
            `datasets` object (anything with `column_names` that yields rows).
        format: `"jsonl"`, `"csv"` or `"tsv"`; `None` goes by the file's name.

    Yields:
        Passages in file order.

    Raises:
        ValueError: unreadable path, unknown format, malformed line, missing or wrong key, empty
            text, duplicate id, bytes that are not UTF-8. The message begins `file:line:`.

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
    """Reads questions.

    Records have `question`, and may have `id` (otherwise the row number), `answers` (a list or one
    text; `answer` is accepted too), `positive` or `positive_ids`, `negative` or `negative_ids` (one
    id or a list). SQuAD's `{"answers": {"text": [...]}}` and TriviaQA's `{"answer": {"value": "a",
    "aliases": [...]}}` are read as well. A separated file has
    these names in its header; one without a header and with two columns is DPR's `question`,
    `['answer', ...]`.

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
    """Checks one record and makes a `Question` of it.

    Args:
        record: a `Question` (returned as it is) or a mapping with the keys of `read_questions`.
        where: what an error message begins with.
        default_id: the id of a record without one.

    Raises:
        ValueError: missing key, wrong type or empty question.
    """
    if isinstance(record, Question):
        if not record.question.strip():
            raise ValueError(f"{where}: expected a question, got an empty text (id {record.id!r})")
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
            f"{where}: expected unique ids, got {item.id!r} again (first {seen[item.id]})"
        )
    seen[item.id] = where.rpartition(":")[2] if ":" in where else where
    return item


def _answers_of(record: Mapping[str, Any], where: str) -> Any:
    """The answers of SQuAD, or of TriviaQA, whose aliases are accepted as well."""
    if "text" in record:
        return record["text"]
    if "value" in record:
        return [record["value"], *(record.get("aliases") or ())]
    raise ValueError(f"{where}: answers: expected the key text or value, got {list(record)[:8]}")


def _required(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(f"{where}: {key}: expected text, got nothing beside {list(record)[:8]}")
    return _text(record[key], key, where)


def _text(value: Any, key: str, where: str) -> str:
    """A required text; ids that a JSON file holds as integers are read as text."""
    if key == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{where}: {key}: expected text, got {got}")
    if not value.strip():
        raise ValueError(f"{where}: {key}: expected text, got an empty one")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
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
    """A cell of a table: `["a", "b"]` (JSON or Python, as DPR writes it) or one plain text."""
    if not value.strip():
        return []
    if not (value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return [value]
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(parsed, list):
            return parsed
    raise ValueError(f"{where}: {key}: expected a list such as ['a', 'b'], got {value[:80]!r}")


def _records(source: Any, format: str | None, required: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields (where, record) from any source."""
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
        raise ValueError(
            f"{path}: expected a name ending in {sorted(_SUFFIX_FORMATS)} (and .gz or .xz), or "
            f"format= one of {list(FORMATS)}, got {format or path.name!r}"
        )
    if format == "jsonl":
        yield from _jsonl_records(path)
    else:
        yield from _table_records(path, "," if format == "csv" else "\t", required)


def _dataset_records(dataset: Any, required: Sequence[str]) -> Iterator[tuple[str, Any]]:
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        raise ValueError(f"dataset: expected one split, got a dict of splits {sorted(columns)}")
    if columns is not None and not set(required) <= set(columns):
        raise ValueError(f"dataset: expected columns {list(required)}, got {list(columns)}")
    for row, record in enumerate(dataset):
        yield f"dataset row {row}", record


def _opener(path: Path) -> Callable[..., Any]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)


def _open(path: Path) -> TextIO:
    try:
        # utf-8-sig: a byte order mark, as spreadsheets write it, is not part of the first key.
        return _opener(path)(path, "rt", encoding="utf-8-sig", newline="")
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Yields lines; damage and foreign bytes become a ValueError that names the line."""
    number = 0
    with _open(path) as file:
        try:
            for line in file:
                number += 1
                yield line
        except UnicodeDecodeError as error:
            # The decoder reads ahead of the line, so the place is found by reading again.
            raise ValueError(_foreign_bytes(path, error)) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: expected readable data, got {error}") from error


def _foreign_bytes(path: Path, error: UnicodeDecodeError) -> str:
    with _opener(path)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                byte = line[found.start]
                return f"{path}:{number}: expected UTF-8, got byte 0x{byte:02x} ({found.reason})"
    return f"{path}: expected UTF-8, got {error}"


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected one JSON object, got {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def _table_records(
    path: Path, delimiter: str, required: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    # The limit is the csv module's own and global; passages are longer than its 128 KiB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for row, cells in enumerate(_csv_rows(reader, path), 1):
        where = f"{path}:{row}"
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if set(required) <= set(header):
                continue
            if list(required) == list(_QUESTION_KEYS) and len(cells) == 2:
                header = ["question", "answers"]
            else:
                hint = "; tab-separated? pass format='tsv'" if "\t" in header[0] else ""
                raise ValueError(
                    f"{where}: expected a header with {list(required)}, got {header[:8]}{hint}"
                )
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} fields, got {len(cells)}")
        yield where, dict(zip(header, cells, strict=True))


def _csv_rows(reader: Iterable[list[str]], path: Path) -> Iterator[list[str]]:
    row = 0
    rows = iter(reader)
    while True:
        row += 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{row}: expected double-quoted fields, got {error}") from error
        yield cells
