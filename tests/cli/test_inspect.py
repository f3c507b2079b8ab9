"""`fastrag inspect` on a run, its model and its checkpoints, and on folders that are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastrag.cli import main
from fastrag.data import read_questions
from fastrag.train import load_run
from fastrag.train.callbacks import read_metrics
from tests.inspect.pages import Element, parse

ASKED = ("--questions", "questions.jsonl", "--device", "cpu", "--max-new-tokens", "3")


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def page_of(*arguments: str, out: Path) -> Element:
    assert main(["inspect", *ASKED, *arguments, "--out", str(out)]) == 0
    return parse(out.read_text())


def test_page_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    root = page_of("--model", "run", "--limit", "4", out=out)
    assert capsys.readouterr().out == f"{out}: 4 of 12 questions\n"
    questions = root.all("details", "question")
    asked = list(read_questions("questions.jsonl"))[::3]
    assert [each.one("span", "asked").text for each in questions] == [q.question for q in asked]
    assert root.one("h1").text == "run"

    # the charts are those of the run
    drawn = {
        line.attributes["data-label"]: json.loads(line.attributes["data-points"])
        for line in root.all("polyline")
    }
    log = read_metrics("run/metrics.jsonl")
    for label, name in {"training": "loss", "recall@5": "eval_recall@5", "KL": "kl"}.items():
        assert drawn[label] == [[e["step"], e[name]] for e in log if name in e], name

    # the ranks are those of each checkpoint and of the model
    models = [load_run(f"run/{name}") for name in ("checkpoint-3", "checkpoint-6", "model")]
    for question, shown in zip(asked, questions, strict=True):
        table = shown.one("table", "trace")
        assert [each.text for each in table.one("thead").all("th")][1:] == ["3", "6", "model"]
        for column, model in enumerate(models):
            batch = model.processor.collate([{"question": question.question}])
            rows = model.retrieve(batch["input_ids"], batch["attention_mask"]).rows[0].tolist()
            ranked = {
                row.all("td")[column].text: row.one("th").one("span").text
                for row in table.one("tbody").all("tr")
            }
            titles = [model.passages.title(row) for row in rows]
            assert [ranked[str(rank)] for rank in (1, 2, 3)] == titles


def test_page_of_a_model_alone(folder: Path, tmp_path: Path) -> None:
    """Without the run there are no charts and no checkpoints, nor with --no-checkpoints."""
    for arguments in (("--model", "run/model"), ("--model", "run", "--no-checkpoints")):
        root = page_of(*arguments, "--limit", "2", out=tmp_path / "page.html")
        assert len(root.all("details", "question")) == 2
        assert not root.all("table", "trace")
        assert bool(root.all("figure")) == (arguments[1] == "run")


def damage(run: Path, what: str) -> None:
    if what == "log":
        with (run / "metrics.jsonl").open("a") as file:
            file.write("nonsense\n")
    elif what == "checkpoint":
        (run / "checkpoint-3" / "model.safetensors").write_bytes(b"torn")
    elif what == "weights":
        path = run / "model" / "generator" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "settings":
        (run / "model" / "rag_config.json").write_text("{")
    else:
        (run / "model" / "rag_config.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("log", "metrics.jsonl:"),
        ("checkpoint", "checkpoint-3"),
        ("weights", "expected a readable generator"),
        ("settings", "rag_config.json"),
        ("model", "rag_config.json"),
    ],
)
def test_a_damaged_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree("run", run)
    damage(run, what)
    out = tmp_path / "page.html"
    assert main(["inspect", "--model", str(run), *ASKED, "--limit", "1", "--out", str(out)]) == 2
    refuses(capsys, message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("questions", "out", "message"),
    [
        ("", "page.html", "expected at least one question, got none"),
        ('{"question": " "}\n', "page.html", "questions.jsonl:1: "),
        ('{"question": "ada"}\n', "page.pdf", "--out: expected a name ending in .html"),
        ('{"question": "ada"}\n', "no/page.html", "--out: expected a file in an existing folder"),
    ],
    ids=["no question", "empty question", "another suffix", "no folder"],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    questions: str,
    out: str,
    message: str,
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(questions)
    arguments = ["inspect", "--model", "run", "--questions", str(path), "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / out)]) == 2
    refuses(capsys, message)


def refuses(capsys: pytest.CaptureFixture[str], message: str) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastrag")]
    assert len(errors) == 1 and errors[0].startswith("fastrag: error: ")
    assert message in errors[0]
