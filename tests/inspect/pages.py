"""Readings without a model, and a page taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from fastrag.data import Passage
from fastrag.generation.answers import Answer, Citation
from fastrag.inspect import Reading

VOID = {"meta", "input", "img", "br"}


@dataclass
class Element:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        """Elements below this one, by tag and class, in the order of the page."""
        found = []
        for each in self.children:
            if isinstance(each, Element):
                classes = each.attributes.get("class", "").split()
                if tag in (each.tag, "*") and (name is None or name in classes):
                    found.append(each)
                found += each.all(tag, name)
        return found

    def one(self, tag: str, name: str | None = None) -> Element:
        return self.all(tag, name)[0]

    @property
    def share(self) -> float:
        return float(self.attributes["style"].removeprefix("--p:"))


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    """Return the root of a page whose every element is closed."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert len(parser.open) == 1, f"<{parser.open[-1].tag}> is not closed"
    return parser.open[0]


def passage(id: str, prior: float, by_token: tuple[float, ...] = (), **texts: str) -> Citation:
    posterior = sum(by_token) / len(by_token) if by_token else prior
    shown = {"title": f"title of {id}", "text": f"text of {id}"} | texts
    return Citation(Passage(id, **shown), 0, prior, posterior, by_token, supports=False)


def reading(
    id: str,
    citations: tuple[Citation, ...],
    *,
    question: str = "who?",
    accepted: tuple[str, ...] = (),
    text: str = "one",
    tokens: tuple[str, ...] = ("one", "</s>"),
    log_prob: float = -1.0,
    f1: float | None = None,
    right: tuple[bool, ...] | None = None,
    warnings: tuple[str, ...] = (),
) -> Reading:
    answer = Answer(question, text, tuple(range(len(tokens))), log_prob, citations, warnings)
    return Reading(id, accepted, answer, tokens, f1 == 1.0 if accepted else None, f1, right)
