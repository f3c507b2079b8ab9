"""Folders that appear whole or not at all, and files that are replaced in one step.

    begin                        .index.tmp-host-71-9f3c52ab    empty, beside the target `index`
    (write into it)
    commit   flush the tree      every file and folder of it is on the disk
             rename aside        index -> .index.old            where there was an `index`
             rename in           .index.tmp-... -> index
             delete aside

Whenever the process is killed, the old folder or the new one is there whole: between the two
renames the old one is `.index.old`, and `recover` takes it back. Whoever opens such a folder calls
`recover` first. A target that is a symbolic link stays one: the folder that it names is replaced,
where that folder is. Each step raises the audit event `fastrag.folders` (`sys.addaudithook`) with
its name, so that a test can kill the process at any of them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import socket
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_ASIDE = ".old"
_STAGING = ".tmp"
_PARTIAL = ".partial"
_LOCK = "lock"
_T = TypeVar("_T")
_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()
_holders: dict[Path, int] = {}  # thread that is in `locked`, by folder
# A save needs another attempt for each reader that takes the old folder back between its renames,
# and a reader for each save that replaces the folder while it reads.
_ATTEMPTS = 9
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def step(name: str, path: Path) -> None:
    """Raise the audit event `fastrag.folders`: a step of a save, or of a read, is done.

    Args:
        name: "open", "synced", "aside", "in", "done", or another step of the caller's.
        path: the folder it concerns.
    """
    sys.audit("fastrag.folders", name, str(path))


def staging_path(target: Path, *, shared: bool = False) -> Path:
    """Name a hidden sibling of a folder to write into; nothing is made.

    Args:
        target: the folder to appear.
        shared: one name for all processes, such as the ranks of one run, which must then agree on
            who begins and who commits. Otherwise each call gives a name of its own, with this
            machine and process in it.

    Returns:
        The path, in the target's folder: a rename does not cross file systems.

    Example:
        >>> staging_path(Path("runs/x/checkpoint-10"), shared=True).name
        '.checkpoint-10.tmp'
    """
    target = _resolved(target)
    if shared:
        return target.with_name(f".{target.name}{_STAGING}")
    return target.with_name(f".{target.name}{_owner()}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def begin(target: Path, *, shared: bool = False) -> Path:
    """Make the empty staging folder that `commit` gives the target's name.

    A target that a killed process left aside is taken back first, and staging folders of processes
    that are gone are deleted; with `shared` also an earlier one of the same name.

    Args:
        target: the folder to appear, for example `runs/x/checkpoint-10`.
        shared: see `staging_path`.

    Returns:
        The folder to write into.

    Raises:
        OSError: the system refuses.
    """
    target = _resolved(target)
    recover(target)
    staging = staging_path(target, shared=shared)
    if shared:
        _delete(staging)
    staging.parent.mkdir(parents=True, exist_ok=True)
    _delete_stale(target.parent, glob.escape(target.name))
    staging.mkdir()
    step("open", staging)
    return staging


def commit(staging: Path, target: Path, *, keep_old: bool = False) -> None:
    """Flush a staging folder to the disk and give it the target's name.

    Args:
        staging: what `begin` gave.
        target: the folder to appear; an existing one stays whole until the new one is complete.
        keep_old: leave the folder that stood there aside, until `discard_old`.

    Raises:
        OSError: the system refuses; before the new folder is in, the old one stands as it did.
    """
    flush_tree(staging)
    step("synced", staging)
    target = _resolved(target)
    aside = _aside(target)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if target.exists():
                _discard(aside, target)
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    target.rename(aside)
                step("aside", target)
            staging.rename(target)
            break
        except OSError as error:
            recover(target)
            # A reader that came between the two renames took the old folder back: once more.
            if attempt == _ATTEMPTS or error.errno not in _TAKEN:
                raise
    step("in", target)
    flush_folder(target.parent)
    if not keep_old:
        discard_old(target)


def discard_old(target: Path) -> None:
    """Delete the folder that `commit` replaced.

    Args:
        target: the folder that stands in its place.
    """
    target = _resolved(target)
    _delete(_aside(target))
    step("done", target)


def lock_partial(target: Path) -> tuple[Path, BinaryIO]:
    """Lock the folder in which a long write collects its files, and which survives a kill.

    Args:
        target: the folder to appear, for example `runs/index`.

    Returns:
        The folder, `runs/.index.partial`, made if there is none, and its open lock file. The lock
        is released when the file is closed and when the process ends, however it ends.

    Raises:
        ValueError: another process, or another thread of this one, holds the lock.
        OSError: the system refuses.
    """
    target = _resolved(target)
    folder = target.with_name(f".{target.name}{_PARTIAL}")
    return folder, _lock(folder, target)


def lock(folder: Path) -> BinaryIO:
    """Lock a folder until the file that this returns is closed, or the process ends.

    Args:
        folder: the folder, made if there is none.

    Returns:
        The open file `lock` in the folder.

    Raises:
        ValueError: another process, or another call in this one, holds the lock.
        OSError: the system refuses.
    """
    folder = _resolved(folder)
    return _lock(folder, folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock a folder out of it; a thread may lock it again.

    Args:
        folder: the folder, made if there is none and deleted at the end if it is empty.

    Raises:
        ValueError: another process, or another thread of this one, holds the lock. A process that
            has ended holds none, however it ended.
        OSError: the system refuses.
    """
    folder = _resolved(folder)
    if _holders.get(folder) == threading.get_ident():
        yield
        return
    file: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    try:
        file = _lock(folder, folder)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{folder}: its file system has no locks ({error.strerror}), so a second process that "
            "writes to it is not noticed",
            stacklevel=3,
        )
    with file:
        _holders[folder] = threading.get_ident()
        try:
            yield
        finally:
            _holders.pop(folder, None)
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                folder.rmdir()


def _lock(folder: Path, target: Path) -> BinaryIO:
    """Lock the file `lock` in a folder; the target is what messages name."""
    import fcntl  # POSIX only

    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _LOCK).open("a+b")
        except FileNotFoundError:  # the process that held it deleted the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _LOCK)):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                file.flush()
                _locks.add(file)
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode("utf-8", "replace") or "another process"
            raise ValueError(
                f"{target}: expected a folder that no other process is writing, got one that "
                f"{holder} is writing"
            ) from None
        except BaseException:
            file.close()
            raise
        file.close()


def _forget_locks_in_child() -> None:
    """Close the copies of lock files, which would hold the locks when the parent has ended."""
    _holders.clear()
    for file in list(_locks):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks_in_child)


def recover(target: Path) -> None:
    """Take back a folder whose replacement was killed between the two renames.

    Args:
        target: the folder; nothing happens where it is there.
    """
    target = _resolved(target)
    aside = _aside(target)
    if not target.exists() and aside.exists():
        try:
            aside.rename(target)
        except FileNotFoundError:
            pass  # another process was quicker
        except OSError as error:
            if error.errno not in _TAKEN:  # the writer was: the new folder is in
                raise


def read_whole(target: Path, read: Callable[[], _T]) -> _T:
    """Read several files of a folder as one save left them.

    A folder that is replaced meanwhile is read once more, so that no file of the old one meets a
    file of the new one.

    Args:
        target: the folder.
        read: reads it, and raises OSError or ValueError for what it cannot read.

    Returns:
        What `read` returned.

    Raises:
        ValueError: the folder was replaced each time; or what `read` raised.
        OSError: what `read` raised.
    """
    for _ in range(_ATTEMPTS):
        recover(target)
        before = identity(target)
        try:
            found = read()
        except (OSError, ValueError):
            if identity(target) == before:
                raise
        else:
            if identity(target) == before:
                return found
    raise ValueError(
        f"{target}: expected a folder that is left alone while it is read, got one that was "
        f"replaced {_ATTEMPTS} times"
    )


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells the folder at a path from one that replaces it.

    Args:
        path: the folder.

    Returns:
        Inode number and time of its last change, because inode numbers are used again; None if
        nothing is there.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def clean(parent: Path, names: str = "*") -> None:
    """Take back or delete what killed processes left of the targets in a folder.

    Deletes staging folders with a shared name, whose writer cannot be told: not for a folder in
    which another process may be writing.

    Args:
        parent: the folder the targets are in; it need not exist.
        names: glob pattern of the targets' names.
    """
    for aside in sorted(parent.glob(f".{names}{_ASIDE}")):
        recover(aside.with_name(aside.name[1 : -len(_ASIDE)]))
        _delete(aside)  # where it is still there, its replacement is too
    for staging in parent.glob(f".{names}{_STAGING}"):
        _delete(staging)
    _delete_stale(parent, names)


def flush(file: BinaryIO) -> None:
    """Force what was written to an open file to the disk.

    Args:
        file: open for writing.
    """
    file.flush()
    os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    """Force a folder to the disk, with all files and folders in it.

    Without it a rename may reach the disk before the data it is to reveal.

    Args:
        folder: its root.
    """
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary sibling to write, which takes the file's name when the block ends.

    A reader, or a process that is killed, sees the old file or the new one. After an error in the
    block the old file stays and the sibling is removed. A symbolic link stays a link: the file that
    it names is replaced.

    Args:
        path: the file to appear or to be replaced.

    Yields:
        The path to write to.

    Example:
        >>> with replacing("curve.txt") as temporary:            # doctest: +SKIP
        ...     temporary.write_text("loss 0.5")
    """
    target = _resolved(Path(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to the disk.

    Args:
        folder: the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resolved(target: Path) -> Path:
    return Path(os.path.realpath(target))


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}{_ASIDE}"


def _owner() -> str:
    return f"{_STAGING}-{socket.gethostname()}-"


def _delete_stale(parent: Path, names: str) -> None:
    """Delete staging folders whose process, on this machine, is gone."""
    for folder in parent.glob(f".{names}{_owner()}*-*"):
        before, pid, _ = folder.name.rsplit("-", 2)
        here = f"{before}-".endswith(_owner())  # the machine `node` is not `node-2`
        if here and pid.isdecimal() and not _is_alive(int(pid)):
            _delete(folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _discard(aside: Path, target: Path) -> None:
    """Clear the name that the target is about to be renamed to.

    A swap that was killed before its last step leaves a folder there, and so does a network file
    system that keeps deleted files as long as they are open; the latter can be renamed.
    """
    if aside.exists():
        spare = staging_path(target)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            aside.rename(spare)
        _delete(spare)


def _delete(folder: Path) -> None:
    """Delete a folder as far as the system lets."""
    shutil.rmtree(folder, ignore_errors=True)
