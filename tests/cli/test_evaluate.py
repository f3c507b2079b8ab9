"""`fastrag evaluate` and `fastrag ask`, on a run, its model and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrag.cli import main
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
