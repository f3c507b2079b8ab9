"""Models that runs leave behind, read back without the machinery of training."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.data.processor import shortest
from fastrag.data.tokenization import QuestionBatch
from fastrag.eval import DenseRetriever, EvalResult, RetrievalResult
from fastrag.folders import replacing
from fastrag.messages import shown
from fastrag.nn import RagModel, checkpoint
from fastrag.nn.checkpoint import CONFIG as MODEL_CONFIG
from fastrag.nn.retriever import Retriever
from fastrag.train.build import INDEX_FOLDER, build_model, load_index
from fastrag.train.checkpoints import (
    MODEL_FILES,
    STATE,
    check_files,
    read_encoder,
    read_index,
    read_weights,
)
from fastrag.train.config import RagConfig
from fastrag.train.parts import load_encoder, load_tokenizer
from fastrag.train.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from fastrag.index import Index, PassageStore

MODEL_FOLDER = "model"


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
    path = _model_folder(folder)
    if (path / STATE).is_file():
        return _load_checkpoint(path, index)
    vectors, passages = _index_of(path, index)
    return RagModel.from_pretrained(path, vectors, passages)


def load_retriever(
    folder: str | os.PathLike[str], index: str | os.PathLike[str] | None = None
) -> DenseRetriever:
    """Load the retriever of what `load_run` loads, without its generator.

    Args:
        folder: a model folder, a run folder, or a checkpoint of a run.
        index: a folder from `fastrag index build`; None takes the one that belongs to the model.

    Returns:
        The retriever, in eval mode on the CPU.

    Raises:
        ValueError: as `load_run`.
    """
    path = _model_folder(folder)
    if (path / STATE).is_file():
        config = _config_of(path, index)
        known = config.retriever
        dense = _from_parts(known.question_encoder, str(known.index), config.data.max_question)
        read_encoder(dense.retriever.question_encoder, path)
        if index is None:
            read_index(dense.retriever, path)
        return dense
    vectors, passages = _index_of(path, index)
    retriever, processor = checkpoint.load_retriever(path, vectors, passages)
    return DenseRetriever(retriever, processor.question_batch)


def open_retriever(
    encoder: str | os.PathLike[str], index: str | os.PathLike[str]
) -> DenseRetriever:
    """Make a retriever of an encoder and an index.

    Args:
        encoder: the folder of the question encoder.
        index: a folder from `fastrag index build`.

    Returns:
        The retriever, in eval mode on the CPU.

    Raises:
        ValueError: a folder cannot be read, or the index was built with another tokenizer or width.
    """
    return _from_parts(encoder, index)


def _from_parts(
    encoder: str | os.PathLike[str],
    index: str | os.PathLike[str],
    max_question: int | None = None,
) -> DenseRetriever:
    name = "question_encoder"
    question_encoder = load_encoder(encoder, name, "query")
    tokenizer = load_tokenizer(encoder, name)
    vectors, passages = load_index(index)
    passages.check_tokenizer("encoder", tokenizer)
    retriever = Retriever(question_encoder, None, vectors, passages).eval()
    length = shortest(max_question, question_encoder.max_length)
    return DenseRetriever(retriever, QuestionBatch(tokenizer, question_encoder.prefix, length))


def _model_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the checkpoint or the saved model that a folder stands for."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            "model: expected a model, a run or a checkpoint, there is no folder "
            f"{shown(str(folder))}"
        )
    if (path / STATE).is_file() or (path / MODEL_CONFIG).is_file():
        return path
    if not (path / MODEL_FOLDER / MODEL_CONFIG).is_file():
        raise ValueError(
            f"model: expected a model, a run or a checkpoint, {path} has no {MODEL_CONFIG}"
        )
    return path / MODEL_FOLDER


def write_predictions(path: str | os.PathLike[str], result: EvalResult | RetrievalResult) -> None:
    """Write one JSON object per question.

    Args:
        path: the file.
        result: what `evaluate` or `evaluate_retrieval` returned.
    """
    rows: Sequence[Any] = result.predictions if isinstance(result, EvalResult) else result.rankings
    lines: Iterable[str] = (json.dumps(_plain(each)) + "\n" for each in rows)
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _config_of(path: Path, index: str | os.PathLike[str] | None) -> RagConfig:
    """Return the settings of a checkpoint's run, with the index to load."""
    saved = path.parent / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"model: expected the run's settings beside the checkpoint in {saved}")
    check_files(path, MODEL_FILES)
    config = RagConfig.load(saved)
    if index is not None:
        config.retriever.index = os.fspath(index)
    elif config.retriever.index is None:
        config.retriever.index = str(path.parent / INDEX_FOLDER)
    return config


def _load_checkpoint(path: Path, index: str | os.PathLike[str] | None) -> RagModel:
    config = _config_of(path, index)
    model = build_model(config, progress=False, resume=True)
    read_weights(model, path)
    if index is None:
        read_index(model, path)
    return model.eval()


def _index_of(
    path: Path, index: str | os.PathLike[str] | None
) -> tuple[Index | None, PassageStore | None]:
    if index is not None:
        return load_index(index)
    if (path / INDEX_FOLDER).is_dir():
        return None, None  # part of the model folder
    saved = path.parent / CONFIG_FILE
    if saved.is_file() and (known := RagConfig.load(saved).retriever.index) is not None:
        return load_index(known)
    raise ValueError(f"index: expected a folder from `fastrag index build`, {path} holds none")


def _plain(prediction: Any) -> dict[str, Any]:
    values = dataclasses.asdict(prediction)
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
    }
