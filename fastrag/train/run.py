"""A whole training run from a config: train, evaluate, save."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TrainingArguments

from fastrag import folders
from fastrag.data import Question
from fastrag.data.default import load_questions
from fastrag.eval.batches import choose_fixed
from fastrag.eval.report import write_records
from fastrag.index import FlatIndex
from fastrag.index.storage import check_replaceable
from fastrag.messages import shown
from fastrag.nn import RagModel, checkpoint
from fastrag.nn.card import write_card
from fastrag.train.checkpoints import require_no_checkpoints
from fastrag.train.config import RagConfig
from fastrag.train.models import build_collator, build_model
from fastrag.train.record import CONFIG_FILE, MODEL_FOLDER, write_record
from fastrag.train.trainer import RagTrainer


def train_run(config: RagConfig, resume: bool | str = False) -> RagTrainer:
    """Train as a config says, evaluate before and after, and save the model.

    Settings and versions are written into the run folder once all parts have been read, before
    anything that takes long.

    Args:
        config: the settings.
        resume: continue from the run folder's newest checkpoint, or from this checkpoint.

    Returns:
        The trainer; `last_evaluation` holds the final answers.

    Raises:
        ValueError: the run folder holds another run, finished or not, another process trains in it,
            there is nothing to resume, or a part or file is not as expected.
        TrainingInterrupted: a signal came; its checkpoint is on disk.
    """
    run = Path(config.training.output_dir)
    if resume:
        _check_resumable(config, run)
    else:
        _check_new(run)
    arguments = config.training_arguments()  # its mistakes come before what takes long
    with folders.locked(run) if arguments.process_index == 0 else nullcontext():
        return _train(config, resume, arguments)


def _train(config: RagConfig, resume: bool | str, arguments: TrainingArguments) -> RagTrainer:
    run = Path(config.training.output_dir)
    asked = config.data.eval_questions
    questions = load_questions(config.data.train_questions)
    eval_questions = load_questions(asked) if asked else None
    if eval_questions is not None:
        _check_measured(config, eval_questions)
    writes = not resume and arguments.process_index == 0
    model = build_model(
        config,
        resume=bool(resume),
        on_loaded=(lambda: write_record(run, config)) if writes else None,
    )
    model.retriever.move_index = config.retriever.index_device == "auto"
    trainer = RagTrainer(model, config, build_collator(model, config), questions, eval_questions)
    if config.retriever.index_device == "stream":
        _stream(model, trainer.args.device)
    if eval_questions is not None and not resume:
        if config.evaluation.at_start == "full":
            trainer.evaluate()
        elif config.evaluation.at_start == "retrieval":
            trainer.evaluate_retrieval()
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    if eval_questions is not None:
        # the curve shows the evaluation only if these are the weights of the last step
        prefix = "eval_best" if trainer.state.best_model_checkpoint else "eval"
        trainer.evaluate(metric_key_prefix=prefix)
        if trainer.last_evaluation is not None and trainer.is_world_process_zero():
            write_records(run / "predictions.jsonl", trainer.last_evaluation.predictions)
            write_card(run / MODEL_FOLDER, trainer.model_card())
    return trainer


def _check_measured(config: RagConfig, questions: list[Question]) -> None:
    # transformers would miss the metric at the first evaluation, which may be hours later
    metric = config.best_metric
    if metric is None:
        return
    recall = metric.startswith("recall@")
    for each in choose_fixed(questions, config.evaluation.limit):
        if each.answers or (recall and each.positive_ids):
            return
    needed = "answers or positive passages" if recall else "answers"
    raise ValueError(
        f"training.metric_for_best_model: expected questions with {needed} in "
        f"{config.data.eval_questions} to measure {shown(metric)} on, got none"
    )


def _stream(model: RagModel, device: torch.device) -> None:
    """Search on `device` an index that stays in host memory."""
    if not isinstance(model.index, FlatIndex):
        raise ValueError(
            "retriever.index_device: expected 'auto' or 'cpu' with an index of kind "
            f"{type(model.index).__name__}, got 'stream'"
        )
    model.index.to("cpu", search_device=device)


def _check_new(run: Path) -> None:
    require_no_checkpoints(run)
    if (run / MODEL_FOLDER).exists():
        raise ValueError(
            f"output_dir: expected a new run folder, {run} holds the model of a finished run; "
            "choose another folder"
        )


def _check_resumable(config: RagConfig, run: Path) -> None:
    saved = run / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"output_dir: expected a run to resume, {saved} is missing")
    config.check_resumes(RagConfig.load(saved), str(saved))
    # the model of a finished run is replaced at the end
    check_replaceable(run / MODEL_FOLDER, checkpoint.FORMAT, holds=checkpoint.HOLDS)
