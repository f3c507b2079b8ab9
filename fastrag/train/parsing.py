"""Read settings from a YAML file, a mapping or a command line; check their names and types.

The settings are the fields of nested dataclasses; jsonargparse converts and checks their values.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from fastrag.messages import clipped, shown

# More than any settings need, and still read within a second.
_MAX_BYTES = 2**18
_MAX_DEPTH = 32
_MODE = "fastrag"  # the name of `_Loader` among jsonargparse's
# Errors that PyYAML's constructors raise for text that does not fit its tag.
_MISFITS = (ValueError, LookupError, AttributeError, TypeError, OverflowError)
_YAML_TAG = "tag:yaml.org,2002:"
# Names that other libraries use.
_SYNONYMS = {
    "accumulation": "gradient_accumulation_steps",
    "batch_size": "per_device_train_batch_size",
    "best_metric": "metric_for_best_model",
    "device": "use_cpu",
    "epochs": "num_train_epochs",
    "k": "n_docs",
    "keep_checkpoints": "save_total_limit",
    "log_steps": "logging_steps",
    "lora": "rank",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "precision": "bf16",
    "steps": "max_steps",
    "top_k": "n_docs",
    "warmup": "warmup_steps",
}
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_TYPE_NAMES |= {list: "a list", dict: "a mapping", types.NoneType: "null"}
_MOST_MEANT = 3  # settings that an error names


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of settings.

    Args:
        path: the file.

    Returns:
        The settings by name; an empty dict for an empty file.

    Raises:
        ValueError: the file is too large, is not UTF-8, is not YAML that `parse_yaml` accepts, or
            holds something other than a mapping; the message names the file and the line.
        OSError: the file cannot be read.

    Example:
        >>> read_yaml("train.yaml")        # doctest: +SKIP
        {'retriever': {'question_encoder': 'minilm'}, 'reader': {'generator': 'smollm2'}}
    """
    with Path(path).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        values = parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except ValueError as error:
        raise ValueError(f"{path}:{error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """Read one YAML document.

    Only `true` and `false` are truth values, and `1e-4` is a number, as in YAML 1.2.

    Args:
        text: the document.

    Returns:
        Dicts, lists and scalars; None for an empty document.

    Raises:
        ValueError: the text is not YAML, is longer than 262144 characters, nests deeper than 32
            levels, refers to an alias, or has a key twice in a mapping. The message begins with the
            line.

    Example:
        >>> parse_yaml("{ks: [1, 5], eval_strategy: no}")
        {'ks': [1, 5], 'eval_strategy': 'no'}
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f" expected at most {_MAX_BYTES} bytes of settings, got more")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{line}: {clipped(error.problem)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{line}: {error.reason}, got {chr(error.character)!r}") from None


class _Loader(yaml.SafeLoader):
    """A SafeLoader that bounds the size of its result and names the line of every mistake."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        # not a YAMLError, after which jsonargparse reads the value with a loader of its own
        if self.check_event(yaml.AliasEvent):  # a few of them can stand for billions of values
            raise ValueError(f"{line}: expected no aliases, got one")
        if self.depth == _MAX_DEPTH:
            raise ValueError(f"{line}: expected at most {_MAX_DEPTH} levels, got more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        names = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        for i, name in enumerate(names):
            if name in names[:i]:
                problem = f"expected each key once, got {shown(name)} again"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _MISFITS:
            kind = clipped(node.tag.rpartition(":")[2])
            problem = f"expected a value of YAML's type {kind}, got {shown(node.value)}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


# YAML 1.1 reads `no` as false and `1e-4` as a text.
_Loader.yaml_implicit_resolvers = {
    first: [each for each in known if not each[0].endswith((":bool", ":float", ":timestamp"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_YAML_TAG}bool", re.compile("true|false"), list("tf"))
_Loader.add_implicit_resolver(
    f"{_YAML_TAG}float",
    re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes the texts which `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True  # `_Loader` takes none


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return the text of a YAML file that `parse_yaml` reads as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


jsonargparse.set_loader(
    _MODE, functools.partial(yaml.load, Loader=_Loader), exceptions=(yaml.YAMLError,)
)


def add_settings(
    parser: jsonargparse.ArgumentParser,
    settings: type,
    prefix: str = "",
    unlisted: Collection[str] = (),
) -> None:
    """Add an option for every setting to a parser, and a group for every dataclass to its help.

    Args:
        parser: a parser of `make_parser`.
        settings: a dataclass whose fields may be dataclasses.
        prefix: text in front of every name.
        unlisted: names of settings that the help leaves out.
    """
    hints = typing.get_type_hints(settings)
    nested = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    group = parser.add_argument_group((settings.__doc__ or "").partition(".\n")[0])
    section = prefix.removesuffix(".") or None
    group.add_class_arguments(settings, section, as_group=False, skip={*nested})
    for option in group._group_actions:
        # `--name+` would not extend the list of the file but replace it
        for extra in option.option_strings[1:]:
            del parser._option_string_actions[extra]
        option.option_strings = option.option_strings[:1]
        name = option.dest.removeprefix(prefix)
        # not in hints: the option `<name>.help` that jsonargparse adds for a class
        if name in unlisted or name not in hints:
            option.help = argparse.SUPPRESS
            continue
        kinds = re.findall(r"\ban? (\w+)", expected(hints[name])) or ["value"]
        option.metavar = option.metavar or "|".join(kinds).upper()
        default = json.dumps(option.default).strip('"')
        text = (option.help or "").rstrip(".")
        option.help = f"{text} (default: {default})" if default else text
    for name, hint in nested.items():
        add_settings(parser, typing.cast(type, hint), f"{prefix}{name}.", unlisted)


def make_parser(**settings: Any) -> jsonargparse.ArgumentParser:
    """Make a jsonargparse parser that reads values as `parse_yaml` does and raises errors."""
    return jsonargparse.ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=_MODE,
        formatter_class=argparse.HelpFormatter,
        **settings,
    )


def typed(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names and types of settings.

    Args:
        settings: a dataclass whose fields are dataclasses.
        values: settings by name, nested.

    Returns:
        The settings that are given, converted to their types.

    Raises:
        ValueError: a name is unknown, or a value is of another type.

    Example:
        >>> from fastrag.train import RagConfig
        >>> typed(RagConfig, {"loss": {"tau_lm": "1e-3"}})
        {'loss': {'tau_lm': 0.001}}
    """
    hints = dotted_hints(settings)
    given = dict(dotted(values, hints))
    try:
        # The parser changes what it is given.
        copied = copy.deepcopy(dict(values))
        found = _parser_of(settings).parse_object(copied, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise ValueError(explained(error, settings, given)) from None
    except OverflowError as error:
        for name, value in given.items():
            _require_64_bits(name, value)
        raise ValueError(f"settings: expected numbers of at most 64 bits: {error}") from None
    for name, value in dotted(found, hints):
        # jsonargparse accepts null for a setting of any type
        nullable = value is not None or types.NoneType in _options(hints[name])
        require(name, nullable, expected(hints[name]), value)
        _require_64_bits(name, value)
    return found


def _require_64_bits(name: str, value: Any) -> None:
    if isinstance(value, int):
        require(name, -(2**63) <= value < 2**63, "an integer of at most 64 bits", value)


def explained(
    error: argparse.ArgumentError, settings: type, given: Mapping[str, Any] | None = None
) -> str:
    """Return the message of a jsonargparse parser in the form `name: expected ..., got ...`.

    Args:
        error: the error that the parser raised.
        settings: the dataclass that it parses.
        given: the values by dotted name; None: take the value from the error's message.

    Returns:
        One line.
    """
    said, hints = error.message or "", dotted_hints(settings)
    option = re.match(r"unrecognized arguments: --([^\s=]+)", said)
    if option is not None:
        return unknown(option[1], hints)
    key = re.match(r'Parser key "([^"]+)"', said)
    got = re.search(r"(?:Got value|Given value): (.*)\Z", said, re.DOTALL)
    if key is None or key[1] not in hints:
        return clipped(said)
    name = key[1]
    if got is None:
        return f"{name}:{clipped(said[key.end() :])}"
    value = shown(given[name]) if given and name in given else clipped(got[1])
    return f"{name}: expected {expected(hints[name])}, got {value}"


def expected(hint: Any) -> str:
    """Describe a type of settings.

    Example:
        >>> expected(list[int] | None), expected(typing.Literal["token", "sequence"])
        ('a list or null', 'one of token, sequence')
    """
    names = []
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(option))))
        else:
            names.append(_TYPE_NAMES.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(names)


@functools.cache
def dotted_hints(settings: type) -> dict[str, Any]:
    """Return the type of every setting by its dotted name.

    Example:
        >>> from fastrag.train import RagConfig
        >>> dotted_hints(RagConfig)["retriever.n_docs"]
        <class 'int'>
    """
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(settings).items():
        if dataclasses.is_dataclass(hint):
            inner = dotted_hints(typing.cast(type, hint))
            hints |= {f"{name}.{each}": found for each, found in inner.items()}
        else:
            hints[name] = hint
    return hints


def unknown(key: object, known: Collection[str]) -> str:
    """Say that a setting is unknown, and name the known settings that it resembles.

    Example:
        >>> unknown("n_doc", ["retriever.n_docs", "reader.lora.rank"])
        'n_doc: unknown setting; did you mean retriever.n_docs?'
        >>> unknown("reader.lora.r", ["retriever.n_docs", "reader.lora.rank"])
        'reader.lora.r: unknown setting; did you mean reader.lora.rank?'
    """
    section, _, last = str(key).rpartition(".")
    word = _SYNONYMS.get(last.removeprefix("retriever_").removeprefix("generator_"), last)
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    near = [leaf for leaf in leaves if leaf == word] or [
        leaf for leaf in leaves if leaf.endswith(f"_{word}") or word.endswith(f"_{leaf}")
    ]
    near = near or difflib.get_close_matches(word, leaves, n=1, cutoff=0.5)
    near = near or [leaf for leaf in leaves if word and leaf.startswith(word)]
    found = [name for leaf in near for name in leaves[leaf]]
    here = [name for name in found if section and name.startswith(f"{section}.")]
    within = [name for name in known if name.startswith(f"{key}.")]
    meant = ", ".join((within or here or found)[:_MOST_MEANT])
    return f"{clipped(key)}: unknown setting" + (f"; did you mean {meant}?" if meant else "")


def require(name: str, holds: bool, expected: str, got: Any) -> None:
    """Raise ValueError unless a setting holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {shown(got)}")


def dotted(
    values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield each setting with its dotted name; raise for a name that is unknown."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in hints:
            yield name, value
        elif isinstance(key, str) and any(each.startswith(f"{name}.") for each in hints):
            require(name, isinstance(value, Mapping), "a mapping of settings", value)
            yield from dotted(value, hints, f"{name}.")
        else:
            raise ValueError(unknown(name, hints))


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


@functools.cache
def _parser_of(settings: type) -> jsonargparse.ArgumentParser:
    parser = make_parser()
    add_settings(parser, settings)
    return parser
