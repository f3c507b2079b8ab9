"""Text of error messages: a user's value, a name, or what the system said, short and on one line.

A value in a message can be a whole file, or nested so that it is small in memory and endless in
print. `shown` writes pieces until it has enough and never visits the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import Any

LIMIT = 200
# Digits of an integer that are written out: Python refuses to print much longer ones.
_DIGITS = 50
_BRACKETS = {tuple: "()", list: "[]", set: "{}", frozenset: "{}"}


def shown(value: object) -> str:
    """Return the `repr` of a value, cut at `LIMIT` characters.

    Args:
        value: any object; a tensor or an array is described by shape and dtype.

    Returns:
        One line.

    Example:
        >>> shown({"ks": [1, 5]})
        "{'ks': [1, 5]}"
        >>> len(shown(["x" * 10**6] * 1000))
        200
        >>> shown(-(10**400))
        'a negative integer of about 401 digits'
    """
    return _cut(_pieces(value))


def clipped(text: object, limit: int = LIMIT) -> str:
    """Return a text for a message without quotes: on one line, printable, and cut.

    Args:
        text: a name, a path, or an error whose message another library wrote.
        limit: characters at which it is cut.

    Returns:
        One line.

    Example:
        >>> clipped("one\\n two")
        'one two'
    """
    line = " ".join(str(text)[: 4 * limit].split())
    return _cut((each if each.isprintable() else repr(each)[1:-1] for each in line), limit)


def reason(error: BaseException) -> str:
    """Return what an error says, without the number that the system gives its own.

    Args:
        error: what was raised; nothing but its type is known of some, such as a `MemoryError`.

    Returns:
        One line, cut at `LIMIT` characters.

    Example:
        >>> reason(FileNotFoundError(2, "No such file or directory", "a.yaml"))
        'no such file or directory'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + clipped(error.strerror)[1:]
    return clipped(error) or type(error).__name__


def refusal(error: Exception, path: object = None) -> str:
    """Return what the system refused, in the form `path: no such file or directory`.

    Args:
        error: what was raised.
        path: the path to name; None takes the error's own.

    Returns:
        One line.

    Example:
        >>> refusal(FileNotFoundError(2, "No such file or directory", "a.yaml"))
        'a.yaml: no such file or directory'
    """
    path = getattr(error, "filename", None) if path is None else path
    return reason(error) if path is None else f"{clipped(path)}: {reason(error)}"


def _cut(pieces: Iterator[str], limit: int = LIMIT) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > limit:
            return text[: limit - 3] + "..."
    return text


def _pieces(value: Any) -> Iterator[str]:
    """Yield the repr of a value; each level and item adds characters, so that a cut ends it."""
    if isinstance(value, str | bytes):
        yield repr(value[:LIMIT])
    elif isinstance(value, int) and abs(value) >= 10**_DIGITS:
        digits = int(value.bit_length() * math.log10(2)) + 1
        yield f"{'a negative' if value < 0 else 'an'} integer of about {digits} digits"
    elif isinstance(value, Mapping):
        yield "{"
        for i, key in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(value[key])
        yield "}"
    elif isinstance(value, list | tuple | Set):
        kind = next((kind for kind in _BRACKETS if isinstance(value, kind)), set)
        yield _BRACKETS[kind][0]
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(item)
        yield ("," if kind is tuple and len(value) == 1 else "") + _BRACKETS[kind][1]
    elif _is_array(value):
        yield f"{type(value).__name__} {list(value.shape)} {str(value.dtype).rpartition('.')[2]}"
    else:
        yield _repr(value)


def _repr(value: object) -> str:
    try:
        return " ".join(repr(value).split())
    except Exception:  # a class of the user's, in the middle of an error message
        return f"<{type(value).__name__}>"


def _is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor; printing one may wait for a GPU."""
    try:
        shape = getattr(value, "shape", None)
    except RuntimeError:  # a nested tensor has no shape
        return False
    if not isinstance(shape, tuple) or not hasattr(value, "dtype"):
        return False
    return bool(shape) or hasattr(value, "requires_grad")  # numpy's scalars print as numbers
