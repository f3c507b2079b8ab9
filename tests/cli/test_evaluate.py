"""`fastrag evaluate` and `fastrag ask`, on a run, its model and its checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastrag.cli import main
from fastrag.generation import DECODERS
from fastrag.train.callbacks import read_metrics
from tests import tiny
from tests.cli.commands import fastrag


def test_evaluate_and_ask_find_the_model_and_its_index(project: Path) -> None:
    done = fastrag(
        project,
        *("evaluate", "--model", "run", "--questions", "questions.jsonl", "--device", "cpu"),
        *("--k", "1", "12", "--max-new-tokens", "3", "--out", "predictions.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["recall@12"] == ["1.000", "1.000", "–", "1.000"]
    final = [e for e in read_metrics(project / "run" / "metrics.jsonl") if "eval_em" in e][-1]
    assert float(rows["loss"][0]) == pytest.approx(final["eval_loss"], abs=1e-3)
    predictions = [json.loads(each) for each in (project / "predictions.jsonl").open()]
    asked = fastrag(
        project,
        *("ask", "--model", "run/model", "--json", "--device", "cpu", "--max-new-tokens", "3"),
        tiny.questions()[4].question,
    )
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["answer"] == predictions[4]["prediction"]
    [support] = [each["document"] for each in answer["citations"] if each["supports"]]
    assert support["id"] == predictions[4]["passage_id"]
    assert support["text"].startswith("likes ")
    assert 0.0 < answer["probability"] <= 1.0


def test_evaluate_decodes_as_asked(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the word that is given, or else by the marginal of the model, which the output names."""
    monkeypatch.chdir(project)
    decoded: list[str] = []
    for word, decoder in DECODERS.items():

        def spy(search: Any, word: str = word, decoder: Any = decoder) -> Any:
            decoded.append(word)
            return decoder(search)

        monkeypatch.setitem(DECODERS, word, spy)
    command = ["evaluate", "--model", "run", "--questions", "questions.jsonl", "--device", "cpu"]
    for given, used in ((None, "token"), ("token", "token"), ("sequence", "sequence")):
        words = command + (["--marginal", given] if given else [])
        assert main([*words, "--max-new-tokens", "3", "--limit", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["marginal"] == used
        assert set(decoded) == {used}
        decoded.clear()
    assert main([*command, "--limit", "2", "--marginal", "sequence", "--n-docs", "7"]) == 0
    assert "decoding: RAG-Sequence, K = 7" in capsys.readouterr().out.splitlines()
    assert main([*command, "--marginal", "token", "both"]) == 2
    assert "--marginal: expected some of ['token', " in capsys.readouterr().err


def test_a_table_of_models_retrievers_and_decodings(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the paper's form, as Markdown, CSV and JSON with the same figures."""
    monkeypatch.chdir(project)
    files = [f"table.{suffix}" for suffix in ("md", "csv", "json", "jsonl")]
    command = ["evaluate", "--questions", "questions.jsonl", "--device", "cpu", "--limit", "6"]
    command += ["--k", "1", "3", "--max-new-tokens", "3"]
    models = ["--model", "frozen=run/checkpoint-3", "trained=run"]
    words = ["--marginal", "token", "sequence", "--retriever", "bm25", "model"]
    assert main([*command, *models, *words, "--out", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 1 + 8 + 1
    assert lines[0].split()[-5:] == ["em", "f1", "cover_em", "recall@3", "nll"]
    expected = [
        (model, retriever, decoding)
        for model in ("frozen", "trained")
        for retriever in ("bm25", "model")
        for decoding in ("token", "sequence")
    ]
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert [(r["model"], r["retriever"], r["marginal"]) for r in rows] == expected
    table = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    markdown = Path("table.md").read_text().splitlines()
    head = [cell.strip() for cell in markdown[2].strip("|").split("|")]
    assert head == ["Model", "Retriever", "Decoding", "EM", "F1", "cover-EM", "NLL/token"]
    for line, row, cells, printed in zip(markdown[4:12], rows, table, lines[1:], strict=False):
        labels = [row["model"], row["retriever"], row["marginal"]]
        assert printed.split()[:3] == labels
        for name, value in row["metrics"].items():
            assert float(cells[name]) == value
            if name in row["intervals"]:
                low, high = row["intervals"][name]
                assert [float(cells[f"{name}_{end}"]) for end in ("low", "high")] == [low, high]
                assert low <= value <= high or name == "ece"
        assert line.split("|")[5].strip().startswith(f"{row['metrics']['f1']:.3f} (")
        if row["retriever"] == "bm25":
            assert row["metrics"]["recall@1"] == 1.0
    pairs = ["frozen, bm25", "frozen, model", "trained, bm25", "trained, model"]
    assert markdown[13] == f"| Model, retriever | {' | '.join(pairs)} |"  # not of each decoding
    recall = next(line for line in markdown if line.startswith("| gold-recall@3 |")).split("|")
    for cell, row in zip(recall[2:], rows[::2], strict=False):
        assert cell.strip().startswith(f"{row['metrics']['gold-recall@3']:.3f} (")
    assert [line[9:-1] for line in markdown if line.startswith("Prior of")] == pairs
    predictions = [json.loads(line) for line in Path("table.jsonl").read_text().splitlines()]
    assert len(predictions) == 8 * 6 and predictions[-1]["model"] == "trained"
    # one row alone has the same figures, and its seed is the same
    assert main([*command, "--model", "trained=run", *words[3:], "--json"]) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = (
        {name: row[name] for name in ("model", "retriever", "marginal", "n_docs")} for row in rows
    )
    assert alone == [
        found | row["metrics"]
        for found, row in zip(labels, rows, strict=True)
        if row["model"] == "trained" and row["marginal"] == "token"
    ]


def test_published_questions_are_named_by_their_form(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    Path("bamboogle.csv").write_text("Question,Answer\nada,red\nbob,blue\n")
    command = ["evaluate", "--model", "run", "--device", "cpu", "--retrieval-only", "--json"]
    assert main([*command, "--questions", "bamboogle:bamboogle.csv"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["BM25"]["answer-recall@1"] == 1.0 and found["model"]["n_questions"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "a=run", "a=plain"), "--model: expected distinct names, got 'a' twice"),
        (("--model", "=run"), "--model: expected a folder or name=folder, got '=run'"),
        (("--model", "run", "--out", "a.md", "b.txt"), "--out: expected a name ending in ['.md', "),
        (("--model", "run", "--out", "none/a.md"), "--out: expected a file in an existing folder"),
        (("--model", "run", "--retrieval-only", "--out", "a.md"), "--out: expected a .jsonl file"),
        (("--model", "run", "plain", "--retrieval-only"), "--model: expected one with --retriev"),
        (("--model", "run", "--retrieval-only", "--n-docs", "2"), "--n-docs: expected no --retri"),
        (
            ("--model", "run", "--retrieval-only", "--retriever", "bm25"),
            "--retriever: expected no --retrieval-only, which generates no answers",
        ),
    ],
)
def test_mistakes_in_evaluate(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(project)
    assert main(["evaluate", "--questions", "questions.jsonl", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_checkpoint_of_a_run_answers(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    answers = []
    for model in ("run", "run/checkpoint-6", "run/checkpoint-3"):
        code = main(["ask", "--model", model, "--json", "--max-new-tokens", "3", "ada"])
        assert code == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]  # the last step's weights
    assert answers[0]["probability"] != answers[2]["probability"]


@pytest.mark.parametrize("model", ["run", "run/model", "run/checkpoint-6"])
def test_retrieval_alone_loads_no_generator(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    from fastrag.nn import checkpoint
    from fastrag.train import models

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a generator was loaded")

    monkeypatch.setattr(checkpoint, "_load_generator", refuse)
    monkeypatch.setattr(models, "load_generator", refuse)
    monkeypatch.chdir(project)
    files = ("--questions", "questions.jsonl", "--out", "rankings.jsonl", "--device", "cpu")
    command = ["evaluate", "--retrieval-only", "--model", model, *files, "--k", "1", "12"]
    assert main([*command, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["model"]["gold-recall@12"] == measured["BM25"]["gold-recall@12"] == 1.0
    final = [e for e in read_metrics(Path("run/metrics.jsonl")) if "eval_em" in e][-1]
    assert measured["model"]["gold-recall@1"] == pytest.approx(final["eval_recall@1"])
    rankings = [json.loads(each) for each in Path("rankings.jsonl").read_text().splitlines()]
    assert all(
        each["retrieved"][each["gold_hits"][0]] == each["id"].replace("q", "p") for each in rankings
    )
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "metric",
        "model",
        "95",
        "%",
        "interval",
        "BM25",
        "95",
        "%",
        "interval",
    ]
    assert max(map(len, lines)) <= 80


def test_retrieval_of_an_encoder_and_an_index(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    command = ["evaluate", "--questions", "questions.jsonl", "--device", "cpu", "--json"]
    parts = ["--encoder", "encoder", "--index", "idx"]
    assert main([*command, *parts, "--retrieval-only"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["gold-recall@20"] == 1.0
    for wrong in (parts, [*parts[:2], "--retrieval-only"]):
        assert main([*command, *wrong]) == 2
        assert "--encoder: expected --retrieval-only and --index" in capsys.readouterr().err
    assert main(command) == 2
    assert "--model: expected a model folder" in capsys.readouterr().err
