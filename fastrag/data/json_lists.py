"""Records of a JSON file that is one long list, each with the line on which it begins.

The file is decoded record by record, so a list of some gigabytes is never in memory as a whole,
unless it is one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrag.data.records import DECODER, jsonl_records, text_lines
from fastrag.messages import reason, shown

_CHUNK = 2**16  # characters that are read at once; more while a record goes on
_SPACE = " \t\r\n"


def json_records(path: Path, root: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the records of a JSON file with their places.

    Args:
        path: a file that holds a list of records, one record a line, or with `root` an object.
        root: key of the list in a file that holds one object.

    Raises:
        ValueError: the file cannot be read, is no JSON, or has no list. The message begins with
            `file:line`.
    """
    text = _Text(path)
    if text.peek() == "{":
        if root is None:
            yield from jsonl_records(path)
            return
        text.seek_list(root)
    text.take("[")
    n = 0
    while text.peek() != "]":
        if n:
            text.take(",")
            text.peek()
        where = f"{path}:{text.line} (record {n})"
        yield where, text.value()
        n += 1
    text.take("]")


class _Text:
    """A JSON text that is read in pieces of whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 1  # of the next character
        self.lines = text_lines(path)
        self.text = ""
        self._at = 0

    def peek(self) -> str:
        """Skip white space and return the next character, or an empty text at the end."""
        while True:
            end = self._at
            while end < len(self.text) and self.text[end] in _SPACE:
                end += 1
            self._move(end)
            if end < len(self.text):
                return self.text[end]
            if not self._read(_CHUNK):
                return ""

    def take(self, expected: str) -> None:
        """Skip the character that has to come next."""
        if (found := self.peek()) != expected:
            got = shown(found) if found else "the end of the file"
            raise self._error(f"expected {expected!r}, got {got}")
        self._move(self._at + 1)

    def value(self) -> Any:
        """Decode the value that comes next."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and self._read(size):
                    size *= 2  # so that a long record is not decoded from its start too often
                    continue
                raise self._error(f"expected JSON, got {reason(error)}") from error
            self._move(end)
            return value

    def seek_list(self, root: str) -> None:
        """Skip the fields of an object up to the list that one of them holds."""
        self.take("{")
        while self.peek() != "}":
            if self.value() == root:
                self.take(":")
                return
            self.take(":")
            self.value()
            if self.peek() != "}":
                self.take(",")
        raise self._error(f"expected the key {root!r} with a list, got an object without it")

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self._at, end)
        self._at = end

    def _read(self, size: int) -> bool:
        """Append some lines; return whether there were any."""
        pieces, n = [self.text[self._at :]], 0
        for line in self.lines:
            pieces.append(line)
            n += len(line)
            if n >= size:
                break
        self.text, self._at = "".join(pieces), 0
        return n > 0

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}:{self.line}: {message}")
