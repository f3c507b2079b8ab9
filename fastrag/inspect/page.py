"""The page: a Jinja template with its style sheet and script in one HTML file.

Everything is in the markup, and the template escapes every text. The script only sorts, filters
and moves the focus; it receives no data. The page's Content-Security-Policy allows no network and
no script but this one, by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fastrag.folders import replacing
from fastrag.inspect.charts import HEIGHT, LEFT, RIGHT, WIDTH, draw_charts
from fastrag.inspect.readings import Reading
from fastrag.inspect.run import History
from fastrag.messages import shown

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True)
class _Trace:
    """Ranks of one passage, from 1, at each checkpoint and in the model; None: not retrieved."""

    id: str
    title: str
    ranks: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A question as the template shows it: the reading, and values to sort by."""

    reading: Reading
    traces: tuple[_Trace, ...]
    prior_entropy: float
    kl: float
    new_passages: int  # of the model's, those that the first checkpoint did not retrieve


def check_page(path: str | os.PathLike[str], name: str = "path") -> None:
    """Raise ValueError unless a page can be written at a path.

    Args:
        path: the file.
        name: what messages call it.
    """
    whole = Path(path).absolute()
    if whole.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{name}: expected a name ending in .html, got {shown(str(path))}")
    if whole.is_dir() or not whole.parent.is_dir():
        raise ValueError(f"{name}: expected a file in an existing folder, got {shown(str(path))}")


def render_page(
    readings: Sequence[Reading],
    *,
    title: str,
    facts: Mapping[str, object],
    log: Sequence[dict[str, Any]] = (),
    history: History | None = None,
) -> str:
    """Return the page of a model or a run.

    Args:
        readings: one per question, at least one.
        title: heading of the page.
        facts: names and values that are listed below the heading.
        log: lines of `metrics.jsonl`, see `read_log`; charts are drawn of them.
        history: the passages of the run's checkpoints for the same questions.

    Returns:
        HTML that needs no other file.

    Raises:
        ValueError: no readings, or a history of another number of questions.

    Example:
        >>> page = render_page(readings, title="runs/mine", facts={})    # doctest: +SKIP
        >>> page.startswith("<!doctype html>")                           # doctest: +SKIP
        True
    """
    if not readings:
        raise ValueError("readings: expected at least one, got none")
    if history is not None and len(history.retrieved) != len(readings):
        raise ValueError(
            f"history: expected one of {len(readings)} questions, got {len(history.retrieved)}"
        )
    entries = [_entry(reading, history, i) for i, reading in enumerate(readings)]
    return _template().render(
        title=title,
        facts=dict(facts) | _summary(readings),
        entries=entries,
        charts=draw_charts(log),
        steps=() if history is None else history.steps,
        is_judged=any(reading.right_rank is not None for reading in readings),
        is_answered=any(reading.accepted for reading in readings),
        size=(WIDTH, HEIGHT),
        plot=(LEFT, WIDTH - RIGHT),
    )


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the file.
        page: what `render_page` returned.

    Raises:
        ValueError: the name does not end in .html, or the folder does not exist.
    """
    check_page(path)
    with replacing(path) as temporary:
        # a question may hold half a surrogate pair, which JSON can state and UTF-8 cannot
        temporary.write_text(page, encoding="utf-8", errors="replace")


@functools.cache
def _template() -> Template:
    assets = resources.files("fastrag.inspect") / "assets"
    html, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"probability": _probability, "cell": _cell}
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment.from_string(html)


def _entry(reading: Reading, history: History | None, i: int) -> _Entry:
    citations = reading.answer.citations
    prior = [each.prior for each in citations]
    shares = [each.by_token or (each.posterior,) for each in citations]
    columns = list(zip(*shares, strict=True))
    kl = [
        sum(w * math.log(w / p) for w, p in zip(column, prior, strict=True) if w > 0 < p)
        for column in columns
    ]
    last = tuple((each.passage.id, each.passage.title) for each in citations)
    lists = () if history is None or not history.steps else (*history.retrieved[i], last)
    traces = _traces(lists)
    return _Entry(
        reading,
        traces,
        prior_entropy=-sum(p * math.log(p) for p in prior if p > 0),
        kl=sum(kl) / len(kl) if kl else 0.0,
        new_passages=sum(each.ranks[-1] is not None and each.ranks[0] is None for each in traces),
    )


def _traces(lists: Sequence[Sequence[tuple[str, str]]]) -> tuple[_Trace, ...]:
    """Return the ranks of every passage; those of the last list come first, in its order."""
    titles = {id: title for found in reversed(lists) for id, title in found}
    places = [{id: rank for rank, (id, _) in enumerate(found, start=1)} for found in lists]
    return tuple(
        _Trace(id, title, tuple(place.get(id) for place in places)) for id, title in titles.items()
    )


def _summary(readings: Sequence[Reading]) -> dict[str, str]:
    """Return number of questions, EM, and the share of questions with a right passage."""
    facts = {"Questions": str(len(readings))}
    matches = [each.exact_match for each in readings if each.exact_match is not None]
    if matches:
        facts["Exact match"] = f"{sum(matches) / len(matches):.3f}"
    ranks = [each.right_rank for each in readings if each.right_rank is not None]
    if ranks:
        facts["Right passage retrieved"] = f"{sum(rank > 0 for rank in ranks) / len(ranks):.3f}"
    return facts


def _probability(p: float) -> str:
    return "<0.001" if 0.0 < p < 0.0005 else f"{p:.3f}"


def _cell(p: float) -> str:
    """Return a probability in two digits: `.07`, `1`."""
    return "1" if p >= 0.995 else f"{p:.2f}"[1:]
