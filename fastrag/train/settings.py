"""Settings as a YAML file and `key=value` words give them: read, overridden, brought to type."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: the file.

    Returns:
        Its settings by name.

    Raises:
        ValueError: not UTF-8, not YAML or no mapping; the message names file and place.
        OSError: the file cannot be read.

    Example:
        >>> read_yaml("train.yaml")        # doctest: +SKIP
        {'question_encoder': 'minilm', 'generator': 'smollm2'}
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ValueError(f"{path}{line}: {problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def override(values: dict[str, Any], word: str) -> None:
    """Set one setting in place.

    Args:
        values: settings by name.
        word: `key=value`, the value as in YAML; a dot in the key reaches into a mapping.

    Raises:
        ValueError: no such word, or the dot reaches into something else.

    Example:
        >>> values = {"steps": 5}
        >>> override(values, "lora.rank=8")
        >>> values
        {'steps': 5, 'lora': {'rank': 8}}
    """
    key, separator, text = word.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"--set: expected key=value, got {word!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: expected a YAML value, got {text!r}") from None
    *outer, last = key.strip().split(".")
    target = values
    for name in outer:
        inner = target.get(name)
        if inner is None:
            inner = target[name] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {key}: {name} is not a mapping")
        target = inner
    target[last] = value


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring a YAML value to the annotated type (YAML 1.1 reads 1e-3 as a text).

    Args:
        name: the setting, for the error message.
        value: what came.
        hint: its type: a plain one, a list or dict of them, or a union.

    Raises:
        ValueError: the value is of another type.

    Example:
        >>> coerce("tau", "1e-3", float | None)
        0.001
    """
    options = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict) else (hint,)
    options = options or (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is str and isinstance(value, str) and value:
            return value
        if origin is dict and isinstance(value, dict):
            return dict(value)
        if origin is list and isinstance(value, (list, tuple)):
            (item,) = typing.get_args(option)
            return [coerce(name, each, item) for each in value]
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    names |= {list: "a list", dict: "a mapping", type(None): "null"}
    expected = " or ".join(
        names.get(typing.get_origin(option) or option, str(option)) for option in options
    )
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def require(name: str, holds: bool, expected: str, got: Any) -> None:
    """Raise ValueError unless a setting holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def require_word(name: str, got: str, words: Iterable[str]) -> None:
    """Raise ValueError unless a setting is one of `words`."""
    require(name, got in words, "one of " + ", ".join(words), got)


def unknown(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Say that a setting is unknown, with the nearest known one.

    Example:
        >>> unknown("rnk", ["rank", "alpha"], prefix="lora.")
        'lora.rnk: unknown setting; did you mean lora.rank?'
    """
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"{prefix}{key}: unknown setting{hint}"
