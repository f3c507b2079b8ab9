"""Folders that are written over hours: a killed write continues after its last finished block.

    .index.partial/          next to the target `index`, until it is complete
        lock                 held by the process that writes
        task.json            what is written; a write of anything else is refused
        blocks.jsonl         one line for each finished block
        data/                the files, which become the folder `index`

A block is finished when its bytes in all files are on the disk and its line in `blocks.jsonl` is.
The line has the length of each file and the SHA-256 of that much of it. A write that continues
reads the files once, compares, and cuts off what follows the last whole block. Blocks are only
appended, so the complete folder has the same bytes whether or not the write was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fastrag import folders, manifests
from fastrag.index.storage import MANIFEST, ArrayStream, Digests, FolderWriter
from fastrag.manifests import anything, integer, record, sha256, table, text
from fastrag.messages import shown

_TASK = "task.json"
_JOURNAL = "blocks.jsonl"
_TASK_FIELDS = record({"task": table(text()), "note": table(text())})
_LINE = record(
    {
        "n_rows": integer(),
        "files": table(record({"bytes": integer(), "sha256": sha256()})),
        "state": anything,
    }
)


class Unfinished:
    """The locked folder of a write that is not complete; a context manager.

    Leaving it after an error keeps the folder if it contains a finished block, for the next write.

    Args:
        target: the folder to appear.
        task: what is written, as texts by name. It must be equal when a write is continued.
        note: further texts, kept from the first write.

    Attributes:
        folder: the folder `.NAME.partial`.
        data: the folder in it that becomes the target.
        note: the note of the write that is continued.

    Raises:
        ValueError: another process is writing, or the folder is part of another task; the message
            names the difference.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        task: Mapping[str, str],
        note: Mapping[str, str] | None = None,
    ) -> None:
        self._target = Path(target).absolute()
        self._done = False
        self.folder, self._lock = folders.lock_partial(self._target)
        self.data = self.folder / "data"
        try:
            self.note = self._open(dict(task), dict(note or {}))
        except BaseException:
            self._lock.close()
            raise

    def _open(self, task: dict[str, str], note: dict[str, str]) -> dict[str, str]:
        file = self.folder / _TASK
        if file.exists() and self.data.exists() and self.has_blocks():
            found = manifests.unsealed(file, manifests.load(file))
            manifests.verify(file, found, _TASK_FIELDS)
            self._check_same(found["task"], task)
            return dict(found["note"])
        self._delete_contents()
        self.data.mkdir()
        with folders.replacing(file) as temporary:
            manifests.write(temporary, manifests.sealed({"task": task, "note": note}))
            with temporary.open("rb") as written:
                folders.flush(written)
        folders.flush_folder(self.folder)
        return note

    def _check_same(self, found: dict[str, str], task: dict[str, str]) -> None:
        for name in (*found, *task):
            if found.get(name) != task.get(name):
                raise ValueError(
                    f"{self._target}: expected to continue the unfinished one in {self.folder}, "
                    f"whose {name} is {shown(found.get(name))}, got {shown(task.get(name))}; "
                    "delete that folder to begin anew"
                )

    def has_blocks(self) -> bool:
        """Return whether anything is finished: a block of a folder, or a whole folder."""
        journals = self.folder.rglob(_JOURNAL)
        return any(self.folder.rglob(MANIFEST)) or any(each.stat().st_size for each in journals)

    def _delete_contents(self) -> None:
        for each in self.folder.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name != Path(self._lock.name).name:
                each.unlink()

    def commit(self) -> None:
        """Give `data` the name of the target and delete the rest.

        Raises:
            OSError: the system refuses; the old target stays, and the next write continues.
        """
        # A write of a folder in `data` that was killed after its last step leaves these behind.
        for each in self.data.glob(".*.partial"):
            shutil.rmtree(each)
        folders.commit(self.data, self._target)
        self._done = True

    def discard(self) -> None:
        """Have the folder deleted at the end: its blocks cannot become what was asked for."""
        self._done = True

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; delete the folder unless it contains finished blocks."""
        if self._done or not self.has_blocks():
            with contextlib.suppress(OSError):
                self._delete_contents()
                # Last, because a process that cannot lock it stays out of the folder.
                Path(self._lock.name).unlink()
                self.folder.rmdir()
        self._lock.close()


class _Block(NamedTuple):
    """A line of `blocks.jsonl`."""

    n_rows: int
    files: dict[str, dict[str, Any]]
    state: dict[str, Any]


class ResumableWriter(FolderWriter):
    """A `FolderWriter` whose finished blocks survive a kill: the next one continues after them.

    Streams are opened under the same names again and then contain the rows of the finished blocks.

    Args:
        path: the folder to create or replace.
        format: format name.
        version: format version.
        task: what is written; see `Unfinished`.

    Attributes:
        n_rows: rows (in the caller's sense) in the finished blocks.
        state: the state given with the last finished block; empty if there is none.

    Raises:
        ValueError: as `FolderWriter` and `Unfinished`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str,
        version: int,
        task: Mapping[str, str],
    ) -> None:
        self._task = task
        super().__init__(path, format=format, version=version)

    def _begin(self) -> Path:
        self._unfinished = Unfinished(self.path, self._task)
        try:
            self._journal = self._unfinished.folder / _JOURNAL
            blocks, self._kept = self._whole_blocks(self._unfinished.data)
        except BaseException:
            self._unfinished.close()
            raise
        last = blocks[-1] if blocks else _Block(0, {}, {})
        self.n_rows, self.state = last.n_rows, last.state
        return self._unfinished.data

    def _whole_blocks(self, data: Path) -> tuple[list[_Block], dict[str, Digests]]:
        """Return the finished blocks whose bytes are as they were written, and their digests."""
        lines = _read_lines(self._journal)
        blocks = [block for _, block in lines]
        kept = {name: Digests() for name in (blocks[-1].files if blocks else ())}
        n_whole = min(
            (
                _count_whole(data / f"{name}.npy", [block.files[name] for block in blocks], digests)
                for name, digests in kept.items()
            ),
            default=0,
        )
        if n_whole < len(blocks):
            warnings.warn(
                f"{data}: block {n_whole} of {len(blocks)} is damaged; the write continues before "
                "it",
                stacklevel=2,
            )
        if self._journal.exists():
            os.truncate(self._journal, sum(size for size, _ in lines[:n_whole]))
        return (blocks, kept) if n_whole == len(blocks) else self._whole_blocks(data)

    def stream(self, name: str, dtype: Any, tail: tuple[int, ...] = ()) -> ArrayStream:
        """Open an array to append to; it contains the rows of the finished blocks."""
        return self._open_stream(name, dtype, tail, self._kept.get(name))

    def end_block(self, n_rows: int, state: Mapping[str, Any]) -> None:
        """Finish a block: force all that was appended to the disk and note its checksums.

        Args:
            n_rows: number of rows so far, in the caller's sense.
            state: anything else that the caller needs to continue, JSON-serialisable.

        Raises:
            ValueError: the disk is full or not writable; the blocks before this one stay.
        """
        with self.writing():
            files = {name: stream.sync() for name, stream in self._streams.items()}
            folders.flush_folder(self.folder)
            line = manifests.sealed({"n_rows": n_rows, "files": files, "state": dict(state)})
            with self._journal.open("ab") as journal:
                journal.write(json.dumps(line).encode("ascii") + b"\n")
                folders.flush(journal)
            folders.flush_folder(self._unfinished.folder)
            folders.step("block", self.path)
        self.n_rows = n_rows

    def discard(self) -> None:
        """Do not keep the finished blocks: they cannot become what was asked for."""
        self._unfinished.discard()

    def _replace(self) -> None:
        self._unfinished.commit()

    def _leave(self) -> None:
        self._unfinished.close()


def _read_lines(journal: Path) -> list[tuple[int, _Block]]:
    """Return size and content of the lines of a journal, up to the first that is not whole."""
    found: list[tuple[int, _Block]] = []
    if not journal.exists():
        return found
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            body = manifests.unsealed(journal, dict(json.loads(line)))
            manifests.verify(journal, body, _LINE)
        except (TypeError, ValueError):  # the write of this line was killed
            break
        found.append((len(line), _Block(body["n_rows"], body["files"], body["state"])))
    return found


def _count_whole(file: Path, ends: list[dict[str, Any]], digests: Digests) -> int:
    """Feed a file to its digests, and return the number of blocks up to the first damaged one."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(ArrayStream.header_bytes)
        for i, end in enumerate(ends):
            digests.read(opened, end["bytes"])
            if digests.so_far() != end["sha256"]:
                return i
    return len(ends)
