"""Models that runs leave behind, read back without the machinery of training."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.eval import EvalResult, Prediction
from fastrag.messages import shown
from fastrag.nn import RagModel
from fastrag.nn.checkpoint import CONFIG as MODEL_CONFIG
from fastrag.train.build import INDEX_FOLDER, build_model, load_index
from fastrag.train.checkpoints import (
    MODEL_FILES,
    STATE,
    check_files,
    read_index,
    read_weights,
)
from fastrag.train.config import RagConfig
from fastrag.train.files import replacing

if TYPE_CHECKING:
    from fastrag.index import Index, PassageStore

CONFIG_FILE = "config.yaml"
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
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            "model: expected a model, a run or a checkpoint, there is no folder "
            f"{shown(str(folder))}"
        )
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
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _load_checkpoint(path: Path, index: str | os.PathLike[str] | None) -> RagModel:
    saved = path.parent / CONFIG_FILE
    if not saved.is_file():
        raise ValueError(f"model: expected the run's settings beside the checkpoint in {saved}")
    check_files(path, MODEL_FILES)
    config = RagConfig.load(saved)
    if index is not None:
        config.index = os.fspath(index)
    elif config.index is None:
        config.index = str(path.parent / INDEX_FOLDER)
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
    if saved.is_file() and (known := RagConfig.load(saved).index) is not None:
        return load_index(known)
    raise ValueError(f"index: expected a folder from `fastrag index build`, {path} holds none")


def _plain(prediction: Prediction) -> dict[str, Any]:
    values = dataclasses.asdict(prediction)
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
    }
