"""Records of files, tables and data sets, and their fields, with errors that name the place.

A place is `file:line`, the line on which a record begins, or a row of a data set. Messages begin
with it.
"""

from __future__ import annotations

import ast
import csv
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


# ---- fields -----------------------------------------------------------------------------------


def required_text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text that a record must have."""
    if key not in record:
        raise ValueError(
            f"{where}: {key}: expected text, got nothing next to {shown(list(record))}"
        )
    return as_text(record[key], key, where)


def as_text(value: Any, key: str, where: str) -> str:
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


def as_texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    """Return a list of texts, each once; None is an empty list."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = _list_literal(value, key, where)
    if not isinstance(value, Sequence):
        raise ValueError(f"{where}: {key}: expected a list of texts, got {type(value).__name__}")
    return tuple(dict.fromkeys(as_text(item, key, where) for item in value))


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


def check_unique(item: Any, where: str, seen: dict[str, str]) -> Any:
    """Return an item with an `id`; raise ValueError if the id was seen before."""
    if item.id in seen:
        raise ValueError(
            f"{where}: expected unique ids, got {shown(item.id)} again (first {seen[item.id]})"
        )
    seen[item.id] = where.rpartition(":")[2] if ":" in where else where
    return item


# ---- sources ----------------------------------------------------------------------------------


def source_records(
    source: Any, format: str | None, required: Sequence[str]
) -> Iterator[tuple[str, Any]]:
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
        yield from jsonl_records(path)
    else:
        yield from table_records(path, "," if format == "csv" else "\t", required)


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


def text_lines(path: Path) -> Iterator[str]:
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


def jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a file with one JSON object a line."""
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = DECODER.decode(line)
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


DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def table_records(path: Path, delimiter: str, required: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a separated file whose header has the required columns."""
    # The csv module's limit is global, and its default of 128 KiB is too small for passages.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(text_lines(path), delimiter=delimiter, strict=True)
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
            if tuple(required) == ("question",) and len(cells) == 2:
                header = ["question", "answers"]  # DPR's table of questions
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
