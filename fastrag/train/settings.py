"""Settings as a YAML file and `key=value` words give them: read, overridden, brought to type."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrag.messages import clipped, shown
from fastrag.train.yaml_values import MAX_BYTES, parse_yaml

# Names that other libraries use, and how the name of that setting ends here.
_ALSO_CALLED = {"learning_rate": "lr", "top_k": "docs", "k": "docs"}
# Dots in the key of an override; settings nest less deeply, and each dot makes a mapping.
_MAX_DOTS = 8


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: the file.

    Returns:
        Its settings by name.

    Raises:
        ValueError: not UTF-8, not YAML that `parse_yaml` takes, no mapping, or larger than settings
            can be; the message names file and place.
        OSError: the file cannot be read.

    Example:
        >>> read_yaml("train.yaml")        # doctest: +SKIP
        {'question_encoder': 'minilm', 'generator': 'smollm2'}
    """
    with Path(path).open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes of settings, got more")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}:{error}") from None
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
        raise ValueError(f"--set: expected key=value, got {shown(word)}")
    where = f"--set {clipped(key)}"
    try:
        value = parse_yaml(text)
    except ValueError as error:
        problem = str(error).partition(": ")[2]
        raise ValueError(f"{where}: expected a YAML value, got {shown(text)} ({problem})") from None
    *outer, last = key.strip().split(".", _MAX_DOTS)
    target = values
    for name in outer:
        inner = target.get(name)
        if inner is None:
            inner = target[name] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{where}: {clipped(name)} is not a mapping")
        target = inner
    target[last] = value


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring a YAML value to the annotated type (YAML 1.1 reads 1e-3 as a text).

    A single value stands for a list of one.

    Args:
        name: the setting, for the error message.
        value: what came.
        hint: its type: a plain one, a list or dict of them, or a union.

    Raises:
        ValueError: the value is of another type, or an integer has more than 64 bits.

    Example:
        >>> coerce("tau", "1e-3", float | None)
        0.001
        >>> coerce("eval_ks", 5, list[int])
        [5]
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
            require(name, -(2**63) <= value < 2**63, "an integer of at most 64 bits", value)
            return value
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                continue
        if origin is str and isinstance(value, str) and value:
            return value
        if origin is dict and isinstance(value, dict):
            return dict(value)
        if origin is list and isinstance(value, (list, tuple)):
            (item,) = typing.get_args(option)
            return [coerce(name, each, item) for each in value]
        if origin is list and isinstance(value, (bool, int, float, str)):
            try:
                return [coerce(name, value, *typing.get_args(option))]
            except ValueError:
                continue
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    names |= {list: "a list", dict: "a mapping", type(None): "null"}
    expected = " or ".join(
        names.get(typing.get_origin(option) or option, getattr(option, "__name__", str(option)))
        for option in options
    )
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def require(name: str, holds: bool, expected: str, got: Any) -> None:
    """Raise ValueError unless a setting holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {shown(got)}")


def require_word(name: str, got: str, words: Iterable[str]) -> None:
    """Raise ValueError unless a setting is one of `words`."""
    require(name, got in words, "one of " + ", ".join(words), got)


def unknown(key: object, known: Iterable[str], prefix: str = "") -> str:
    """Say that a setting is unknown, with the known ones that are meant most likely.

    Example:
        >>> unknown("rnk", ["rank", "alpha"], prefix="lora.")
        'lora.rnk: unknown setting; did you mean lora.rank?'
        >>> unknown("lr", ["retriever_lr", "generator_lr", "lora"])
        'lr: unknown setting; did you mean retriever_lr, generator_lr?'
    """
    near = ", ".join(f"{prefix}{name}" for name in _nearest(str(key), list(known)))
    return f"{prefix}{clipped(key)}: unknown setting" + (f"; did you mean {near}?" if near else "")


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return the names that end in the key or in which it ends; else the like; else its longer."""
    word = _ALSO_CALLED.get(key, key)
    ends = [name for name in known if name.endswith(f"_{word}") or key.endswith(f"_{name}")]
    like = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return ends or like or [name for name in known if key and name.startswith(key)][:3]
