"""`fastrag train`: what a run leaves behind, and how it is cut short and goes on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastrag.cli import main
from fastrag.train.callbacks import read_metrics
from fastrag.train.checkpoints import checkpoints
from fastrag.train.models import load_run
from tests import tiny
from tests.cli.commands import ENVIRONMENT, ROOT, SETTINGS, fastrag, torchrun
from tests.settings import nested, options

NO_EVALUATION = {"training.eval_strategy": "no", "training.eval_steps": "null"}


def test_training_leaves_a_run_folder(project: Path) -> None:
    names = {path.name for path in (project / "run").iterdir()}
    assert names == {
        "checkpoint-3",
        "checkpoint-6",
        "config.yaml",
        "curve.png",
        "metrics.jsonl",
        "model",
        "predictions.jsonl",
        "tensorboard",
        "versions.json",
    }
    entries = read_metrics(project / "run" / "metrics.jsonl")
    assert [each["step"] for each in entries if "loss" in each] == [1, 2, 3, 4, 5, 6]
    assert [each["step"] for each in entries if "eval_em" in each] == [3, 6, 6]
    assert [each["step"] for each in entries if "eval_recall@1" in each] == [0, 3, 6, 6]
    resolved = yaml.safe_load((project / "run" / "config.yaml").read_text())
    assert resolved["retriever"]["n_docs"] == 3 and resolved["loss"]["marginal"] == "token"
    assert len((project / "run" / "predictions.jsonl").read_text().splitlines()) == 12


def test_print_config_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed can be trained from, and has the option in place of the file's value."""
    monkeypatch.chdir(tmp_path)
    settings = {"retriever.question_encoder": "e", "reader.generator": "g", "retriever.tau": 2}
    Path("c.yaml").write_text(yaml.safe_dump(nested(settings)))
    words = ["train", "--training.learning_rate", "1e-4", "c.yaml", "--print_config"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["training"]["learning_rate"], values["retriever"]["tau"]) == (1e-4, 2)
    Path("c.yaml").write_text(printed)
    assert main(["train", "c.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert {each.name for each in tmp_path.iterdir()} == {"c.yaml"}


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_resume(project: Path) -> None:
    to = ["--training.output_dir", "cut", "--training.max_steps"]
    command = ["train", "train.yaml", *to, "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrag.cli", *command],
        cwd=project,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not checkpoints(project / "cut"):  # step 3 is done
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = checkpoints(project / "cut")[-1]
    step = int(last.name.split("-")[1])
    assert err.splitlines()[-2:] == [
        f"fastrag: interrupted by SIGINT after step {step}; resume from cut/{last.name}",
        "fastrag: resume with: fastrag train train.yaml --training.output_dir cut "
        "--training.max_steps 100000 --resume",
    ]
    assert "Traceback" not in err
    resumed = fastrag(project, "train", "train.yaml", *to, str(step + 2), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    entries = read_metrics(project / "cut" / "metrics.jsonl")
    logged = [each["step"] for each in entries if "loss" in each]
    assert logged == list(range(1, step + 3))


def test_training_with_an_index_that_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No prebuilt index, a passage encoder that trains, LoRA on the generator, resumed."""
    monkeypatch.chdir(project)
    settings = SETTINGS | {
        "retriever.index": None,
        "retriever.train_passage_encoder": True,
        "reader.lora.rank": 2,
        "data.corpus": "corpus.jsonl",
        "data.eval_questions": None,
        "refresh.policy": "every:2",
        "training.output_dir": "joint",
        "training.max_steps": 3,
        **NO_EVALUATION,
    }
    (project / "joint.yaml").write_text(yaml.safe_dump(nested(settings)))
    assert main(["train", "joint.yaml"]) == 0
    assert main(["train", "joint.yaml", "--resume", "--training.max_steps=5"]) == 0
    entries = read_metrics(project / "joint" / "metrics.jsonl")
    assert [each["step"] for each in entries if "loss" in each] == [1, 2, 3, 4, 5]
    capsys.readouterr()
    assert main(["ask", "--model", "joint", "ada"]) == 0
    assert "likes " in capsys.readouterr().out


def test_the_model_is_the_best_one_and_the_curve_that_of_the_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    drawn: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(
        "fastrag.train.plots.plot_curve", lambda entries, path: drawn.append(entries)
    )
    # of equal values the first is the best one: with every passage retrieved they all are
    best = {
        "retriever.n_docs": 12,
        "evaluation.ks": [12],
        "training.load_best_model_at_end": "true",
        "training.metric_for_best_model": "recall@12",
        "training.output_dir": "best",
    }
    assert main(["train", "train.yaml", *options(best)]) == 0
    out = capsys.readouterr().out
    assert "step 0  recall@12 1.000\n" in out  # before training, when there is no bar yet
    assert "model: best/model (of step 3, the best by recall@12)" in out
    entries = read_metrics(project / "best" / "metrics.jsonl")
    by_step = {each["step"]: each["eval_loss"] for each in entries if "eval_loss" in each}
    assert by_step.keys() == {3, 6}
    assert entries[-1]["eval_best_loss"] == pytest.approx(by_step[3])
    assert entries[-1]["eval_best_loss"] != pytest.approx(by_step[6])
    without = ("--training.eval_strategy=no", "--training.eval_steps=null")
    assert main(["train", "train.yaml", *without, "--training.output_dir=last"]) == 0
    entries = read_metrics(project / "last" / "metrics.jsonl")
    assert [each["step"] for each in entries if "eval_em" in each] == [6]
    assert drawn[-1] == entries  # with the evaluation after training


def test_index_of_another_encoder_is_noticed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    other = tiny.encoder(seed=5)
    other.save_pretrained("other")
    tiny.tokenizer("encoder").save_pretrained("other")
    settings = {"retriever.question_encoder": "other", "training.max_steps": 1}
    settings |= {"data.eval_questions": "null"} | NO_EVALUATION
    command = ["train", "train.yaml", *options(settings)]
    assert main([*command, "--training.output_dir=foreign"]) == 0
    assert (
        "index: its vectors are not those of the passage encoder other" in capsys.readouterr().err
    )
    again = ("--training.output_dir=known", "--retriever.passage_encoder=encoder")
    assert main([*command, *again]) == 0
    assert "its vectors" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_of_the_guide_for_several_processes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, half of the batch each, are one process with the whole batch."""
    monkeypatch.chdir(project)
    parts = {key: value for key, value in SETTINGS.items() if key != "training.use_cpu"}
    for name, size in (("one", 4), ("two", 2)):
        settings = parts | {"training.output_dir": name, "training.learning_rate": 1e-2}
        settings |= {"training.per_device_train_batch_size": size}
        (project / f"{name}.yaml").write_text(yaml.safe_dump(nested(settings)))
    assert main(["train", "one.yaml"]) == 0
    guide = (ROOT / "docs" / "guide.md").read_text()
    command = re.search(r"^torchrun --standalone --nproc-per-node 2 (.*) config.yaml$", guide, re.M)
    assert command
    done = torchrun(project, *command[1].split(), "two.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3  loss") == 1 and done.stdout.count("model: two/model") == 1
    one, two = (read_metrics(project / name / "metrics.jsonl") for name in ("one", "two"))
    assert [each["step"] for each in two] == [each["step"] for each in one]
    same = {"loss", "eval_loss", "grad_norm", "prior_entropy", "kl", "unique_passages"}
    for mine, theirs in zip(one, two, strict=True):
        for key in same & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (key, mine["step"])
    models = (load_run(project / name) for name in ("one", "two"))
    weights, expected = ([*each.parameters()] for each in models)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)
    assert len((project / "two" / "predictions.jsonl").read_text().splitlines()) == 12
