"""Refresh policies: the choice of passages to encode again after a training step.

Stored vectors become stale while the passage encoder trains. A policy is a value with state: it
says which rows are encoded next, from what a `View` tells it, and reaches into nothing.

    setting  = range ("," range)*  |  sum
    range    = start "-" [end] ":" sum          steps from start to end - 1
    sum      = policy ("+" policy)*

    rolling:64+map                              both
    0-1000:rolling:64, 1000-:drift:0.02         one after the other

The policies by name are in `kinds.py`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastrag.freshness.ledger import RowLedger
from fastrag.messages import shown

Rows = Tensor | Literal["all"] | None
_RANGE = re.compile(r"\s*([0-9]{1,18})\s*-\s*([0-9]{0,18})\s*:")


@dataclass(frozen=True)
class View:
    """State of the index that a policy is given when it chooses.

    Attributes:
        step: number of optimiser steps done.
        ledger: age, retrievals and drift of each row; to be read only. Rows that this step has
            encoded anyway and that are written back count as encoded.
        retrieved: rows that this step used, each once, `[n]` int64.
        removed: mask of the rows that no search returns, `[N]` bool; None: there are none.
        drift: estimate of the mean drift of all passages; None until it is known.
    """

    step: int
    ledger: RowLedger
    retrieved: Tensor
    removed: Tensor | None = None
    drift: float | None = None

    @property
    def oldest(self) -> int:
        """Number of optimiser steps of the weights that made the oldest vector."""
        at = self.ledger.encoded_at
        at = at if self.removed is None else at[~self.removed]
        return int(at.min()) if len(at) else self.step


class MapSettings(NamedTuple):
    """How a policy wants the map fitted; see `MapFit`."""

    kind: Literal["affine", "orthogonal"] = "affine"
    half_life: int | None = None


class RefreshPolicy(abc.ABC):
    """Choose the passages to encode again after a step; a subclass with `word` becomes a setting.

        class Half(RefreshPolicy, word="half"):
            usage = "half:n"                # takes an integer, as in `policy: half:3`

            def __init__(self, n): self.n = n

            def choose(self, view): ...

    Attributes:
        word: name of the policy in a config.
        usage: form of the setting, `word` or `word:n`. A policy with another kind of argument
            overrides `from_argument` and `__str__`.
        changes_index: whether the policy ever changes a vector. If not, a checkpoint contains the
            checksum of the index instead of a copy.
        observes: whether the policy needs to know what was retrieved.
        writes_back: whether passages that a step has encoded anyway are written into the index.
        sweep: number of passages that are encoded in each step if all are chosen; 0: all at once.
        samples: number of passages drawn uniformly and encoded in each step to measure drift.
        map: how to fit the map through which questions are searched; None: no map.

    Example:
        >>> policy = RefreshPolicy.parse("every:20")
        >>> policy, policy.n
        (RefreshPolicy.parse('every:20'), 20)
        >>> RefreshPolicy.parse("0-1000:rolling:64+map, 1000-:drift:0.02").at(999)
        RefreshPolicy.parse('rolling:64+map')
    """

    word: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    changes_index: bool = True
    observes: bool = True
    writes_back: bool = False
    sweep: int = 0
    samples: int = 0
    map: MapSettings | None = None
    n: int
    _known: ClassVar[dict[str, type[RefreshPolicy]]] = {}

    def __init_subclass__(cls, *, word: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if word is not None:
            cls.word = word
            cls.usage = cls.__dict__.get("usage", word)
            RefreshPolicy._known[word] = cls

    @staticmethod
    def parse(text: str | RefreshPolicy) -> RefreshPolicy:
        """Return the policy of a setting.

        Args:
            text: for example `"every:20"`, `"rolling:64+map"` or
                `"0-1000:rolling:64, 1000-:drift:0.02"`; a policy is returned as it is.

        Raises:
            ValueError: an unknown name, a bad argument or a malformed schedule; the message lists
                the known settings and says where in the text the fault is.
        """
        return text if isinstance(text, RefreshPolicy) else _parse(text)

    @classmethod
    def from_argument(cls, argument: str | None) -> RefreshPolicy | None:
        """Make the policy from the text after the colon; return None for an invalid text."""
        if ":" not in cls.usage:
            return cls() if argument is None else None
        make: Any = cls
        fits = argument is not None and re.fullmatch(r"[1-9][0-9]{0,17}", argument)
        return make(int(argument or 0)) if fits else None

    @abc.abstractmethod
    def choose(self, view: View) -> Rows:
        """Choose the passages to encode again after a step.

        Args:
            view: the state of the index.

        Returns:
            Rows `[n]` int64 without repetition, "all", or None.
        """

    def at(self, step: int) -> RefreshPolicy:
        """Return the policy that holds after `step` optimiser steps, for a schedule one of many."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: numbers, text and tensors."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the state belongs to another policy.
        """
        if state_dict:
            raise ValueError(f"state_dict: expected no state of {self}, got {shown(state_dict)}")

    def __str__(self) -> str:
        return f"{self.word}:{self.n}" if ":" in self.usage else self.word

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefreshPolicy) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"RefreshPolicy.parse({str(self)!r})"


class Frozen(RefreshPolicy, word="frozen"):
    """Never encode passages again, for a passage encoder that does not train."""

    changes_index = False
    observes = False

    def choose(self, view: View) -> Rows:
        """Choose nothing."""
        return None


class Together(RefreshPolicy):
    """Several policies at once: the union of the rows that they choose.

    Args:
        parts: the policies, each of another kind.

    Raises:
        ValueError: fewer than two, the same kind twice, a schedule, or `frozen`.
    """

    def __init__(self, parts: Sequence[RefreshPolicy]) -> None:
        self.parts = tuple(parts)
        kinds = [type(each) for each in self.parts]
        alike = len(set(kinds)) < len(kinds)
        if len(kinds) < 2 or alike or {Together, Schedule, Frozen} & set(kinds):
            raise ValueError(
                "parts: expected two or more policies of different kinds that encode passages or "
                f"fit a map, got {'+'.join(map(str, self.parts)) or 'none'}"
            )
        self.changes_index = any(each.changes_index for each in self.parts)
        self.observes = any(each.observes for each in self.parts)
        self.writes_back = any(each.writes_back for each in self.parts)
        self.sweep = max(each.sweep for each in self.parts)
        self.samples = max(each.samples for each in self.parts)
        self.map: MapSettings | None = next((each.map for each in self.parts if each.map), None)

    def choose(self, view: View) -> Rows:
        """Choose what any part chooses."""
        chosen = [rows for rows in (each.choose(view) for each in self.parts) if rows is not None]
        if any(isinstance(rows, str) for rows in chosen):
            return "all"
        tensors = [rows for rows in chosen if isinstance(rows, Tensor)]
        return torch.cat(tensors).unique() if tensors else None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts."""
        return _states(self.parts)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the states of the parts."""
        _load_states(self, self.parts, state_dict)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


class Range(NamedTuple):
    """Steps from `start` to `stop` - 1 (None: to the end) and their policy."""

    start: int
    stop: int | None
    policy: RefreshPolicy

    def __str__(self) -> str:
        return f"{self.start}-{'' if self.stop is None else self.stop}:{self.policy}"


class Schedule(RefreshPolicy):
    """A policy for each range of steps; in other steps nothing is encoded.

    Args:
        ranges: ranges in ascending order that do not overlap.

    Raises:
        ValueError: ranges that are empty, out of order or overlap.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.ranges = tuple(ranges)
        reached: int | None = 0
        for each in self.ranges:
            if reached is None or each.start < reached:
                after = "the end" if reached is None else f"step {reached}"
                raise ValueError(f"ranges: expected a start at or after {after}, got {each}")
            if each.stop is not None and each.stop <= each.start:
                raise ValueError(f"ranges: expected an end after step {each.start}, got {each}")
            if isinstance(each.policy, Schedule):
                raise ValueError(f"ranges: expected a policy for all steps of a range, got {each}")
            reached = each.stop
        if not self.ranges:
            raise ValueError("ranges: expected at least one range, got none")
        self.changes_index = any(each.policy.changes_index for each in self.ranges)
        self.observes = any(each.policy.observes for each in self.ranges)

    def at(self, step: int) -> RefreshPolicy:
        """Return the policy of the range that holds `step`."""
        for start, stop, policy in self.ranges:
            if start <= step and (stop is None or step < stop):
                return policy
        return Frozen()

    def choose(self, view: View) -> Rows:
        """Choose as the policy of the present range."""
        return self.at(view.step).choose(view)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranges."""
        return _states([each.policy for each in self.ranges])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the states of all ranges."""
        _load_states(self, [each.policy for each in self.ranges], state_dict)

    def __str__(self) -> str:
        return ", ".join(map(str, self.ranges))


def _parse(text: Any) -> RefreshPolicy:
    """Return the policy of a setting; see `RefreshPolicy.parse`."""
    whole = str(text)
    if not _RANGE.match(whole):
        return _parse_sum(whole, 0, whole)
    ranges: list[Range] = []
    for start, part in _split(whole, 0, ","):
        found = _RANGE.match(part)
        if found is None:
            raise ValueError(
                f"refresh: expected a range of steps, as in '1000-2000:', got {shown(part)} at "
                f"position {start} of {shown(whole)}"
            )
        policy = _parse_sum(part[found.end() :], start + found.end(), whole)
        ranges.append(Range(int(found[1]), int(found[2]) if found[2] else None, policy))
        try:
            Schedule(ranges)
        except ValueError as error:
            why = str(error).removeprefix("ranges: ")
            raise ValueError(f"refresh: {why} at position {start} of {shown(whole)}") from None
    return Schedule(ranges)


def _parse_sum(text: str, at: int, whole: str) -> RefreshPolicy:
    parts = [_parse_one(part, start, whole) for start, part in _split(text, at, "+")]
    if len(parts) == 1:
        return parts[0]
    try:
        return Together(parts)
    except ValueError as error:
        why = str(error).removeprefix("parts: ")
        where = "" if text == whole else f" at position {at} of {shown(whole)}"
        raise ValueError(f"refresh: {why}{where}") from None


def _parse_one(text: str, at: int, whole: str) -> RefreshPolicy:
    word, colon, argument = text.strip().partition(":")
    known = RefreshPolicy._known
    made = known[word].from_argument(argument if colon else None) if word in known else None
    if made is None:
        usages = ", ".join(repr(each.usage) for each in known.values())
        at += len(text) - len(text.lstrip())
        where = "" if text == whole else f" at position {at} of {shown(whole)}"
        raise ValueError(f"refresh: expected one of {usages}, got {shown(text.strip())}{where}")
    return made


def _split(text: str, at: int, mark: str) -> Iterator[tuple[int, str]]:
    """Yield each part of a text and its position in the whole setting."""
    for part in text.split(mark):
        yield at, part
        at += len(part) + len(mark)


def _states(policies: Sequence[RefreshPolicy]) -> dict[str, Any]:
    return {str(i): each.state_dict() for i, each in enumerate(policies)}


def _load_states(
    owner: RefreshPolicy, policies: Sequence[RefreshPolicy], state_dict: Mapping[str, Any]
) -> None:
    names = [str(i) for i in range(len(policies))]
    if not isinstance(state_dict, Mapping) or list(state_dict) != names:
        raise ValueError(
            f"state_dict: expected a state of each of {owner}, got {shown(state_dict)}"
        )
    before = [each.state_dict() for each in policies]
    try:
        for name, each in zip(names, policies, strict=True):
            each.load_state_dict(state_dict[name])
    except BaseException:
        for state, each in zip(before, policies, strict=True):
            each.load_state_dict(state)
        raise
