"""Where a run keeps its index and searches it; what is checked before it, and written after it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from fastrag import folders
from fastrag.cli import main
from fastrag.index import FlatIndex
from fastrag.train import RagConfig, RagTrainer, TrainingInterrupted, checkpoint_contents, run
from fastrag.train.callbacks import read_metrics
from fastrag.train.models import load_retriever, load_run
from fastrag.train.pretrained import load_tokenizer
from tests import tiny
from tests.settings import rag_config

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("index_device", "moves", "streamed"),
    [("auto", True, []), ("cpu", False, []), ("stream", False, [("cpu", torch.device("cpu"))])],
)
def test_index_goes_where_the_config_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index_device: str,
    moves: bool,
    streamed: list[Any],
) -> None:
    """`auto` leaves the move to the module, which takes its index along."""
    model, said = tiny.rag_model(), []

    def to(self: FlatIndex, device: Any, *, search_device: Any = None) -> None:
        said.append((device, search_device))

    def construct(self: RagTrainer, *arguments: Any) -> None:
        assert model.retriever.move_index == moves
        self.args = SimpleNamespace(device=torch.device("cpu"))

    def train(self: RagTrainer, **settings: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(FlatIndex, "to", to)
    monkeypatch.setattr(run, "load_questions", lambda source: tiny.questions(2))
    monkeypatch.setattr(run, "build_model", lambda config, **how: model)
    monkeypatch.setattr(RagTrainer, "__init__", construct)
    monkeypatch.setattr(RagTrainer, "train", train)
    settings = {"retriever.index_device": index_device, "training.output_dir": str(tmp_path)}
    with pytest.raises(InterruptedError):
        run.train_run(rag_config(settings))
    assert said == streamed


def test_only_a_flat_index_is_streamed() -> None:
    model: Any = SimpleNamespace(index=object())
    with pytest.raises(ValueError, match=r"index_device: expected 'auto' or 'cpu' .* got 'stream'"):
        run._stream(model, GPU)


def test_a_resumed_index_is_searched_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loaded = tiny.rag_model(), {}
    checkpoint_contents.write_index(model, tmp_path, changing=True)
    index, load = model.index, FlatIndex.load

    def spy(dir: Path, *, search_device: Any = None, **kwargs: Any) -> FlatIndex:
        loaded.update(kwargs, search_device=search_device)
        return load(dir, **kwargs)

    monkeypatch.setattr(FlatIndex, "load", spy)
    monkeypatch.setattr(FlatIndex, "search_device", GPU)
    checkpoint_contents.read_index(model, tmp_path)
    assert model.index is not index
    assert loaded["search_device"] == GPU and loaded["device"] == torch.device("cpu")


@pytest.mark.parametrize("first", [True, False])
def test_one_process_writes_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    asked: Any = tiny.questions(2)
    monkeypatch.setattr(run, "load_questions", lambda source: asked)
    monkeypatch.setattr(run, "build_model", lambda config, **how: tiny.rag_model())
    monkeypatch.setattr(RagTrainer, "train", lambda self, **kwargs: None)
    monkeypatch.setattr(RagTrainer, "is_world_process_zero", lambda self: first)
    settings = {"data.eval_questions": "some", "evaluation.max_new_tokens": 1}
    settings |= {"training.use_cpu": True, "training.output_dir": str(tmp_path)}
    card = tmp_path / "model" / "README.md"
    monkeypatch.setattr(RagTrainer, "save_model", lambda self: card.parent.mkdir())
    run.train_run(rag_config(settings))
    assert (tmp_path / "predictions.jsonl").is_file() == card.is_file() == first
    if first:  # the last evaluation, which comes after the model is saved
        assert re.search(r"^\| em \| [\d.]+ \|$", card.read_text(), flags=re.MULTILINE)
        assert "| training questions | default:train |" in card.read_text()


def test_one_process_prints_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rag_config().save(tmp_path / "train.yaml")
    other = SimpleNamespace(is_world_process_zero=lambda: False)
    monkeypatch.setattr(run, "train_run", lambda config, resume: other)
    assert main(["train", str(tmp_path / "train.yaml")]) == 0
    assert capsys.readouterr().out == ""


def test_several_processes_are_told_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rag_config().save(tmp_path / "train.yaml")

    def interrupted(config: RagConfig, resume: bool) -> None:
        raise TrainingInterrupted(2, 8, "run/checkpoint-8")

    monkeypatch.setattr(run, "train_run", interrupted)
    for processes, command in (
        ("1", "fastrag train"),
        ("2", "torchrun --standalone --nproc-per-node 2 -m fastrag.cli train"),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert main(["train", str(tmp_path / "train.yaml")]) == 130
        assert f"resume with: {command} {tmp_path}/train.yaml --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "record", "message"),
    [
        ("em", '{"question": "ada", "positive": "p0"}', "questions with answers in .* 'em' on"),
        ("recall@1", '{"question": "ada"}', "questions with answers or positive passages in"),
        ("recall@1", '{"question": "ada", "positive": "p0"}', "expected a model folder"),
    ],
)
def test_the_best_metric_can_be_measured(
    tmp_path: Path, metric: str, record: str, message: str
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(record + "\n")
    training = {
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
    }
    config = rag_config({"data.eval_questions": str(asked), "training": training})
    with pytest.raises(ValueError, match=message):
        run.train_run(config)


def test_questions_are_cut_at_the_positions_of_the_encoder(tmp_path: Path) -> None:
    """Neither the tiny tokenizer nor the processor has a limit; the encoder has 64 positions."""
    model = tiny.rag_model()
    assert model.processor.question_batch.max_question is None
    model.save_pretrained(tmp_path, include_index=True)
    assert load_run(tmp_path).processor.question_batch.max_question == 64
    assert load_retriever(tmp_path).question_batch.max_question == 64


def test_saved_encoders_are_parts_of_another_run(tmp_path: Path) -> None:
    """transformers makes a tokenizer without words if only the config of an encoder is there."""
    model = tiny.rag_model()
    model.save_pretrained(tmp_path)
    words = model.processor.question_tokenizer.get_vocab()
    folder = tmp_path / "passage_encoder"
    assert load_tokenizer(folder, "passage_encoder").get_vocab() == words
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="^passage_encoder: expected a tokenizer in .*no vocab"):
        load_tokenizer(folder, "passage_encoder")


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^model: expected .*/missing': there is no such folder$"):
        load_run(tmp_path / "missing")


@pytest.mark.parametrize(
    ("word", "measured"), [("retrieval", {"recall"}), ("full", {"recall", "em"}), ("none", set())]
)
def test_settings_and_versions_come_before_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, measured: set[str]
) -> None:
    monkeypatch.setattr(run, "load_questions", lambda source: tiny.questions(4))
    evaluation = {"at_start": word, "max_new_tokens": 1}
    training = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 1}
    sections = {"evaluation": evaluation, "training": training | {"report_to": []}}
    config = rag_config({"data.eval_questions": "some"} | sections)
    seen: list[set[str]] = []

    def build(config: RagConfig, *, resume: bool, on_loaded: Callable[[], None]) -> Any:
        assert os.listdir(tmp_path / "run") == ["lock"]  # both go if a part cannot be read
        on_loaded()
        seen.append({each.name for each in (tmp_path / "run").iterdir()})
        return tiny.rag_model()

    monkeypatch.setattr(run, "build_model", build)
    monkeypatch.setattr(run, "build_collator", lambda model, config: tiny.collator())
    run.train_run(config)
    assert seen == [{"config.yaml", "versions.json", "lock"}]
    entries = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if e["step"] == 0]
    names = {name.removeprefix("eval_").partition("@")[0] for entry in entries for name in entry}
    assert names & {"recall", "em"} == measured


def test_two_trainers_in_one_run_folder(tmp_path: Path) -> None:
    """The second is refused before it reads or writes anything, with the holder's process."""
    config = rag_config({"training.output_dir": str(tmp_path)})
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = RagTrainer(tiny.rag_model(), arguments, tiny.collator(), tiny.questions())
    message = re.escape(f"{tmp_path}: expected a folder that no other process is writing, got one")
    with folders.locked(tmp_path), ThreadPoolExecutor(1) as other:
        for train in (lambda: run.train_run(config), trainer.train):
            with pytest.raises(ValueError, match=f"{message} that process {os.getpid()} on "):
                other.submit(train).result()
        assert os.listdir(tmp_path) == ["lock"]
