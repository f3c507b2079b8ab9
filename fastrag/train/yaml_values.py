"""YAML as settings use it: plain values of bounded size, every key once."""

from __future__ import annotations

from typing import Any

import yaml

from fastrag.messages import clipped, shown

# More than any settings need. PyYAML takes seconds for a text of this size in the worst case.
MAX_BYTES = 2**18
_MAX_VALUES = 10_000
_MAX_DEPTH = 32
# What PyYAML's constructors raise for a text that a tag or a date-like form does not fit.
_MISFITS = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


def parse_yaml(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.

    Returns:
        Dicts, lists and scalars; None for an empty document.

    Raises:
        ValueError: not YAML; or more than 10 000 values, aliases counted each time; nested deeper
            than 32 levels; a key twice in a mapping. The message begins with the line: `3: ...`.

    Example:
        >>> parse_yaml("{eval_ks: [1, 5]}")
        {'eval_ks': [1, 5]}
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{line}: {clipped(error.problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{line}: {error.reason}, got {chr(error.character)!r}") from None


class _Loader(yaml.SafeLoader):
    """A SafeLoader that bounds how deep values nest, and whose every error has a place."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth == _MAX_DEPTH:
            problem = f"expected at most {_MAX_DEPTH} levels, got more"
            raise yaml.MarkedYAMLError(None, None, problem, self.peek_event().start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _MISFITS:
            kind = node.tag.rpartition(":")[2]
            problem = f"expected a value of YAML's type {clipped(kind)}, got {shown(node.value)}"
            raise _mistake(node, problem) from None


def _measure(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values that a node stands for; raise where it is out of bounds.

    Each node is visited once. Its aliases count in full, since whoever walks the values meets them
    as often as that.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MAX_VALUES  # an alias inside of what it stands for has no end
    size = 1
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise _mistake(key, f"expected each key once, got {shown(key.value)} again")
            names.add(key.value)
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for part in each if isinstance(each, tuple) else (each,):
                size += _measure(part, sizes)
    if size > _MAX_VALUES:
        raise _mistake(node, f"expected at most {_MAX_VALUES} values, got more")
    sizes[id(node)] = size
    return size


def _mistake(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)
