"""The files of a checkpoint: what RagTrainer adds to those of transformers, and checks of all.

Parameters that do not train are not copied into a checkpoint. A resumed run loads them from the
folders that the first run used, and a fingerprint tells whether they differ.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - nothing is unpickled with it
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from fastrag import manifests
from fastrag.freshness.maps import VectorMap
from fastrag.index import FlatIndex, Index
from fastrag.index.flat_changes import load_changes, save_changes
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
from fastrag.train.checkpoints import (
    FORMAT,
    INDEX_FOLDER,
    STATE,
    UNFINISHED,
    VERSION,
    file_sha256,
    is_checkpoint,
    listed_files,
)
from fastrag.train.optimizer import check_fits

if TYPE_CHECKING:
    from fastrag.freshness import IndexRefresher
    from fastrag.nn import RagModel
    from fastrag.nn.retriever import Retriever

WEIGHTS = "model.safetensors"
FROZEN = "frozen.json"
INDEX = "index.json"
INDEX_MAP = "index_map.safetensors"  # through which the index is searched, see VectorMap
REFRESHER = "refresher.pt"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
RANDOM_STATE = "rng_state*.pth"
QUESTION_ENCODER = "retriever.question_encoder."  # prefix of the names of its parameters
INDEX_REFERENCE = "retriever._extra_state"  # not in WEIGHTS, because INDEX says the same
# Evaluating a checkpoint reads these files; resuming reads all.
MODEL_FILES = (WEIGHTS, FROZEN, INDEX, INDEX_MAP, f"{INDEX_FOLDER}/*")
# A file of one of these kinds would be loaded even if the manifest did not list it.
_TENSORS = (".pt", ".pth", ".bin", ".safetensors")
_TORCH_FILES = {
    OPTIMIZER: "the optimiser state of this configuration",
    SCHEDULER: "the optimiser state of this configuration",
    SCALER: "the loss scaler of this configuration",
    RANDOM_STATE: "the random state of a run on these devices",
}
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
_FROZEN_FIELDS = table(record({"shape": items(integer()), "sha256": sha256()}))
_INDEX_FIELDS = record(
    {"version": integer(), "kept": one_of("whole", "changes", "reference")},
    {"n_passages": integer(), "checksum": text()},
)
# torch.load (restricted to tensors and plain values) and transformers raise these for bytes that
# they did not write.
_UNREADABLE = (
    *(OSError, RuntimeError, EOFError, UnpicklingError, struct.error),
    *(ValueError, TypeError, AttributeError, LookupError, OverflowError),
)
_SAMPLE = 4096  # values of a parameter in each piece of its fingerprint


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
    found = listed_files(folder)
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
        if (altered := file_sha256(file)) != entry["sha256"]:
            raise ValueError(f"{file}: expected SHA-256 {entry['sha256']}, got {altered}")


def require_training_state(folder: Path, processes: int = 1) -> None:
    """Refuse a checkpoint without the state of optimiser, schedule or random numbers.

    transformers would start with a fresh one and say nothing.

    Args:
        folder: the checkpoint.
        processes: how many processes train; with another number a step has other questions.

    Raises:
        ValueError: a file is missing, which is named, or another number of processes wrote it.
    """
    for name in (OPTIMIZER, SCHEDULER, RANDOM_STATE):
        if not any(folder.glob(name)):
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


def check_training_state(folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a checkpoint whose states of trainer and optimiser transformers cannot load.

    Args:
        folder: the checkpoint.
        optimizer: the optimiser of the run; None if its state is not loaded.

    Raises:
        ValueError: a state cannot be read, or belongs to other parameters; its file is named.
    """
    path = folder / STATE
    # not read as a manifest, because the losses that it logs may be NaN
    try:
        state = TrainerState.load_from_json(str(path))
    except _UNREADABLE as error:
        raise ValueError(f"{path}: expected the state of a trainer: {reason(error)}") from error
    manifests.verify(path, vars(state), _STATE_FIELDS)
    if optimizer is not None:
        path = folder / OPTIMIZER
        try:
            check_fits(optimizer, read_torch(path, _TORCH_FILES[OPTIMIZER]))
        except _UNREADABLE as error:
            raise ValueError(f"{path}: {reason(error)}") from error


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
            # mapped, because the memory may not hold an optimiser state twice
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: expected {expected}: {reason(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected {expected}: got a {type(state).__name__}")
    return state


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
        ValueError: a parameter is missing, has another shape, or does not train and has other
            values; or the file is damaged.
        OSError: a file cannot be read.
    """
    stored = _read_stored(folder)
    frozen = _frozen(model)
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in frozen and name != INDEX_REFERENCE
    }
    for name in sorted(wanted.keys() | stored.keys()):
        _check_shape(folder, name, wanted.get(name), stored.get(name))
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
    model.load_state_dict(_read_stored(folder), strict=False)


def read_encoder(encoder: nn.Module, folder: Path) -> None:
    """Load the question encoder of a checkpoint alone.

    Args:
        encoder: the encoder that the run started from; parameters that did not train keep their
            values.
        folder: the checkpoint.

    Raises:
        ValueError: the file is damaged, or holds other parameters than the encoder has.
    """
    stored = {
        name.removeprefix(QUESTION_ENCODER): tensor
        for name, tensor in _read_stored(folder).items()
        if name.startswith(QUESTION_ENCODER)
    }
    ours = encoder.state_dict()
    kept = {*manifests.read(folder / FROZEN, _FROZEN_FIELDS)}
    # a tied tensor is stored under one of its names
    tied = {ours[name].data_ptr() for name in stored if name in ours}
    for name in sorted(ours.keys() | stored.keys()):
        whole = f"{QUESTION_ENCODER}{name}"
        if name in stored or (whole not in kept and ours[name].data_ptr() not in tied):
            _check_shape(folder, whole, ours.get(name), stored.get(name))
    encoder.load_state_dict(stored, strict=False)


def _read_stored(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error


def _check_shape(folder: Path, name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    expected, got = (
        "none" if each is None else f"shape {tuple(each.shape)}" for each in (ours, theirs)
    )
    if expected != got:
        raise ValueError(
            f"{folder / WEIGHTS}: checkpoint of another configuration: {name} expected {expected}, "
            f"got {got}"
        )


def _frozen(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return shape and fingerprint of every parameter that does not train, by name.

    The fingerprint hashes the first, middle and last values. Hashing all weights of a large model
    would take minutes, and weights of another model differ everywhere.
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


def forgive_frozen(model: nn.Module, incompatible: Any) -> None:
    """Remove the parameters that a checkpoint leaves out from the list of missing names.

    A hook for `Module.register_load_state_dict_post_hook`, so that transformers does not warn.

    Args:
        model: the model that a state was loaded into.
        incompatible: the result that `load_state_dict` is about to return.
    """
    left_out = {name for name, p in model.named_parameters() if not p.requires_grad}
    left_out.add(INDEX_REFERENCE)
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name not in left_out]


def track_index(model: RagModel) -> None:
    """Have checkpoints hold only the rows that differ from the folder of the present index.

    Another checkpoint may be deleted before, so its index does not serve.

    Args:
        model: the model that owns the index.
    """
    index = model.index
    source = index.source
    if isinstance(index, FlatIndex) and source and not is_checkpoint(source.parent):
        index.track_changes()


def write_index(model: RagModel, folder: Path, *, changing: bool) -> None:
    """Write the index if training changes it, or else its checksum.

    If the run started with an index from a folder, only the rows that differ from it are written,
    as long as they are few.

    Args:
        model: the model that owns the index.
        folder: the checkpoint.
        changing: whether training changes the index.
    """
    index = model.index
    entry: dict[str, Any] = {"version": int(index.version), "n_passages": len(index)}
    vector_map = model.retriever.vector_map
    if changing:
        target = folder / INDEX_FOLDER
        if isinstance(index, FlatIndex) and save_changes(index, target):
            entry["kept"] = "changes"
        else:
            index.save_copy(target)
            entry["kept"] = "whole"
        if vector_map is not None:
            save_file(vector_map.state_dict(), str(folder / INDEX_MAP))
    else:
        entry |= {"kept": "reference", "checksum": index.checksum()}
    manifests.write(folder / INDEX, entry)


def read_index(model: RagModel | Retriever, folder: Path) -> None:
    """Bring the model's index to the state in which the checkpoint was written.

    Args:
        model: the model that owns the index.
        folder: the checkpoint.

    Raises:
        ValueError: a file of the checkpoint's index is missing or altered, or a frozen index, or
            the one that the changes belong to, has other contents than when the run started.
    """
    path = folder / INDEX
    entry = manifests.read(path, _INDEX_FIELDS)
    index = model.index
    if entry["kept"] != "reference":
        where: dict[str, Any] = {"device": index.device}
        if isinstance(index, FlatIndex):
            where["search_device"] = index.search_device
        vector_map = _read_map(folder / INDEX_MAP)
        stored = folder / INDEX_FOLDER
        if entry["kept"] == "changes":
            loaded: Index = load_changes(stored, **where)
        else:
            loaded = type(index).load(stored, mmap=False, verify=True, **where)
        with manifests.named(stored):  # of another width, for example
            model.index = loaded
        getattr(model, "retriever", model).vector_map = vector_map
        return
    checksum = index.checksum()
    if checksum != entry.get("checksum"):
        raise ValueError(
            f"{path}: expected the index that the run started with, checksum "
            f"{entry.get('checksum')}, got {checksum}"
        )


def _read_map(path: Path) -> VectorMap | None:
    if not path.exists():
        return None
    try:
        return VectorMap(**load_file(path, device="cpu"))
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a map of vectors: {error}") from error


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
