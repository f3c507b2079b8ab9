"""An index is built block by block: killed anywhere, it continues, and the bytes are the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrag import folders
from fastrag.data import Passage
from fastrag.index import FlatIndex, PassageStore
from fastrag.index.codec import Codec
from fastrag.index.flat_files import write_flat
from fastrag.train import indexing
from tests import tiny
from tests.children import in_child

N, BLOCK = 11, 4


class Now(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All builds have one date, and do not wait for the disk, which only a power cut needs."""
    monkeypatch.setattr(indexing, "datetime", Now)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def build(out: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "passages": iter(tiny.passages(N)),  # as a file gives them
        "encoder": tiny.encoder(),
        "processor": tiny.processor(),
        "block_size": BLOCK,
        "progress": False,
    }
    return indexing.build_index(out, **settings | changes)


def files(folder: Path) -> dict[str, bytes]:
    found = (each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): each.read_bytes() for each in found}


def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of passages in the batches that any encoder gets from now on."""
    seen: list[int] = []
    forward = type(tiny.encoder()).forward

    def counted(self: Any, input_ids: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(type(tiny.encoder()), "forward", counted)
    return seen


def kill_at(out: Path, number: int, **changes: Any) -> list[str]:
    """Build, and be killed at the n-th step (0: never); the steps reached."""
    reading, writing = os.pipe()
    count = 0

    def at_step(name: str, path: str) -> None:
        nonlocal count
        count += 1
        place = Path(path).name if name == "block" else ""
        os.write(writing, f"{name} {place}\n".encode())
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(lambda: build(out, **changes), at_step)
    os.close(writing)
    with os.fdopen(reading) as lines:
        reached = [line.strip() for line in lines]
    assert status == (signal.SIGKILL if number else 0)
    return reached


def n_finished(steps: list[str], part: str) -> int:
    return min(N, BLOCK * steps.count(f"block {part}"))


def check_continues(tmp_path: Path, at: int, seen: list[int], **changes: Any) -> None:
    """Kill a build at a step, build again: the bytes of the whole one, and nothing twice."""
    out = tmp_path / f"at{at}"
    steps = kill_at(out, at, **changes)
    seen.clear()
    build(out, **changes)
    assert files(out) == files(tmp_path / "whole"), steps[-1]
    assert os.listdir(out.parent).count(f".{out.name}.partial") == 0
    if out.exists() and "in" not in steps:
        n_kept = n_finished(steps, "float32" if changes.get("dtype") == "int8" else "index")
        assert sum(seen) == N - n_kept


@pytest.mark.parametrize("where", ["block passages", "block vectors", "block index"])
def test_a_killed_build_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Between two blocks of tokens; in the middle of a block of vectors; after it."""
    steps = kill_at(tmp_path / "whole", 0)
    at = [i for i, name in enumerate(steps, 1) if name == where][1]
    check_continues(tmp_path, at, encoded_rows(monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_killed_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    steps = kill_at(tmp_path / "whole", 0, dtype=dtype)
    seen = encoded_rows(monkeypatch)
    for at in range(1, len(steps) + 1):
        check_continues(tmp_path, at, seen, dtype=dtype)
        shutil.rmtree(tmp_path / f"at{at}")


@pytest.mark.slow
def test_the_memory_of_a_build_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """A process of its own for each size; 64 MB are what 40,000 vectors more would take."""
    peaks = []
    for n in (30_000, 70_000):  # both have codes
        script = [sys.executable, "-m", "tests.train.build_memory"]
        done = subprocess.run(
            [*script, str(tmp_path), str(n), "384", "8192"],
            check=True,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        peaks.append(json.loads(done.stdout)["peak_mib"])
    assert peaks[1] - peaks[0] < 20


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """Each build is killed as soon as it finishes a block; a few dozen of them complete one."""
    build(tmp_path / "whole", dtype="int8")
    out = tmp_path / "out"
    for _ in range(40):
        status = in_child(
            lambda: build(out, dtype="int8"),
            lambda name, path: name == "block" and os.kill(os.getpid(), signal.SIGKILL),
        )
        if status == 0:
            break
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_folder_is_that_of_a_save(tmp_path: Path, dtype: str) -> None:
    """With padding between rows: 24 is no multiple of 64 bytes in any of the dtypes but two."""
    vectors = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    whole = FlatIndex(24, dtype)
    whole.add(vectors)
    whole.passages_checksum = "x"
    whole.save(tmp_path / "saved")
    codec = whole._codec if dtype == "int8" else Codec(dtype)

    def blocks(start: int) -> Iterator[torch.Tensor]:
        for row, block in zip(range(start, 50, 7), vectors[start:].split(7), strict=True):
            if (start, row) == (0, 21):
                raise KeyboardInterrupt
            yield block

    arguments: Any = (tmp_path / "built", blocks, 50)
    settings: Any = {"stored_as": codec, "task": {}, "passages_checksum": "x"}
    with pytest.raises(KeyboardInterrupt):
        write_flat(*arguments, **settings)
    write_flat(*arguments, **settings)
    assert files(tmp_path / "built") == files(tmp_path / "saved")
    with pytest.raises(ValueError, match="vectors: expected 51 rows, got 50"):
        write_flat(tmp_path / "short", lambda start: [vectors], 51, **settings)


def test_a_block_is_on_the_disk_before_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of the journal is written when all that it vouches for survives a power cut."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    lines: list[int] = []

    def at_step(name: str, path: Path) -> None:
        if name == "block passages":
            names = [Path(each).name for each in synced]
            synced.clear()
            journal = names.index("blocks.jsonl")
            assert names[journal - 1] == "data"
            assert len({each for each in names[:journal] if each.endswith(".npy")}) == 10
            lines.append(journal)

    monkeypatch.setattr(folders, "step", lambda name, path: at_step(f"{name} {path.name}", path))
    PassageStore.build(
        tiny.passages(N), tiny.processor(), dir=tmp_path / "passages", block_size=BLOCK
    )
    assert len(lines) == 3


def test_memory_holds_one_block(tmp_path: Path) -> None:
    """Whatever the number of rows: no block is alive when the next but one is made."""
    made: list[weakref.ref[np.ndarray[Any, Any]]] = []

    def blocks(start: int) -> Iterator[np.ndarray[Any, Any]]:
        for _ in range(start, 60):
            assert sum(each() is not None for each in made[:-1]) == 0
            block = np.ones((1, 16), dtype=np.float32)
            made.append(weakref.ref(block))
            yield block

    write_flat(tmp_path / "out", blocks, 60, stored_as=Codec("float16"), task={})
    assert len(made) == 60


def test_an_unfinished_build_of_something_else_is_refused(tmp_path: Path) -> None:
    corpus, out = tiny.passages(N), tmp_path / "out"
    build(out)
    old = files(out)
    interrupt_after(out, "index", 1)
    unfinished = files(tmp_path / ".out.partial")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"encoder": tiny.encoder(seed=1)}, "whose passage encoder is '[0-9a-f]{32}', got"),
        ({"encoder": tiny.encoder(normalize=False)}, "whose passage encoder is"),
        ({"dtype": "float16"}, "whose dtype is 'float32', got 'float16'; delete that folder"),
        ({"processor": tiny.processor(max_passage=9)}, "whose encoder stream is .*256.*, got .*9"),
        ({"passages": corpus[::-1]}, "of the unfinished build, in row 0 'p0', got 'p10'"),
        (
            {"passages": [Passage("p0", "", "another"), *corpus[1:]]},
            "in row 0 'p0', got 'p0' with another title or text",
        ),
        ({"passages": tiny.passages(5)}, "in row 5 'p5', got no more passages"),
        ({"passages": tiny.passages(N + 1)}, "in row 11 no more passages, got 'p11'"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            build(out, **changes)
        assert files(tmp_path / ".out.partial") == unfinished and files(out) == old
    build(out)
    assert os.listdir(tmp_path) == ["out"] and files(out) == old


def interrupt_after(
    out: Path, part: str, n_blocks: int, error: BaseException | None = None
) -> None:
    """Build and raise an error at the end of a block: by default, as Ctrl-C does."""
    error = error or KeyboardInterrupt()
    seen: list[str] = []

    def at_step(name: str, path: Path) -> None:
        seen.append(path.name if name == "block" else "")
        if seen.count(part) == n_blocks:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folders, "step", at_step)
        build(out)


def test_nothing_is_left_of_a_build_without_a_block(tmp_path: Path) -> None:
    wrong = [*tiny.passages(2), Passage("p2", "", " ")]
    with pytest.raises(ValueError, match="row 2"):
        build(tmp_path / "out", passages=wrong)
    assert not os.listdir(tmp_path)
    assert len(build(tmp_path / "out", passages=wrong[:2])[0]) == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old index stays whole, and with room the build continues."""
    out = tmp_path / "out"
    build(out, encoder=tiny.encoder(seed=1))
    old = files(out)
    n_blocks = 0

    def at_step(name: str, path: Path) -> None:
        nonlocal n_blocks
        n_blocks += name == "block vectors"
        if n_blocks == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "step", at_step)
        with pytest.raises(ValueError, match=r"vectors\.npy: .*No space left.*blocks are kept in"):
            build(out)
    assert files(out) == old
    seen = encoded_rows(monkeypatch)
    build(out)
    assert sum(seen) == N - BLOCK
    build(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_damaged_block_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupt_after(out, "index", 2)
    (vectors,) = tmp_path.glob(".out.partial/data/.index.partial/data/vectors.npy")
    data = bytearray(vectors.read_bytes())
    data[128 + BLOCK * 64 + 3] ^= 1  # in the second block
    vectors.write_bytes(data)
    seen = encoded_rows(monkeypatch)
    with pytest.warns(UserWarning, match="block 1 of 2 is damaged"):
        build(out)
    assert sum(seen) == N - BLOCK
    build(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_two_builds_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def at_step(name: str, path: Path) -> None:
        if name == "block" and not refused:
            refused.append("")
            with pytest.raises(ValueError, match="that no other process is writing") as caught:
                build(out)
            refused[0] = str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "step", at_step)
        build(out)
    assert f"got one that process {os.getpid()} on" in refused[0]
    assert len(indexing.load_index(out, verify=True)[0]) == N


def test_passages_alone_continue(tmp_path: Path) -> None:
    passages, processor = tiny.passages(N), tiny.processor()
    PassageStore.build(passages, processor, dir=tmp_path / "whole", block_size=BLOCK)

    def some() -> Iterator[Passage]:
        yield from passages[:9]
        raise KeyboardInterrupt

    settings: Any = {"dir": tmp_path / "out", "block_size": BLOCK}
    with pytest.raises(KeyboardInterrupt):
        PassageStore.build(some(), processor, **settings)
    other = [*passages[:7], passages[8], passages[7]]
    with pytest.raises(ValueError, match="in row 7 'p7', got 'p8'"):
        PassageStore.build(other, processor, **settings)
    store = PassageStore.build(iter(passages), processor, **settings)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert store.checksum() == PassageStore.build(passages, processor).checksum()
    assert [store.row_of(passage.id) for passage in passages] == list(range(N))


def test_ids_are_sorted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, processor = tiny.passages(12), tiny.processor()
    whole = PassageStore.build(passages, processor)
    monkeypatch.setattr("fastrag.index.passage_writer._SORTED_ROWS", 3)
    parts = PassageStore.build(passages, processor, dir=tmp_path / "out")
    assert parts.checksum() == whole.checksum()
    with pytest.raises(ValueError, match="rows 2 and 12 with one id, 'p2'"):
        PassageStore.build([*passages, passages[2]], processor, dir=tmp_path / "again")
