"""Folders whole or absent: killed at every step, read while they are replaced, leftovers gone."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastrag import folders
from fastrag.folders import replacing
from tests.children import in_child

STEPS = ["open", "synced", "aside", "in", "done"]
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])

SAVE = """
import os, sys
from pathlib import Path
from fastrag import folders
from fastrag.folders import replacing

def die(event, args):
    if event == "fastrag.folders":
        print(args[0], flush=True)
        if args[0] == sys.argv[2]:
            os._exit(9)

sys.addaudithook(die)
target = Path(sys.argv[1])
staging = folders.begin(target, shared=sys.argv[3] == "True")
(staging / "part").mkdir()
(staging / "file").write_text("new")
(staging / "part" / "file").write_text("new")
folders.commit(staging, target)
"""


def save_elsewhere(target: Path, killed_at: str, shared: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SAVE, str(target), killed_at, str(shared)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def save(target: Path, text: str, shared: bool = False) -> None:
    staging = folders.begin(target, shared=shared)
    (staging / "part").mkdir()
    for file in (staging / "file", staging / "part" / "file"):
        file.write_text(text)
    folders.commit(staging, target)


def read(target: Path) -> str:
    """What stands in both files of a folder."""
    text = (target / "file").read_text()
    assert (target / "part" / "file").read_text() == text
    return text


@pytest.fixture
def target(tmp_path: Path) -> Path:
    save(tmp_path / "f", "old")
    return tmp_path / "f"


def siblings(target: Path) -> list[str]:
    return sorted(os.listdir(target.parent))


@SHARED
def test_a_save_has_the_steps_that_are_killed_below(target: Path, shared: bool) -> None:
    done = save_elsewhere(target, "never", shared)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == STEPS
    assert read(target) == "new" and siblings(target) == ["f"]


@SHARED
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_old_or_new_is_whole(target: Path, step: str, shared: bool) -> None:
    assert save_elsewhere(target, step, shared).returncode == 9
    assert target.exists() == (step != "aside")
    folders.recover(target)
    assert read(target) == ("new" if step in ("in", "done") else "old")
    save(target, "newer", shared)
    assert read(target) == "newer" and siblings(target) == ["f"]


@SHARED
@pytest.mark.parametrize("step", ["open", "synced", "in", "done"])
def test_killed_while_there_is_no_old_folder(tmp_path: Path, step: str, shared: bool) -> None:
    target = tmp_path / "f"
    assert save_elsewhere(target, step, shared).returncode == 9
    folders.recover(target)
    assert target.exists() == (step in ("in", "done"))
    assert not target.exists() or read(target) == "new"
    save(target, "newer", shared)
    assert read(target) == "newer" and siblings(target) == ["f"]


@SHARED
@pytest.mark.parametrize("step", STEPS)
def test_clean_leaves_the_targets_alone(target: Path, step: str, shared: bool) -> None:
    """As at the start of a run: nothing is saved again, yet the leftovers are gone."""
    other = target.with_name("g")
    save(other, "other")
    assert save_elsewhere(target, step, shared).returncode == 9
    folders.clean(target.parent, "f*")
    assert read(target) == ("new" if step in ("in", "done") else "old")
    assert read(other) == "other" and siblings(target) == ["f", "g"]


def test_clean_of_no_folder(tmp_path: Path) -> None:
    folders.clean(tmp_path / "none")
    assert not any(tmp_path.iterdir())


def test_one_staging_folder_for_all_ranks_and_one_for_each_writer(tmp_path: Path) -> None:
    target = tmp_path / "f"
    assert folders.staging_path(target, shared=True) == tmp_path / ".f.tmp"
    assert folders.staging_path(target) != folders.staging_path(target)
    assert folders.begin(target, shared=True) == folders.staging_path(target, shared=True)
    first, second = folders.begin(target), folders.begin(target)
    for staging, text in ((first, "first"), (second, "second")):
        (staging / "file").write_text(text)
    for staging, text in ((first, "first"), (second, "second")):
        folders.commit(staging, target)
        assert (target / "file").read_text() == text


def test_a_begun_folder_is_empty(target: Path) -> None:
    for _ in range(2):
        staging = folders.begin(target, shared=True)
        assert not any(staging.iterdir())
        (staging / "half").write_text("x")
    assert read(target) == "old"


def test_all_is_on_the_disk_before_the_first_rename(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that reaches the disk before the data shows an empty file after a power cut."""
    events: list[str | tuple[int, int]] = []

    def remember(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append((status.st_dev, status.st_ino))

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(folders, "step", lambda name, path: events.append(name))
    save(target, "new")
    parts = [target, target / "file", target / "part", target / "part" / "file"]
    on_disk = {(path.stat().st_dev, path.stat().st_ino) for path in parts}
    assert on_disk <= set(events[: events.index("synced")])
    parent = target.parent.stat()
    at = events.index((parent.st_dev, parent.st_ino))
    assert events.index("in") < at < events.index("done")  # the old one goes when the new one stays


def at_step(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], None]) -> None:
    monkeypatch.setattr(folders, "step", lambda name, path: act() if name == step else None)


@SHARED
@pytest.mark.parametrize("readers", [1, 3])
def test_readers_between_the_renames_do_not_fail_the_save(
    target: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, readers: int
) -> None:
    seen: list[str] = []

    def reader() -> None:
        if len(seen) < readers:
            folders.recover(target)
            seen.append(read(target))

    at_step(monkeypatch, "aside", reader)
    save(target, "new", shared)
    assert seen == ["old"] * readers
    assert read(target) == "new" and siblings(target) == ["f"]


def test_a_reader_that_never_lets_go_fails_the_save_and_not_the_folder(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, "aside", lambda: folders.recover(target))
    with pytest.raises(OSError) as caught:
        save(target, "new")
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert read(target) == "old"


def test_a_refused_rename_brings_the_old_folder_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = folders.begin(target)
    at_step(monkeypatch, "aside", lambda: staging.rmdir())
    with pytest.raises(FileNotFoundError):
        folders.commit(staging, target)
    assert read(target) == "old" and siblings(target) == ["f"]


def test_a_writer_quicker_than_recovery(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new folder comes in after the reader has seen none: it stays, the old one goes."""
    target.rename(target.with_name(".f.old"))
    rename = os.rename

    def late(source: Path, destination: Path) -> None:
        shutil.copytree(source, destination)
        (Path(destination) / "file").write_text("new")
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", late)
        folders.recover(target)
    assert (target / "file").read_text() == "new"
    save(target, "newer")
    assert read(target) == "newer" and siblings(target) == ["f"]


@pytest.mark.parametrize("name", ["f", "a[1]*"], ids=["plain", "pattern"])
def test_staging_folders_of_processes_that_are_gone_are_deleted(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = socket.gethostname()
    gone = tmp_path / f".{name}.tmp-{here}-{child.pid}-0a1b2c3d"
    stays = [
        tmp_path / f".{name}.tmp-{here}-{os.getpid()}-0a1b2c3d",  # alive
        tmp_path / f".{name}.tmp-{here}-2-{child.pid}-0a1b2c3d",  # the machine `<here>-2`
        tmp_path / f".other.tmp-{here}-{child.pid}-0a1b2c3d",
        tmp_path / f".{name}.tmp-{here}-notes-x",
    ]
    for folder in (gone, *stays):
        folder.mkdir()
    save(target, "new")
    assert siblings(target) == sorted([name, *(each.name for each in stays)])


def test_what_cannot_be_deleted_does_not_stop_the_next_save(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems keep the files of a deleted folder that somebody has open."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for text in ("1", "2", "3"):
            save(target, text)
            assert read(target) == text
    folders.clean(target.parent)
    assert read(target) == "3"


@SHARED
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_link_stays_and_its_folder_is_replaced(
    target: Path, shared: bool, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target.parent / "here").mkdir()
    link = target.parent / "here" / "link"
    link.symlink_to(target if absolute else Path("..", target.name))
    monkeypatch.chdir(target.parent / "here")
    for path, text in ((link, "1"), (Path("link"), "2")):
        save(path, text, shared)
        assert link.is_symlink() and read(link) == read(target) == text
        assert not target.is_symlink() and siblings(link) == ["link"]
        assert siblings(target) == ["f", "here"]


@SHARED
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_of_a_save_through_a_link(target: Path, step: str, shared: bool) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    assert save_elsewhere(link, step, shared).returncode == 9
    folders.recover(link)
    assert link.is_symlink() and read(link) == ("new" if step in ("in", "done") else "old")
    save(link, "newer", shared)
    assert link.is_symlink() and read(target) == "newer" and siblings(target) == ["f", "link"]


def test_a_link_to_no_folder_yet_makes_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "large" / "f")
    save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "large" / "f") == "new"


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError):
        save(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()


WRITER = """
import sys
from pathlib import Path
from fastrag import folders
from fastrag.folders import replacing

target = Path(sys.argv[1])
for i in range(100):
    staging = folders.begin(target)
    for part in "ab":
        (staging / part).write_text(sys.argv[2] + str(i))
    folders.commit(staging, target)
"""


def test_two_writers_at_once(tmp_path: Path) -> None:
    target = tmp_path / "f"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, target, name]) for name in "xy"]
    while any(writer.poll() is None for writer in writers):
        folders.recover(target)
    assert [writer.returncode for writer in writers] == [0, 0]
    last = (target / "a").read_text()
    assert last in ("x99", "y99") and (target / "b").read_text() == last
    assert siblings(target) == ["f"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    target, link = tmp_path / "config.yaml", tmp_path / "here" / "config.yaml"
    target.write_text("old")
    link.symlink_to(Path("..", target.name))
    with replacing(link) as temporary:
        temporary.write_text("new")
        assert link.read_text() == "old"
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "here"]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with pytest.raises(KeyError), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]


# ---- locks -------------------------------------------------------------------------------------


def no_steps(name: str, path: str) -> None:
    pass


def test_a_locked_folder_is_refused_to_others(tmp_path: Path) -> None:
    """To another thread and another process; the message names the holder."""
    folder = tmp_path / "run"

    def refused() -> None:
        message = f"run: expected a folder that no other process .* process {os.getpid()} on"
        with pytest.raises(ValueError, match=message), folders.locked(folder):
            pass

    def refused_in_child(holder: int = os.getpid()) -> None:
        with pytest.raises(ValueError, match=f"process {holder} on"), folders.locked(folder):
            pass

    with folders.locked(folder):
        with folders.locked(folder):
            pass
        with ThreadPoolExecutor(1) as thread:
            thread.submit(refused).result()
        assert in_child(refused_in_child, no_steps) == 0
        assert os.listdir(folder) == ["lock"]
    assert not folder.exists()


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    """Even if its child, which has inherited the open file, lives on."""
    folder, born = tmp_path / "run", tmp_path / "born"

    def die() -> None:
        with folders.locked(folder):
            child = os.fork()
            if child == 0:
                born.touch()
                time.sleep(60)
            born.with_name("pid").write_text(str(child))
            while not born.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die, no_steps) == signal.SIGKILL
    with folders.locked(folder):
        assert f"process {os.getpid()} on" in (folder / "lock").read_text()
    os.kill(int(born.with_name("pid").read_text()), signal.SIGKILL)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    warned = pytest.warns(UserWarning, match="run: its file system has no locks .*not noticed")
    with warned, folders.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
