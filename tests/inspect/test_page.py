"""The page has the model's values, shows texts and never runs them, and needs no other file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.inspect import History, read_answers, read_log, render_page, write_page
from fastrag.inspect.charts import draw_charts
from tests import tiny
from tests.inspect.pages import Element, parse, passage, reading

LOG = [
    {"step": 0, "eval_recall@1": 0.25, "eval_em": 0.0, "eval_runtime": 3.0},
    {"step": 10, "loss": 2.0, "prior_entropy": 1.5, "unique_passages": 7, "kl": None},
    {"step": 20, "loss": 1.0, "prior_entropy": 1.0, "eval_recall@1": 0.75},
]


def shortened(generate: Callable[..., Any], answers: list[Any]) -> Callable[..., Any]:
    """Cut answers to one to four tokens, as the question says: the tiny model never ends one."""

    def cut(prompt_ids: torch.Tensor, **rest: Any) -> Any:
        answer = generate(prompt_ids=prompt_ids, **rest)
        answer.lengths = 1 + prompt_ids.sum(1) % 4
        answers.append(answer)
        return answer

    return cut


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_values_are_those_of_the_model(
    kind: tiny.Kind, marginal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the page are the fields of what `generate` returned, of each answer up to its end."""
    model = tiny.rag_model(kind, marginal=marginal, tau=0.3)
    generated: list[Any] = []
    monkeypatch.setattr(model, "generate", shortened(model.generate, generated))
    asked = tiny.questions(5)
    readings = read_answers(model, asked, batch_size=3, max_new_tokens=4, progress=False)
    assert model.training
    root = parse(render_page(readings, title="run", facts={}))
    answers = [(answer, i) for answer in generated for i in range(len(answer.lengths))]
    lengths = set()
    shown_questions = root.all("details", "question")
    for (answer, i), question, read, shown in zip(
        answers, asked, readings, shown_questions, strict=True
    ):
        n = int(answer.lengths[i])
        lengths.add(n)
        posterior = answer.log_posterior[i].exp()
        if marginal == "token":
            posterior = posterior[:, :n]
        means = posterior.mean(1) if marginal == "token" else posterior
        rows = answer.rows[i].tolist()
        assert shown.one("span", "asked").text == question.question
        ids = [each.text for each in shown.all("p", "id")]
        assert ids == [f"p{row}" for row in rows]
        assert read.right == tuple(f"p{row}" == question.positive for row in rows)
        assert read.answer.log_prob == float(answer.scores[i])
        bars = [[bar.share for bar in each.all("span", "bar")] for each in shown.all("li")]
        expected = torch.stack([answer.log_prior[i].exp(), means], 1)
        torch.testing.assert_close(torch.tensor(bars), expected, atol=2e-6, rtol=0)
        cells = [
            [cell.share for cell in row.all("td")]
            for table in shown.all("table", "heat")
            for row in table.one("tbody").all("tr")
        ]
        assert bool(cells) == (marginal == "token")
        if cells:
            torch.testing.assert_close(torch.tensor(cells), posterior, atol=2e-6, rtol=0)
            head = shown.one("table", "heat").one("thead").all("th")
            assert [each.text for each in head] == list(read.tokens) and len(head) == n
    assert len(lengths) > 1


def test_it_is_one_file_and_runs_its_own_script_alone() -> None:
    page = render_page(
        [reading("q", (passage("a", 0.9, (0.5, 0.7)),))], title="run", facts={}, log=LOG
    )
    root = parse(page)
    [script] = root.all("script")
    [policy] = [each for each in root.all("meta") if "http-equiv" in each.attributes]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy.attributes["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    for element in root.all("*"):
        assert not element.attributes.keys() & {"src", "srcset", "action", "background"}
        assert element.attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in element.attributes)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", page)
    ids = [each.attributes["id"] for each in root.all("*") if "id" in each.attributes]
    assert len(ids) == len(set(ids))


HOSTILE = st.text(
    st.one_of(
        st.sampled_from(list("<>&\"'/= \n`-!{}%#;é東\u202e")),
        st.characters(codec="utf-8", exclude_characters="\r\x00"),
    ),
    min_size=1,
) | st.sampled_from(
    [
        "<script>document.title = 'run'</script>",
        "</script></style></textarea><img src=x onerror=alert(1)>",
        '"><svg/onload=alert(1)>',
        "{{ 7 * 7 }}{% raw %}",
        "<!-- ]]> --!> <![CDATA[",
        "&lt;b&gt; &amp;amp;",
    ]
)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.lists(HOSTILE, min_size=9, max_size=9))
def test_texts_are_shown_and_never_run(texts: list[str]) -> None:
    title, asked, answer, accepted, token, id, name, text, other = texts
    shown = passage(id, 0.5, (0.25,), title=name, text=text)
    page = render_page(
        [reading("q", (shown,), question=asked, text=answer, tokens=(token,), f1=0.0)],
        title=title,
        facts={"Model": accepted},
        log=LOG,
        history=History((10,), ((((other, other), (id, name)),),)),
    )
    root = parse(page)
    assert root.one("h1").text == title and root.one("dd").text == accepted
    question = root.one("details")
    assert question.one("span", "asked").text == asked
    assert question.one("span", "answered").text == answer
    assert question.one("li").one("p").text == text
    assert question.one("p", "id").text == id
    assert question.one("li").one("h3").text == name
    assert question.one("table", "heat").one("thead").one("th").text == token
    traces = question.one("table", "trace").one("tbody").all("th")
    assert [each.one("span").text for each in traces][-1] == (name if other == id else other)
    assert len(root.all("script")) == len(root.all("style")) == 1
    assert not {"img", "iframe", "b"} & {each.tag for each in root.all("*")}


def test_missing_passages_and_answers_are_left_out() -> None:
    root = parse(render_page([reading("q", (), text="")], title="run", facts={}))
    question = root.one("details")
    assert question.one("span", "answered").text == "(empty answer)"
    assert "No passage was retrieved." in question.text
    assert not {"data-f1", "data-rank", "data-new"} & question.attributes.keys()
    values = {each.attributes["value"] for each in root.all("option")}
    assert values == {"", "order", "logProb", "entropy", "kl"}


def test_a_question_that_was_cut_says_so() -> None:
    model = tiny.rag_model(max_context=64)
    model.processor = tiny.processor(max_context=64, max_question=8)
    asked = [{"question": "ada " * 20}, {"question": "ada"}]
    readings = read_answers(model, asked, max_new_tokens=1, progress=False)
    root = parse(render_page(readings, title="run", facts={}))
    warnings = [[p.text for p in each.all("p", "warning")] for each in root.all("details")]
    cut = "question: cut to the encoder's 8 tokens; the rest took no part in the search"
    assert warnings == [[cut], []]


def test_values_to_sort_by() -> None:
    passages = (passage("a", 0.75, (0.5, 1.0)), passage("b", 0.25, (0.5, 0.0)))
    root = parse(render_page([reading("q", passages)], title="run", facts={}))
    data = root.one("details").attributes
    expected = {
        "data-entropy": 0.75 * torch.log(torch.tensor(4 / 3)) + 0.25 * torch.log(torch.tensor(4.0)),
        "data-kl": torch.log(torch.tensor([2 / 3, 2.0, 4 / 3, 4 / 3])).mean(),
    }
    for name, value in expected.items():
        assert float(data[name]) == pytest.approx(float(value), abs=1e-6), name


def test_ranks_by_checkpoint() -> None:
    """Passages of the model come first; a dash where a checkpoint did not retrieve one."""
    steps = (10, 20)
    a = ("a", "title of a")
    lists = ((("c", "see"), a), (a, ("d", "dee")))
    one = reading("q", (passage("a", 0.6), passage("b", 0.4)))
    root = parse(render_page([one], title="run", facts={}, history=History(steps, (lists,))))
    table = root.one("table", "trace")
    assert [each.text for each in table.one("thead").all("th")] == ["passage", "10", "20", "model"]
    rows = [
        [row.one("th").one("span").text, *(cell.text for cell in row.all("td"))]
        for row in table.one("tbody").all("tr")
    ]
    assert rows == [
        ["title of a", "2", "1", "1"],
        ["title of b", "–", "–", "2"],
        ["dee", "–", "2", "–"],
        ["see", "1", "–", "–"],
    ]
    assert root.one("details").attributes["data-new"] == "1"


def points(root: Element) -> dict[str, list[list[float]]]:
    """The points of each line, by the titles of its chart and its own."""
    found = {}
    for chart in root.all("figure", "chart"):
        title = str(chart.one("figcaption").children[0]).strip()
        for line in chart.all("polyline"):
            name = f"{title}: {line.attributes['data-label']}"
            found[name] = json.loads(line.attributes["data-points"])
    return found


def test_charts_hold_the_log() -> None:
    root = parse(render_page([reading("q", ())], title="run", facts={}, log=LOG))
    assert points(root) == {
        "Loss (nats per label token): training": [[10, 2.0], [20, 1.0]],
        "Recall: recall@1": [[0, 0.25], [20, 0.75]],
        "Answers: EM": [[0, 0.0]],
        "Entropy (nats): prior": [[10, 1.5], [20, 1.0]],
        "Unique passages: since the last line of the log": [[10, 7]],
    }
    label = root.one("svg").attributes["aria-label"]
    assert "training: 2 at step 10, 1 at step 20." in label


@given(
    st.lists(
        st.tuples(st.integers(0, 10**9), st.floats(-1e299, 1e299)),
        min_size=1,
    )
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_charts_stay_in_their_frame(values: list[tuple[int, float]]) -> None:
    """Larger values are drawn higher, later steps further right, ticks at round values."""
    [chart] = draw_charts([{"step": step, "loss": value} for step, value in values])
    [line] = chart.lines
    for (step, value), (x, y) in zip(line.points, line.drawn, strict=True):
        assert 48 <= x <= 350 and 8 <= y <= 186
        for (other_step, other), (other_x, other_y) in zip(line.points, line.drawn, strict=True):
            assert (x <= other_x) or step > other_step
            assert (y >= other_y) or value > other
    assert 2 <= len(chart.y_ticks) <= 8 and len(chart.x_ticks) <= 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "loss": 1.0}\nnonsense\n', ":2: expected a JSON object with a step"),
        ('{"step": 1}\n[1]\n', ":2: expected a JSON object with a step"),
        ('{"step": "1"}\n', ":1: expected a JSON object with a step"),
        ('{"step": 1, "loss": "low"}\n', ":1: loss: expected a number, got 'low'"),
        ('{"step": 1, "eval_recall@5": NaN}\n', ":1: eval_recall@5: expected a number, got nan"),
        ('{"step": 1, "kl": 1e999}\n', ":1: kl: expected a number, got inf"),
        ('{"step": 1' + 400 * "0" + "}\n", ":1: expected a JSON object with a step"),
        (10**5 * "[" + "\n", ":1: expected a JSON object with a step"),
        (b"\xff\xfe", "expected UTF-8"),
    ],
    ids=["no JSON", "a list", "step is text", "text", "NaN", "inf", "huge", "nested", "bytes"],
)
def test_a_damaged_log_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_log(path)
    assert str(raised.value).startswith(str(path))


def test_a_log_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1, "loss": 2.0, "note": "x"}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 2.0, "note": "x"}]


def test_rejects_bad_input(tmp_path: Path) -> None:
    one = reading("q", ())
    with pytest.raises(ValueError, match="readings: expected at least one"):
        render_page([], title="", facts={})
    with pytest.raises(ValueError, match="history: expected one of 1 questions, got 0"):
        render_page([one], title="", facts={}, history=History((), ()))
    for path in ("page.txt", "no/page.html"):
        with pytest.raises(ValueError, match="path: expected a "):
            write_page(tmp_path / path, "")
    write_page(tmp_path / "page.html", "a\ud800")
    assert (tmp_path / "page.html").read_text() == "a?"
