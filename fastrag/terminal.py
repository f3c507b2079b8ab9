"""Text that fits the terminal that it is printed on."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable
from typing import TextIO

LABEL = 13  # columns of the name before a value, where a command prints one value a line
_NARROWEST = 40  # less room would give every word a line of its own
_NO_WIDTH = ("Mn", "Me", "Cf")  # combining marks and marks of direction


def width() -> int:
    """Return the columns of the terminal; 80 where there is none."""
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def columns(text: str) -> int:
    """Return how many columns a text takes.

    Args:
        text: one line.

    Example:
        >>> columns("Paris"), columns("東京"), columns("e\\u0301")
        (5, 4, 1)
    """
    return sum(map(_columns_of, text))


def printable(text: str) -> str:
    """Return a text whose control characters are replaced, so that it cannot steer a terminal.

    Args:
        text: any text; white space stays.

    Example:
        >>> printable("red\\x1b[31m and\\ttab")
        'red\ufffd[31m and\\ttab'
    """
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and not char.isspace() else char
        for char in text
    )


def wrap(pieces: Iterable[str], room: int, separator: str = " ") -> list[str]:
    """Join pieces into lines of at most `room` columns.

    Args:
        pieces: words, or longer parts of a line that are to stay together.
        room: columns of a line; a piece that is wider is cut.
        separator: stands between pieces on one line.

    Returns:
        At least one line.

    Example:
        >>> wrap("what the passage says".split(), 12)
        ['what the', 'passage says']
    """
    lines = [""]
    for piece in pieces:
        joined = f"{lines[-1]}{separator}{piece}" if lines[-1] else piece
        if columns(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        used = 0
        for char in piece:
            used += _columns_of(char)
            if used > room and lines[-1]:
                lines.append("")
                used = _columns_of(char)
            lines[-1] += char
    return lines


def labelled(label: str, text: str, label_columns: int = LABEL) -> str:
    """Return `label  text` over as many lines as it takes, the text in a column of its own.

    Args:
        label: what the text is; shorter than `label_columns`.
        text: any text; each run of white space becomes one space.
        label_columns: where the text begins.

    Example:
        >>> print(labelled("answer", "Marie Curie"))
        answer       Marie Curie
    """
    lines = wrap(printable(text).split(), width() - label_columns)
    first = f"{label:<{label_columns}}{lines[0]}".rstrip()
    return "\n".join([first, *(" " * label_columns + line for line in lines[1:])])


class Flow:
    """Print a text as `labelled` does, but piece by piece, while it is being made.

    Args:
        label: what the text is; shorter than `LABEL` columns.
        file: where it is printed.

    Example:
        >>> import sys
        >>> flow = Flow("answer", sys.stdout)
        >>> flow.write("Marie "), flow.write("Curie\\n"), flow.end()
        answer       Marie Curie
        (None, None, None)
    """

    def __init__(self, label: str, file: TextIO) -> None:
        self.file = file
        self._label = f"{label:<{LABEL}}"  # printed with the first word
        self._used = 0  # columns of text in the line
        self._space = False  # whether a space separates the next word

    def write(self, text: str) -> None:
        """Print a piece; it may end within a word only if the script has no spaces."""
        room = width() - LABEL
        for word in re.findall(r"\s+|\S+", printable(text)):
            if word.isspace():
                self._space = self._used > 0
                continue
            if self._used and self._used + self._space + columns(word) > room:
                self._break()
            elif self._space:
                self._put(" ")
            self._space = False
            for char in word:
                if self._used + _columns_of(char) > room:
                    self._break()
                self._put(char)
        self.file.flush()

    def end(self) -> None:
        """End the line."""
        self.file.write("\n")

    def _put(self, char: str) -> None:
        self.file.write(self._label + char)
        self._label = ""
        self._used += _columns_of(char)

    def _break(self) -> None:
        self.file.write("\n" + " " * LABEL)
        self._used, self._space = 0, False


def _columns_of(char: str) -> int:
    if unicodedata.category(char) in _NO_WIDTH:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
