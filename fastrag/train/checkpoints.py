"""Checkpoint folders that are whole or do not count.

    checkpoint-120/
      unfinished            while it is written; removed last of all
      model.safetensors     trained parameters and buffers of encoders, generator, temperature
      frozen.json           names, shapes and a fingerprint of the parameters that do not train
      index.json            version and checksum of the index, and how it is kept
      index/                the index itself, if training changes it
      refresher.pt          state of the IndexRefresher
      optimizer.pt scheduler.pt scaler.pt rng_state.pth trainer_state.json    as transformers writes
      manifest.json         size and SHA-256 of every file; written last, checked before a resume

transformers writes its files one by one under the final name. So `begin` puts the mark `unfinished`
into an empty folder of that name and sets an older one aside (`fastrag/folders.py`), and `finish`
takes the mark away when every file is on the disk. A folder with the mark does not count as a
checkpoint: if the process is killed while it saves, the next start deletes that folder and brings
the older one back. Parameters that do not train are not copied. A resumed run loads them from the
folders that the first run used, and the fingerprint tells when they differ.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import struct
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - nothing is unpickled with it
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from fastrag import folders, manifests
from fastrag.index import FlatIndex
from fastrag.index.storage import MANIFEST
from fastrag.manifests import (
    integer,
    items,
    number,
    one_of,
    optional,
    record,
    relative_path,
    sha256,
    table,
    text,
)
from fastrag.messages import reason

if TYPE_CHECKING:
    from fastrag.freshness import IndexRefresher
    from fastrag.nn import RagModel
    from fastrag.nn.retriever import Retriever

WEIGHTS = "model.safetensors"
QUESTION_ENCODER = "retriever.question_encoder."  # what its parameters' names begin with
INDEX_REFERENCE = "retriever._extra_state"  # INDEX holds the index's version and checksum
FROZEN = "frozen.json"
INDEX = "index.json"
INDEX_FOLDER = "index"
REFRESHER = "refresher.pt"
UNFINISHED = "unfinished"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
RANDOM_STATE = "rng_state*.pth"
FORMAT = "fastrag.Checkpoint"
VERSION = 1
# Evaluating a checkpoint reads these files; resuming reads all.
MODEL_FILES = (WEIGHTS, FROZEN, INDEX, f"{INDEX_FOLDER}/*")
_MANIFEST_FIELDS = record(
    {
        "format": one_of(FORMAT),
        "version": integer(VERSION, VERSION),
        "files": table(record({"bytes": integer(), "sha256": sha256()}), relative_path()),
    }
)
_STATE_FIELDS = record(
    {
        "global_step": integer(),
        "epoch": optional(number(0)),
        "max_steps": integer(),
        "num_train_epochs": integer(),
        "best_global_step": optional(integer()),
        "best_model_checkpoint": optional(text()),
        "log_history": items(record({})),
        "stateful_callbacks": record({}),
    }
)
# Files of these kinds would be loaded if the manifest did not list them.
_TENSORS = (".pt", ".pth", ".bin", ".safetensors")
_FROZEN_FIELDS = table(record({"shape": items(integer()), "sha256": sha256()}))
_INDEX_FIELDS = record(
    {"version": integer(), "kept": one_of("whole", "reference")},
    {"n_passages": integer(), "checksum": text()},
)
_TORCH_FILES = {
    OPTIMIZER: "the optimiser state of this configuration",
    SCHEDULER: "the optimiser state of this configuration",
    SCALER: "the loss scaler of this configuration",
    RANDOM_STATE: "the random state of a run on these devices",
}
# torch.load (restricted to tensors and plain values) and transformers raise these for bytes that
# they did not write.
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, UnpicklingError, struct.error),
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError),
)
_NAME = re.compile(r"checkpoint-(\d+)$")
_SAMPLE = 4096


def checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """List the complete checkpoints of a run, oldest first.

    Args:
        run_dir: the run folder; it need not exist.

    Returns:
        Folders `checkpoint-<step>` that hold a trainer state and are finished, by step.

    Example:
        >>> checkpoints("no/such/run")
        []
    """
    root = Path(run_dir)
    if not root.is_dir():
        return []
    found = [
        (int(match.group(1)), path)
        for path in root.iterdir()
        if (match := _NAME.match(path.name)) and is_checkpoint(path)
    ]
    return [path for _, path in sorted(found)]


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint that was finished."""
    return (folder / STATE).is_file() and not (folder / UNFINISHED).exists()


def begin(folder: Path) -> None:
    """Make the empty folder of a checkpoint, which does not count until `finish`.

    Args:
        folder: `checkpoint-<step>`; a checkpoint of that name is set aside.
    """
    _withdraw(folder)
    staging = folders.begin(folder, shared=True)
    (staging / UNFINISHED).touch()
    folders.commit(staging, folder, keep_old=True)


def finish(folder: Path) -> None:
    """Complete a checkpoint, when all its files are written.

    Args:
        folder: what `begin` made. From now on it counts, and the one set aside is deleted.
    """
    write_manifest(folder)
    folders.flush_tree(folder)
    (folder / UNFINISHED).unlink()
    folders.flush_folder(folder)
    folders.step("finished", folder)
    folders.discard_old(folder)


def _withdraw(folder: Path) -> None:
    """Delete an unfinished checkpoint and bring back the one that it was to replace."""
    if (folder / UNFINISHED).exists():
        spare = folders.staging_path(folder)  # first the name: deleting may be killed half way
        folder.rename(spare)
        shutil.rmtree(spare, ignore_errors=True)
    folders.recover(folder)


def require_no_checkpoints(run_dir: str | os.PathLike[str]) -> None:
    """Refuse to start a run where another one left checkpoints.

    They count by their steps: rotation would delete the new run's for the older run's later ones,
    and a resume would take those.

    Args:
        run_dir: the run folder.

    Raises:
        ValueError: it holds checkpoints.
    """
    if checkpoints(run_dir):
        raise ValueError(
            f"output_dir: expected a new run folder, {run_dir} holds checkpoints; "
            "resume that run or choose another folder"
        )


def require_training_state(folder: Path, processes: int = 1) -> None:
    """Refuse a checkpoint without what a resumed run needs besides weights and index.

    transformers would start with a fresh optimiser, schedule and random state, and say nothing.

    Args:
        folder: the checkpoint.
        processes: how many processes train; with another number a step has other questions.

    Raises:
        ValueError: a file is missing, which is named, or another number of processes wrote it.
    """
    for name in (OPTIMIZER, SCHEDULER, RANDOM_STATE):
        if not any(folder.glob(name)):  # with several ranks, a random state for each
            raise ValueError(
                f"{folder / name}: expected the state to go on with, got no such file (a run with "
                "training.save_only_model goes on without)"
            )
    written = len([*folder.glob(RANDOM_STATE)])  # one by each process
    if written != processes:
        raise ValueError(
            f"{folder}: expected the checkpoint of a run with as many processes, {processes}, got "
            f"one of {written}"
        )


def write_manifest(folder: Path) -> None:
    """Write the size and checksum of every file, when all of them are there.

    The index is listed by its own manifest, which has the checksums of its files.

    Args:
        folder: the checkpoint, in which nothing is written after this.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for name, path in _files(folder).items()
    }
    body = {"format": FORMAT, "version": VERSION, "files": files}
    manifests.write(folder / MANIFEST, manifests.sealed(body))
    folders.step("manifest", folder)


def check_files(folder: Path, only: Sequence[str] = ("*",)) -> None:
    """Refuse a checkpoint with a file that is not as it was written.

    Every byte is read. A checkpoint without a manifest is accepted with a warning, if its files can
    be read at all.

    Args:
        folder: the checkpoint.
        only: patterns of the files that matter.

    Raises:
        ValueError: the checkpoint was not finished; or a file is missing, truncated or altered, or
            a file of tensors is not one that the run wrote; it is named.
    """
    path = folder / MANIFEST
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder}: expected a whole checkpoint, got one whose save was interrupted"
        )
    if not path.exists():
        warnings.warn(
            f"{folder}: this checkpoint has no {MANIFEST}, so altered files cannot be told; "
            "checkpoints that are saved now have one",
            stacklevel=2,
        )
        for name, expected in _TORCH_FILES.items():
            for file in folder.glob(name):
                if any(fnmatch(name, each) for each in only):
                    read_torch(file, expected)
        return
    manifest = manifests.read(path, _MANIFEST_FIELDS)
    listed = manifests.unsealed(path, manifest)["files"]
    found = _files(folder)
    matters = [name for name in sorted(listed | found) if any(fnmatch(name, each) for each in only)]
    for name in matters:
        entry, file = listed.get(name), folder / name
        if entry is None:
            if file.suffix in _TENSORS:
                raise ValueError(f"{file}: expected only files that {MANIFEST} lists")
            continue
        if name not in found:
            raise ValueError(f"{file}: expected {entry['bytes']} bytes, got no such file")
        n_bytes = file.stat().st_size
        if n_bytes != entry["bytes"]:
            raise ValueError(f"{file}: expected {entry['bytes']} bytes, got {n_bytes}")
        if (altered := _sha256(file)) != entry["sha256"]:
            raise ValueError(f"{file}: expected SHA-256 {entry['sha256']}, got {altered}")


def check_state(folder: Path) -> None:
    """Refuse a checkpoint whose trainer state transformers could not go on from.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: the state cannot be read, or a value is of another type.
    """
    path = folder / STATE
    # not read as a manifest: the losses that it logs may be NaN
    try:
        state = TrainerState.load_from_json(str(path))
    except _UNREADABLE as error:
        raise ValueError(f"{path}: expected the state of a trainer: {reason(error)}") from error
    manifests.verify(path, vars(state), _STATE_FIELDS)


def read_torch(path: Path, expected: str) -> dict[str, Any]:
    """Read a file of tensors and plain values.

    Args:
        path: the file.
        expected: what it should be, for the error message.

    Raises:
        ValueError: it is missing, damaged, or something else; it is named.
    """
    try:
        with safe_globals():  # numpy's, of a random state
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: expected {expected}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected {expected}: got a {type(state).__name__}")
    return state


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a checkpoint by name, without its manifest and those of the index."""
    own = folder / INDEX_FOLDER
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file()
        and path not in (folder / MANIFEST, folder / UNFINISHED)
        and (own not in path.parents or path == own / MANIFEST)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(run_dir: str | os.PathLike[str]) -> None:
    """Delete what a killed process left half written, and bring back a checkpoint set aside.

    Args:
        run_dir: the run folder, in which no other process is writing.
    """
    for path in Path(run_dir).glob("checkpoint-*"):
        _withdraw(path)
    folders.clean(Path(run_dir), "checkpoint-*")


def rotate(run_dir: str | os.PathLike[str], keep: int | None, protect: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest nor the protected one.

    Args:
        run_dir: the run folder.
        keep: how many to keep; None or 0 keeps all.
        protect: a checkpoint that stays, usually the best.
    """
    if not keep:
        return
    found = checkpoints(run_dir)
    stays = {found[-1]} if found else set()
    if protect is not None:
        stays.add(Path(run_dir) / Path(protect).name)
    spare = len(found) - max(keep, len(stays))
    for path in [each for each in found if each not in stays][: max(spare, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def write_weights(
    model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write the trained parameters and all persistent buffers, and a fingerprint of the rest.

    Args:
        model: the model.
        folder: where `model.safetensors` and `frozen.json` go.
        state_dict: the gathered state, when the model itself holds only a shard.
    """
    frozen = _frozen(model)
    state = model.state_dict() if state_dict is None else state_dict
    trained = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in state.items()
        if name not in frozen and name != INDEX_REFERENCE
    }
    save_file(trained, str(folder / WEIGHTS), metadata={"format": "pt"})
    manifests.write(folder / FROZEN, frozen)


def check_weights(model: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint that `write_weights` wrote of a model of another configuration.

    Args:
        model: the model.
        folder: the checkpoint.

    Raises:
        ValueError: a parameter is missing, has another shape, or is one that does not train and has
            other values; or the file is damaged.
        OSError: a file cannot be read.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118, it is no mapping
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
    frozen = _frozen(model)
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in frozen and name != INDEX_REFERENCE
    }
    for name in sorted(wanted.keys() | stored.keys()):
        theirs, ours = stored.get(name), wanted.get(name)
        if theirs is None or theirs != ours:
            raise ValueError(
                f"{path}: checkpoint of another configuration: {name} expected "
                f"{_shape(ours)}, got {_shape(theirs)}"
            )
    before = manifests.read(folder / FROZEN, _FROZEN_FIELDS)
    for name in sorted(before.keys() | frozen.keys()):
        if before.get(name) != frozen.get(name):
            raise ValueError(
                f"{folder / FROZEN}: the parameter {name}, which does not train, has other values "
                "than in the run that wrote this checkpoint"
            )


def read_weights(model: nn.Module, folder: Path) -> None:
    """Load what `write_weights` wrote into a model of the same configuration.

    Args:
        model: the model; unchanged when the checkpoint does not fit it.
        folder: the checkpoint.

    Raises:
        ValueError: as `check_weights`.
        OSError: a file cannot be read.
    """
    check_weights(model, folder)
    model.load_state_dict(load_file(str(folder / WEIGHTS), device="cpu"), strict=False)


def forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    """Take the parameters that a checkpoint leaves out off the list of missing names.

    A hook for `Module.register_load_state_dict_post_hook`, so that transformers does not warn.

    Args:
        model: the model that a state was loaded into.
        incompatible: what `load_state_dict` is about to return.
    """
    left_out = {name for name, p in model.named_parameters() if not p.requires_grad}
    left_out.add(INDEX_REFERENCE)
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name not in left_out]


def read_encoder(encoder: nn.Module, folder: Path) -> None:
    """Load the question encoder of a checkpoint alone.

    Args:
        encoder: the encoder that the run started from; what did not train stays as it is.
        folder: the checkpoint.

    Raises:
        ValueError: the file is damaged, or holds other parameters than the encoder has.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = {
                name.removeprefix(QUESTION_ENCODER): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118, it is no mapping
                if name.startswith(QUESTION_ENCODER)
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
    ours = encoder.state_dict()
    for name, tensor in stored.items():
        if name not in ours or ours[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: checkpoint of another configuration: {QUESTION_ENCODER}{name} expected "
                f"{_shape(ours[name].shape if name in ours else None)}, got {_shape(tensor.shape)}"
            )
    kept = {*manifests.read(folder / FROZEN, _FROZEN_FIELDS)}
    loaded = {ours[name].data_ptr() for name in stored}  # a tied tensor is stored under one name
    for name, tensor in ours.items():
        if QUESTION_ENCODER + name not in kept and tensor.data_ptr() not in loaded:
            raise ValueError(
                f"{path}: checkpoint of another configuration: {QUESTION_ENCODER}{name} expected "
                f"{_shape(tensor.shape)}, got none"
            )
    encoder.load_state_dict(stored, strict=False)


def write_index(model: RagModel, folder: Path, *, changing: bool) -> None:
    """Write the index (when training changes it) or its checksum.

    Args:
        model: the model that owns the index.
        folder: the checkpoint.
        changing: whether training changes the index.
    """
    index = model.index
    entry: dict[str, Any] = {"version": int(index.version), "n_passages": len(index)}
    if changing:
        # a copy that shares the vectors: the folder is still to be renamed, and the index would
        # remember the path that it was saved to
        copy.copy(index).save(folder / INDEX_FOLDER)
        entry["kept"] = "whole"
    else:
        entry |= {"kept": "reference", "checksum": index.checksum()}
    manifests.write(folder / INDEX, entry)


def read_index(model: RagModel | Retriever, folder: Path) -> None:
    """Bring the model's index to the state in which the checkpoint was written.

    Args:
        model: the model that owns the index.
        folder: the checkpoint.

    Raises:
        ValueError: a file of the checkpoint's index is missing or altered, or a frozen index has
            other contents than when the checkpoint was written.
    """
    path = folder / INDEX
    entry = manifests.read(path, _INDEX_FIELDS)
    index = model.index
    if entry["kept"] == "whole":
        where: dict[str, Any] = {"device": index.device}
        if isinstance(index, FlatIndex):
            where["search_device"] = index.search_device
        model.index = type(index).load(folder / INDEX_FOLDER, mmap=False, verify=True, **where)
        return
    checksum = index.checksum()
    if checksum != entry.get("checksum"):
        raise ValueError(
            f"{path}: expected the index that the run started with, checksum "
            f"{entry.get('checksum')}, got {checksum}"
        )


def write_refresher(refresher: IndexRefresher, folder: Path) -> None:
    """Write the state of a refresher into a checkpoint."""
    torch.save(refresher.state_dict(), folder / REFRESHER)


def read_refresher(refresher: IndexRefresher, folder: Path) -> None:
    """Load what `write_refresher` wrote.

    Raises:
        ValueError: the file is missing or damaged, or the state of another policy.
    """
    path = folder / REFRESHER
    state = read_torch(path, "the state of an IndexRefresher")
    try:
        refresher.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _frozen(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name, shape and fingerprint of every parameter that does not train.

    The fingerprint hashes the first, middle and last values: whole weights of large models would
    take minutes, and other weights differ everywhere.
    """
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            middle = max(flat.numel() // 2 - _SAMPLE // 2, 0)
            pieces = (flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:])
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            result[name] = {"shape": list(parameter.shape), "sha256": digest.hexdigest()}
    return result


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else f"shape {tuple(shape)}"
