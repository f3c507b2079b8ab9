"""Checkpoint folders of a run, which are whole or do not count.

    checkpoint-120/
      unfinished            while the checkpoint is written; removed last of all
      model.safetensors     trained parameters and buffers of encoders, generator, temperature
      frozen.json           names, shapes and a fingerprint of the parameters that do not train
      index.json            version of the index, and its checksum unless the index is stored here
      index/                the index itself if training changes it, or the rows that have changed
      refresher.pt          state of the IndexRefresher
      index_map.safetensors the map through which the index is searched, if a policy fits one
      optimizer.pt scheduler.pt scaler.pt rng_state.pth trainer_state.json    as transformers writes
      manifest.json         size and SHA-256 of every file; written last, checked before a resume

transformers writes its files one by one under their final names. `begin` therefore puts the mark
`unfinished` into an empty folder and sets an older checkpoint of that name aside
(`fastrag/folders.py`), and `finish` removes the mark when every file is on the disk. A folder with
the mark is not a checkpoint: if the process is killed while it saves, the next start deletes that
folder and brings the older one back.

`fastrag/train/checkpoint_contents.py` writes, checks and reads the files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from fastrag import folders, manifests
from fastrag.index.storage import MANIFEST

UNFINISHED = "unfinished"
STATE = "trainer_state.json"
INDEX_FOLDER = "index"
FORMAT = "fastrag.Checkpoint"
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)$")


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
    withdraw(folder)
    staging = folders.begin(folder, shared=True)
    (staging / UNFINISHED).touch()
    folders.commit(staging, folder, keep_old=True)


def finish(folder: Path) -> None:
    """Complete a checkpoint whose files are all written.

    Args:
        folder: the folder that `begin` made. From now on it counts, and the older one is deleted.
    """
    write_manifest(folder)
    folders.flush_tree(folder)
    (folder / UNFINISHED).unlink()
    folders.flush_folder(folder)
    folders.step("finished", folder)
    folders.discard_old(folder)


def write_manifest(folder: Path) -> None:
    """Write the size and checksum of every file.

    Of the index, only its own manifest is listed, which has the checksums of the index's files.

    Args:
        folder: the checkpoint, in which nothing is written after this.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in listed_files(folder).items()
    }
    body = {"format": FORMAT, "version": VERSION, "files": files}
    manifests.write(folder / MANIFEST, manifests.sealed(body))
    folders.step("manifest", folder)


def listed_files(folder: Path) -> dict[str, Path]:
    """Return the files that a checkpoint's manifest lists, by name."""
    own = folder / INDEX_FOLDER
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file()
        and path not in (folder / MANIFEST, folder / UNFINISHED)
        and (own not in path.parents or path == own / MANIFEST)
    }


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def withdraw(folder: Path) -> None:
    """Delete an unfinished checkpoint and bring back the one that it was to replace.

    Args:
        folder: `checkpoint-<step>`; nothing happens to one that is finished.
    """
    if (folder / UNFINISHED).exists():
        _delete(folder)
    folders.recover(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint under another name, so that a half-deleted one does not count."""
    spare = folders.staging_path(folder)
    folder.rename(spare)
    folders.step("withdrawn", folder)
    shutil.rmtree(spare, ignore_errors=True)
    folders.step("deleted", folder)


def remove_leftovers(run_dir: str | os.PathLike[str]) -> None:
    """Delete the half-written checkpoints of a killed process, and bring back those set aside.

    Args:
        run_dir: the run folder, in which no other process is writing.
    """
    for path in Path(run_dir).glob("checkpoint-*"):
        withdraw(path)
    folders.clean(Path(run_dir), "checkpoint-*")


def require_no_checkpoints(run_dir: str | os.PathLike[str]) -> None:
    """Refuse to start a run in a folder that holds checkpoints of another run.

    Rotation and resuming go by the step, so they would take the older run's later checkpoints for
    the newest of this run.

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


def rotate(run_dir: str | os.PathLike[str], keep: int | None, protect: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest nor the protected one.

    Args:
        run_dir: the run folder.
        keep: number of checkpoints to keep; None or 0: all.
        protect: a checkpoint that is never deleted, usually the best.
    """
    if not keep:
        return
    found = checkpoints(run_dir)
    stays = {found[-1]} if found else set()
    if protect is not None:
        stays.add(Path(run_dir) / Path(protect).name)
    spare = len(found) - max(keep, len(stays))
    for path in [each for each in found if each not in stays][: max(spare, 0)]:
        _delete(path)
