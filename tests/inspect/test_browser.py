"""The page in headless Chromium: hostile text, keys, filters, themes and the width of a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrag.inspect import History, render_page, write_page
from tests.inspect import chromium
from tests.inspect.chromium import Chromium
from tests.inspect.pages import passage, reading

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="needs Chromium (Debian: chromium)")

HOSTILE = (
    "<script>document.title = 'run'</script></script><img src=x onerror=\"document.title='run'\">"
)
LOG = [{"step": step, "loss": 1.0 / (step + 1), "eval_em": 0.5} for step in range(0, 50, 10)]
PASSAGES = (
    passage("a", 0.7, (0.9, 0.2, 0.4), text=HOSTILE + " " + "long " * 60 + "x" * 300),
    passage("b", 0.3, (0.1, 0.8, 0.6)),
)
MISSED = (
    passage("b", 0.6, (0.5,) * 3),
    passage("c", 0.4, (0.5,) * 3, text="kiwi"),
)
TOKENS = ("one", " two", "</s>")
NONE = (False, False)
READINGS = [
    reading(
        "q0",
        PASSAGES,
        question="zebra?",
        tokens=TOKENS,
        accepted=("one",),
        f1=1.0,
        right=(True, False),
    ),
    reading(
        "q1",
        MISSED,
        question="apple?",
        tokens=TOKENS,
        log_prob=-3.0,
        accepted=("x",),
        f1=0.0,
        right=NONE,
    ),
    reading("q2", MISSED[::-1], question="mango?", log_prob=-2.0, right=NONE, tokens=TOKENS * 12),
]
HISTORY = History(
    tuple(range(100, 2100, 100)),
    tuple(((("b", "title of b"), ("z", HOSTILE)),) * 20 for _ in READINGS),
)
SHOWN = "all('.question:not([hidden]) .asked').map((each) => each.textContent)"
FOCUS = "document.activeElement"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(browser: Chromium, tmp_path: Path) -> Chromium:
    """The page of `READINGS`, freshly loaded on a light desktop."""
    path = tmp_path / "page.html"
    facts = {"Model": HOSTILE}
    write_page(path, render_page(READINGS, title="run", facts=facts, log=LOG, history=HISTORY))
    browser.prefer("light")
    browser.resize(1200)
    browser.open(path)
    return browser


def test_text_does_not_run_and_nothing_is_fetched(page: Chromium) -> None:
    page.run("all('details').forEach((each) => (each.open = true))")
    assert page.run("document.title") == "run: fastrag inspect"
    assert HOSTILE in page.run("one('.passages p').textContent")
    assert page.run("document.scripts.length") == 1 and page.run("document.images.length") == 0
    methods = [each["method"] for each in page.events]
    requests = [
        each["params"]["request"]["url"]
        for each in page.events
        if each["method"] == "Network.requestWillBeSent"
    ]
    assert len(requests) == 1 and requests[0].startswith("file:")
    assert "Log.entryAdded" not in methods and "Runtime.exceptionThrown" not in methods


def test_a_script_that_got_in_would_not_run(page: Chromium) -> None:
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"bad = 1\">')")
    page.run(
        "const added = document.createElement('script'); added.textContent = 'bad = 1';"
        "document.body.append(added)"
    )
    assert page.run("typeof bad") == "undefined"


def test_filter_and_order(page: Chromium) -> None:
    page.press("/")
    assert page.run(f"{FOCUS}.id") == "filter"
    for key in "KIWI title":
        page.press(key)
    assert page.run(SHOWN) == ["apple?", "mango?"]
    assert page.run("one('#count').textContent") == "2 of 3"
    page.press("Escape")
    assert page.run(SHOWN) == ["zebra?", "apple?", "mango?"]

    def choose(control: str, value: str) -> None:
        page.run(
            f"one('#{control}').value = '{value}';"
            f"one('#{control}').dispatchEvent(new Event('input'))"
        )

    for value, shown in {
        "exact": ["zebra?"],
        "wrong": ["apple?"],
        "first": ["zebra?"],
        "missed": ["apple?", "mango?"],
        "new": ["zebra?", "apple?", "mango?"],
        "": ["zebra?", "apple?", "mango?"],
    }.items():
        choose("show", value)
        assert page.run(SHOWN) == shown, value
    for value, shown in {
        "logProb": ["apple?", "mango?", "zebra?"],
        "f1": ["apple?", "zebra?", "mango?"],  # without an accepted answer: last
        "rank": ["zebra?", "apple?", "mango?"],
        "kl": ["apple?", "mango?", "zebra?"],
        "entropy": ["zebra?", "apple?", "mango?"],
    }.items():
        choose("sort", value)
        assert page.run(SHOWN) == shown, value
    choose("sort", "f1")
    page.run("one('#descending').click()")
    assert page.run("one('#descending').ariaPressed") == "true"
    assert page.run(SHOWN) == ["zebra?", "apple?", "mango?"]


def test_everything_is_reached_by_keys(page: Chromium) -> None:
    """Tab visits the controls in the order of the page; arrows move within lists and grids."""
    visited = []
    for _ in range(18):
        page.press("Tab")
        visited.append(page.run(f"{FOCUS}.id || {FOCUS}.localName"))
    controls = ["filter", "show", "sort", "descending", "open-all", "close-all"]
    assert visited[:4] == ["a", "theme", "svg", "svg"] and visited[4:10] == controls
    # the first question is open: its heat map and its checkpoints come before the next question
    assert visited[10:14] == ["summary", "td", "div", "summary"]

    page.run("all('summary')[0].focus()")
    page.press("ArrowDown")
    asked = f"one('.asked', {FOCUS}).textContent"
    assert page.run(asked) == "apple?"
    page.press("ArrowRight")
    assert page.run("all('.question')[1].open") is True
    page.press("ArrowLeft")
    assert page.run("all('.question')[1].open") is False
    page.press("End")
    assert page.run(asked) == "mango?"
    page.press("ArrowDown")
    assert page.run(asked) == "mango?"
    page.press("Home")
    page.press("Enter")
    assert page.run(asked) == "zebra?" and page.run("all('.question')[0].open") is False
    page.press("Enter")

    page.run("one('.heat td[tabindex=\"0\"]').focus()")
    read = "one('.question .readout').textContent"
    assert page.run(read) == "0.9000 at “one” for 1. title of a"
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert page.run(read) == "0.8000 at “ two” for 2. title of b"
    assert page.run("all('.heat')[0].querySelectorAll('td[tabindex=\"0\"]').length") == 1
    page.press("End")
    page.press("ArrowUp")
    page.press("ArrowUp")
    assert page.run(read) == "0.4000 at “</s>” for 1. title of a"

    page.run("one('svg').focus()")
    for key, text in {
        "ArrowRight": "step 0: training 1",
        "End": "step 40: training 0.02439",
        "ArrowLeft": "step 30: training 0.03226",
    }.items():
        page.press(key)
        assert page.run("one('.chart .readout').textContent") == text


def brightness(page: Chromium, element: str, colour: str) -> float:
    found = page.run(f"getComputedStyle(one('{element}')).{colour}")
    return sum(map(int, found.removeprefix("rgb(").removesuffix(")").split(","))) / (3 * 255)


def test_themes(page: Chromium) -> None:
    """The system's scheme, and the button's, which is kept."""

    def is_dark() -> bool:
        ground = brightness(page, "body", "backgroundColor")
        ink = brightness(page, "body", "color")
        assert abs(ground - ink) > 0.7
        return ground < 0.5

    assert not is_dark()
    page.prefer("dark")
    assert is_dark() and page.run("one('#theme').textContent") == "Theme: system"
    page.run("one('#theme').click()")
    assert not is_dark() and page.run("one('#theme').textContent") == "Theme: light"
    page.prefer("light")
    page.run("one('#theme').click()")
    assert is_dark()
    page.reload()
    assert is_dark()
    page.run("one('#theme').click()")
    assert not is_dark() and page.run("one('#theme').textContent") == "Theme: system"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_does_not_scroll_sideways(page: Chromium, width: int) -> None:
    """Tables scroll by themselves; bars and text keep within the width."""
    page.resize(width, mobile=True)
    page.run("all('details').forEach((each) => (each.open = true))")
    assert page.run("document.documentElement.scrollWidth") == width
    boxes = "all('.bar, .text, button, select, input, svg').map((e) => e.getBoundingClientRect())"
    assert page.run(f"Math.max(...{boxes}.map((box) => box.right))") <= width
    assert page.run(f"Math.min(...{boxes}.map((box) => box.width))") > 60


def test_the_page_is_read_without_its_script(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, render_page(READINGS, title="run", facts={}, log=LOG))
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(path)
        shown = "document.querySelector('.tools').checkVisibility()"
        assert browser.run(shown) is False
        assert browser.run("document.querySelectorAll('.passages li').length") == 6
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
