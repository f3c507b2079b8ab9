"""`fastrag evaluate` and `fastrag ask`, on a run, its model and its checkpoints."""

from __future__ import annotations

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
    assert answer["passage"]["id"] == predictions[4]["passage_id"]
    assert answer["passage"]["text"].startswith("likes ")
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
    assert main([*command, "--limit", "2", "--marginal", "sequence"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "decoding: RAG-Sequence"
    with pytest.raises(SystemExit, match="^2$"):
        main([*command, "--marginal", "both"])
    assert "choose from" in capsys.readouterr().err


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
