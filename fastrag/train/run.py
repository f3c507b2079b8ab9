"""A whole training run from a config, and the models that runs leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from fastrag.eval import EvalResult, Prediction
from fastrag.nn import RagModel
from fastrag.train.build import (
    INDEX_FOLDER,
    build_collator,
    build_model,
    load_index,
    load_questions,
)
from fastrag.train.checkpoints import STATE, checkpoints, read_index, read_weights
from fastrag.train.config import RagConfig
from fastrag.train.trainer import MODEL_FOLDER, RagTrainer

if TYPE_CHECKING:
    from fastrag.index import FlatIndex, PassageStore

CONFIG_FILE = "config.yaml"
MODEL_CONFIG = "rag_config.json"


def train_run(config: RagConfig, resume: bool | str = False) -> RagTrainer:
    """Train as a config says, evaluate before and after, and save the model.

    Args:
        config: the settings.
        resume: continue from the run folder's newest checkpoint, or from this checkpoint.

    Returns:
        The trainer; `last_evaluation` holds the final answers.

    Raises:
        ValueError: the run folder holds another run, there is nothing to resume, or a part or file
            is not as expected.
        TrainingInterrupted: a signal came; its checkpoint is on disk.
    """
    run = Path(config.output_dir)
    if resume:
        _check_resumable(config, run)
    elif checkpoints(run):
        raise ValueError(
            f"output_dir: expected a new run folder, {run} holds checkpoints; "
            "resume that run or choose another folder"
        )
    set_seed(config.seed)
    questions = load_questions(config.train_questions)
    eval_questions = load_questions(config.eval_questions) if config.eval_questions else None
    started = dataclasses.replace(config)
    if resume and config.index is None and (run / INDEX_FOLDER).is_dir():
        started.index = str(run / INDEX_FOLDER)  # built when the run began
    model = build_model(started)
    trainer = RagTrainer(model, config, build_collator(model, config), questions, eval_questions)
    if config.index_device == "auto":
        model.index.to(trainer.args.device)
        model.passages.to(trainer.args.device)
    if eval_questions is not None and not resume:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    if eval_questions is not None:
        trainer.evaluate()
        if trainer.last_evaluation is not None:
            write_predictions(run / "predictions.jsonl", trainer.last_evaluation)
    return trainer


def load_run(
    folder: str | os.PathLike[str], index: str | os.PathLike[str] | None = None
) -> RagModel:
    """Load a model from a model folder, a run folder, or a checkpoint of a run.

    Args:
        folder: what `save_pretrained` wrote, a run folder (its `model` is taken), or one of its
            checkpoints.
        index: a folder from `fastrag index build`; None takes the one that belongs to the model.

    Returns:
        The model, in eval mode on the CPU.

    Raises:
        ValueError: the folder is none of these, or no index is to be found.
    """
    path = Path(folder)
    if (path / STATE).is_file():
        return _load_checkpoint(path, index)
    if not (path / MODEL_CONFIG).is_file():
        if not (path / MODEL_FOLDER / MODEL_CONFIG).is_file():
            raise ValueError(
                f"model: expected a model, a run or a checkpoint, {path} has no {MODEL_CONFIG}"
            )
        path = path / MODEL_FOLDER
    vectors, passages = _index_of(path, index)
    return RagModel.from_pretrained(path, vectors, passages)


def write_predictions(path: str | os.PathLike[str], result: EvalResult) -> None:
    """Write one JSON object per question.

    Args:
        path: the file.
        result: what `evaluate` returned.
    """
    lines: Iterable[str] = (json.dumps(_plain(each)) + "\n" for each in result.predictions)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _check_resumable(config: RagConfig, run: Path) -> None:
    saved = run / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"output_dir: expected a run to resume, {saved} is missing")
    config.check_resumes(RagConfig.load(saved), str(saved))


def _load_checkpoint(path: Path, index: str | os.PathLike[str] | None) -> RagModel:
    saved = path.parent / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"model: expected the run's settings beside the checkpoint in {saved}")
    config = RagConfig.load(saved)
    if index is not None:
        config.index = os.fspath(index)
    elif config.index is None:
        config.index = str(path.parent / INDEX_FOLDER)
    model = build_model(config, progress=False)
    read_weights(model, path)
    if index is None:
        read_index(model, path)
    return model.eval()


def _index_of(
    path: Path, index: str | os.PathLike[str] | None
) -> tuple[FlatIndex | None, PassageStore | None]:
    if index is not None:
        return load_index(index)
    if (path / INDEX_FOLDER).is_dir():
        return None, None  # part of the model folder
    saved = path.parent / CONFIG_FILE
    if saved.is_file() and (known := RagConfig.load(saved).index) is not None:
        return load_index(known)
    raise ValueError(f"index: expected a folder from `fastrag index build`, {path} holds none")


def _plain(prediction: Prediction) -> dict[str, Any]:
    values = dataclasses.asdict(prediction)
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
    }
