"""Manifests: small JSON files that say what a folder holds, read against a description.

    SETTINGS = record({"dim": integer(1), "dtype": one_of("float32", "int8")}, {"note": text()})
    settings = read(folder / "settings.json", SETTINGS)

A description is a function of a value and its place in the file, which raises for a value that does
not fit. Whatever a file holds, reading it returns a value that fits or raises a ValueError with the
path, the place, what was expected and what was found. A sealed manifest carries its own SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastrag.messages import clipped, shown

Check = Callable[[Any, str], None]

SEAL = "manifest_sha256"
# The checksums of 16 MiB blocks of 60 TB of vectors fit; a file of another kind is not read whole.
_MAX_BYTES = 1 << 26
_MAX_INTEGER = (1 << 63) - 1
# Bytes of a file's name on the file systems in use.
_MAX_NAME = 255
# Far below the interpreter's limit, so that nothing that walks a manifest reaches it.
_MAX_DEPTH = 50
_TOO_DEEP = f"expected at most {_MAX_DEPTH} lists and objects in each other, got more"


def read(path: Path, check: Check) -> Any:
    """Read a JSON file that fits a description.

    Args:
        path: the file.
        check: the description.

    Returns:
        The value.

    Raises:
        ValueError: the file cannot be read or is not JSON in UTF-8 (a key twice, NaN and infinity
            are not), or its value does not fit.
    """
    value = load(path)
    verify(path, value, check)
    return value


def load(path: Path) -> Any:
    """Read a JSON file without a description.

    Args:
        path: the file.

    Raises:
        ValueError: as `read`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, got more")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair
        _check_depth(value)
    except OSError as error:
        reason = clipped(error.strerror or error)
        raise ValueError(f"{path}: expected a JSON file, got {reason}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON, got {error.msg}") from None
    except UnicodeError as error:
        raise ValueError(f"{path}: expected JSON in UTF-8, got {clipped(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: {_TOO_DEEP}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return value


def verify(path: Path, value: Any, check: Check) -> None:
    """Raise unless a value fits a description.

    Args:
        path: the file that the value was read from.
        value: the value.
        check: the description.

    Raises:
        ValueError: it does not; with the path and the place in the file.
    """
    with named(path):
        check(value, "")


@contextlib.contextmanager
def named(path: object) -> Iterator[None]:
    """Put the path of a file before the message of a ValueError about what was read from it.

    Args:
        path: the file, or the folder.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with its own SHA-256.

    Args:
        body: JSON-able.
    """
    return {**body, SEAL: _sha256(body)}


def unsealed(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without its SHA-256.

    Args:
        path: its file.
        manifest: what `sealed` gave.

    Raises:
        ValueError: the SHA-256 is not that of the manifest.
    """
    body = {key: value for key, value in manifest.items() if key != SEAL}
    if manifest.get(SEAL) != _sha256(body):
        raise ValueError(
            f"{path}: expected SHA-256 {shown(manifest.get(SEAL))} as it states, got "
            f"{_sha256(body)}: the manifest was altered"
        )
    return body


def write(path: Path, value: Any) -> None:
    """Write a JSON file.

    Args:
        path: the file.
        value: JSON-able.
    """
    described = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_bytes(described.encode("utf-8"))  # no newline: a file cut anywhere is not JSON


# ---- descriptions ------------------------------------------------------------------------------


def integer(low: int = 0, high: int = _MAX_INTEGER) -> Check:
    """Describe a whole number; a bool is none."""
    expected = f"a whole number of at least {low}"
    if high < _MAX_INTEGER:
        expected = f"a whole number of {low} to {high}" if low < high else str(low)
    return _plain(expected, lambda value: type(value) is int and low <= value <= high)


def number(low: float = -math.inf, *, above: float = -math.inf) -> Check:
    """Describe a number of at least `low` and more than `above`."""
    bounds = [f"of at least {low}"] if low > -math.inf else []
    bounds += [f"above {above}"] if above > -math.inf else []
    return _plain(
        " ".join(["a finite number", *bounds]),
        lambda value: type(value) in (int, float) and value >= low and value > above,
    )


def flag() -> Check:
    """Describe true or false."""
    return _plain("true or false", lambda value: type(value) is bool)


def text(pattern: str = "", called: str = "text") -> Check:
    """Describe a text; with a pattern, one that the pattern matches whole."""
    matches = re.compile(pattern or ".*", re.DOTALL).fullmatch
    return _plain(called, lambda value: isinstance(value, str) and matches(value) is not None)


def relative_path() -> Check:
    """Describe a path within the manifest's folder, its parts joined by slashes."""

    def accepts(value: Any) -> bool:
        parts = value.split("/") if isinstance(value, str) else [""]
        return not {"", ".", ".."} & set(parts) and all(
            "\0" not in part and len(part.encode("utf-8")) <= _MAX_NAME for part in parts
        )

    return _plain("a relative path", accepts)


def sha256() -> Check:
    """Describe a SHA-256."""
    return text("[0-9a-f]{64}", "64 hexadecimal digits")


def one_of(*choices: str) -> Check:
    """Describe one of several texts."""
    expected = f"one of {', '.join(choices)}"
    return _plain(expected, lambda value: isinstance(value, str) and value in choices)


def optional(check: Check) -> Check:
    """Describe null or what `check` describes."""
    return lambda value, place: None if value is None else check(value, place)


def items(check: Check) -> Check:
    """Describe a list of values that each fit."""

    def checked(value: Any, place: str) -> None:
        if not isinstance(value, list):
            _refuse(place, "a list", value)
        for i, each in enumerate(value):
            check(each, f"{place}[{i}]")

    return checked


def table(check: Check, name: Check | None = None) -> Check:
    """Describe an object with any keys, or keys that fit `name`, whose values each fit."""

    def checked(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place, "a mapping", value)
        for key, each in value.items():
            if name is not None:
                name(key, f"{place} key".strip())
            check(each, _within(place, key))

    return checked


def record(
    required: Mapping[str, Check], more: Mapping[str, Check] | None = None, *, closed: bool = False
) -> Check:
    """Describe an object with named fields.

    Args:
        required: the fields that must be there.
        more: fields that may be there.
        closed: whether any other field is refused, instead of left for newer readers.
    """
    fields = {**required, **(more or {})}

    def checked(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            _refuse(place, "a mapping", value)
        if not set(required) <= set(value) or (closed and not set(value) <= set(fields)):
            keys = f"the keys {sorted(fields if closed else required)}"
            _refuse(place, keys, list(value))
        for key, check in fields.items():
            if key in value:
                check(value[key], _within(place, key))

    return checked


def every(*checks: Check) -> Check:
    """Describe what fits all of several descriptions."""

    def checked(value: Any, place: str) -> None:
        for check in checks:
            check(value, place)

    return checked


def anything(value: Any, place: str) -> None:
    """Describe any value."""


def _plain(expected: str, accepts: Callable[[Any], bool]) -> Check:
    def checked(value: Any, place: str) -> None:
        if not accepts(value):
            _refuse(place, expected, value)

    return checked


def _refuse(place: str, expected: str, value: Any) -> NoReturn:
    where = f"{place}: " if place else ""
    raise ValueError(f"{where}expected {expected}, got {shown(value)}")


def _within(place: str, key: str) -> str:
    return f"{place}.{clipped(key)}" if place else clipped(key)


def _sha256(body: Mapping[str, Any]) -> str:
    described = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(described.encode("utf-8")).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"expected each key once, got {shown(key)} twice")
        found[key] = value
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for group in inner for each in group if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {shown(digits)}")
    return value
