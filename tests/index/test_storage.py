from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastrag import folders, manifests
from fastrag.index import storage
from fastrag.index.storage import MANIFEST, FolderWriter, read_folder, write_folder

HEAD = {"format": "test", "version": 1}
ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array([3, 1, 2], dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def read(path, **kwargs):
    return read_folder(path, format="test", version=1, **kwargs)


def siblings(path):
    return sorted(os.listdir(path.parent))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "f", ARRAYS, {**HEAD, "note": "é"})
    return tmp_path / "f"


@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip(folder, mmap):
    manifest, arrays = read(folder, mmap=mmap, verify=True)
    assert manifest["note"] == "é" and set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].size == 0 or isinstance(arrays[name], np.memmap) == mmap
    assert not mmap or not arrays["a"].flags.writeable
    assert siblings(folder) == ["f"]


def test_the_files_are_plain_npy(folder):
    np.testing.assert_array_equal(np.load(folder / "a.npy", allow_pickle=False), ARRAYS["a"])
    entry = json.loads((folder / MANIFEST).read_text())["files"]["a.npy"]
    assert entry["dtype"] == "<f4" and entry["shape"] == [3, 4] and entry["bytes"] == 128 + 48
    assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.int64, np.int32, np.uint8, np.uint64]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    ),
    st.integers(1, 4),
)
def test_streamed_blocks_are_the_array(tmp_path_factory, array, step):
    path = tmp_path_factory.mktemp("s") / "f"
    with FolderWriter(path, format="test", version=1) as writer:
        stream = writer.stream("x", array.dtype, array.shape[1:])
        for start in range(0, len(array), step):
            stream.append(array[start : start + step])
        writer.commit({})
    _, arrays = read(path, verify=True)
    assert arrays["x"].shape == array.shape
    np.testing.assert_array_equal(arrays["x"], array)


def test_strided_arrays(tmp_path):
    array = np.arange(24, dtype=np.int64).reshape(4, 6)
    write_folder(tmp_path / "f", {"t": array.T, "s": array[::2, ::3]}, HEAD)
    _, arrays = read(tmp_path / "f", verify=True)
    np.testing.assert_array_equal(arrays["t"], array.T)
    np.testing.assert_array_equal(arrays["s"], array[::2, ::3])


def test_replacing_keeps_open_maps_alive(folder):
    _, old = read(folder)
    write_folder(folder, {"a": ARRAYS["a"] + 1}, HEAD)
    np.testing.assert_array_equal(old["a"], ARRAYS["a"])
    np.testing.assert_array_equal(read(folder)[1]["a"], ARRAYS["a"] + 1)
    assert siblings(folder) == ["f"]


def test_a_link_stays_and_its_folder_is_replaced(folder):
    link = folder.with_name("link")
    link.symlink_to(folder)
    write_folder(link, {"a": ARRAYS["a"] + 1}, HEAD)
    assert link.is_symlink() and siblings(folder) == ["f", "link"]
    np.testing.assert_array_equal(read(folder)[1]["a"], ARRAYS["a"] + 1)


def test_an_error_leaves_the_old_folder_and_nothing_else(folder):
    with (
        pytest.raises(ValueError, match=r"x\.npy: expected rows of int64 \[\], got float32"),
        FolderWriter(folder, format="test", version=1) as writer,
    ):
        writer.stream("x", np.int64).append(np.zeros(2, dtype=np.float32))
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"])
    assert siblings(folder) == ["f"]


def test_a_full_disk_leaves_the_old_folder(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"f: expected a writable folder, got .*No space left"):
        write_folder(folder, {"a": ARRAYS["a"] + 1}, HEAD)
    monkeypatch.undo()
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"])
    assert siblings(folder) == ["f"]


def test_foreign_folders_are_not_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    write_folder(home, ARRAYS, HEAD)  # an empty folder is
    with pytest.raises(ValueError, match="to replace, got a folder of format 'test'"):
        write_folder(home, ARRAYS, {**HEAD, "format": "other"})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    with pytest.raises(ValueError, match="an empty folder or a test one to replace, got .* None"):
        write_folder(tmp_path / "thesis", ARRAYS, HEAD)
    with pytest.raises(ValueError, match="chapter: expected a folder to write to, got a file"):
        write_folder(tmp_path / "thesis" / "chapter", ARRAYS, HEAD)
    with pytest.raises(ValueError, match="x: expected a writable folder, got .*File exists"):
        write_folder(tmp_path / "thesis" / "chapter" / "x", ARRAYS, HEAD)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"
    assert siblings(home) == ["home", "thesis"]


@pytest.mark.parametrize("name", ["notes.txt", "int8/vectors.npy", "int8/manifest.json", ".hidden"])
def test_foreign_files_in_a_folder_stop_the_save(folder, name):
    """Another index in a folder within it is no part of it either."""
    write_folder(folder / "int8", {"vectors": ARRAYS["b"]}, HEAD)
    for each in [path for path in (folder / "int8").iterdir() if path != folder / name]:
        each.unlink()
    if "/" not in name:
        (folder / name).write_text("keep")
    kept = (folder / name).read_bytes()
    match = f"f: expected only files that its manifest lists, which are replaced, got {name}$"
    with pytest.raises(ValueError, match=match):
        write_folder(folder, ARRAYS, HEAD)
    assert (folder / name).read_bytes() == kept and siblings(folder) == ["f"]
    (folder / name).unlink()
    write_folder(folder, {"a": ARRAYS["a"] + 1}, HEAD)
    np.testing.assert_array_equal(read(folder)[1]["a"], ARRAYS["a"] + 1)


def test_a_foreign_file_that_comes_while_the_folder_is_written_survives(folder, monkeypatch):
    at_step(monkeypatch, "array a", lambda: (folder / "notes.txt").write_text("keep"))
    with pytest.raises(ValueError, match=r"expected only files that .*notes\.txt"):
        write_folder(folder, {"a": ARRAYS["a"] + 1}, HEAD)
    assert (folder / "notes.txt").read_text() == "keep" and siblings(folder) == ["f"]
    np.testing.assert_array_equal(read(folder)[1]["a"], ARRAYS["a"])


def test_manifest_needs_a_format(tmp_path):
    with pytest.raises(ValueError, match="manifest: expected a format name and version"):
        write_folder(tmp_path / "f", ARRAYS, {"format": "test"})


@pytest.mark.parametrize("name", ["a.npy", "b.npy", MANIFEST])
@pytest.mark.parametrize("n_bytes", [0, 1, 100, -1])
def test_truncated_files_are_found_at_load(folder, name, n_bytes):
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:n_bytes])
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(folder)
    if name != MANIFEST:
        assert f"expected {len(data)} bytes, got {len(data[:n_bytes])}" in str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", MANIFEST])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"f.*{name}.*(no such file|none)"):
        read(folder)


def test_every_altered_byte_is_found(folder):
    """Data by verify=True; headers and manifest always."""
    for name in ("a.npy", "b.npy", MANIFEST):
        path = folder / name
        data = path.read_bytes()
        for at in range(0, len(data), 1 if name == "b.npy" else 7):
            altered = bytearray(data)
            altered[at] ^= 0x01
            path.write_bytes(altered)
            if name == MANIFEST and _same_json(altered, data):
                continue
            with pytest.raises(ValueError, match=r"/f/"):
                read(folder, verify=True)
            if name == MANIFEST or at < 128:
                with pytest.raises(ValueError, match=r"/f/"):
                    read(folder)
        path.write_bytes(data)
    read(folder, verify=True)


def _same_json(altered, data):
    try:
        return json.loads(altered) == json.loads(data)
    except ValueError:
        return False


def test_messages_say_expected_and_got(folder):
    data = bytearray((folder / "b.npy").read_bytes())
    data[-1] ^= 0xFF
    (folder / "b.npy").write_bytes(data)
    with pytest.raises(
        ValueError,
        match=r"b\.npy: expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}: altered in block 0 "
        r"\(bytes 128 to 151\)$",
    ):
        read(folder, verify=True)
    read(folder)  # the size is right


def test_an_altered_byte_is_placed(tmp_path, monkeypatch):
    """In whatever pieces the array came: a block is so many bytes of the file."""
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 1000)
    with FolderWriter(tmp_path / "f", format="test", version=1) as writer:
        stream = writer.stream("x", np.uint8)
        for n in (10, 2300, 1, 689):
            stream.append(np.arange(n, dtype=np.uint8))
        writer.commit({})
    monkeypatch.undo()  # the size of a block is the folder's
    path = tmp_path / "f" / "x.npy"
    data = path.read_bytes()
    for block, first, last in ((0, 128, 1127), (1, 1128, 2127), (2, 2128, 3127)):
        for at in (first, last):
            altered = bytearray(data)
            altered[at] ^= 0x10
            path.write_bytes(altered)
            where = re.escape(f"altered in block {block} (bytes {first} to {last})")
            with pytest.raises(ValueError, match=rf"x\.npy: expected SHA-256 .*{where}$"):
                read(tmp_path / "f", verify=True)
    altered[200] ^= 0x10
    path.write_bytes(altered)
    with pytest.raises(ValueError, match=r"block 0 \(bytes 128 to 1127\) and 1 more$"):
        read(tmp_path / "f", verify=True)


def test_folders_without_checksums_of_blocks(folder):
    """As they were written before there were any."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    for entry in manifest["files"].values():
        del entry["crc32"], entry["block_bytes"]
    manifests.write(folder / MANIFEST, manifests.sealed(manifest))
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"])
    data = bytearray((folder / "a.npy").read_bytes())
    data[-1] ^= 0xFF
    (folder / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npy: expected SHA-256 [0-9a-f]{64}, got [0-9a-f]*$"):
        read(folder, verify=True)


def test_memory_begins_at_a_cache_line(folder):
    for mmap in (True, False):
        assert read(folder, mmap=mmap)[1]["a"].ctypes.data % 64 == 0


def test_versions_and_formats(folder, tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json: expected format 'other', got 'test'"):
        read_folder(folder, format="other", version=1)
    write_folder(tmp_path / "new", ARRAYS, {**HEAD, "version": 2})
    with pytest.raises(ValueError, match="expected format version 1 to 1, got 2"):
        read(tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_bytes": -1}, "block_bytes: expected a whole number of at least 1, got -1"),
        ({"block_bytes": 0}, "block_bytes: expected a whole number of at least 1, got 0"),
        ({"block_bytes": 1}, "a.npy: expected 48 CRC-32 of blocks, got 1"),
        ({"block_bytes": "1"}, "block_bytes: expected a whole number of at least 1, got '1'"),
        ({"crc32": 5}, "crc32: expected a list, got 5"),
        ({"crc32": [5]}, r"crc32\[0\]: expected 8 hexadecimal digits, got 5"),
        ({"crc32": ["0" * 8] * 2}, "a.npy: expected 1 CRC-32 of blocks, got 2"),
        ({"dtype": "|O"}, "dtype: expected one of .*, got '|O'"),
        ({"dtype": None}, "dtype: expected one of .*, got None"),
        ({"shape": [-3, 4]}, r"shape\[0\]: expected a whole number of at least 0, got -3"),
        ({"shape": [3, True]}, r"shape\[1\]: expected a whole number of at least 0, got True"),
        ({"shape": 12}, "shape: expected a list, got 12"),
        ({"shape": [1] * 99}, "a.npy: array: expected a shape that fits a 118-byte header"),
        ({"bytes": 1.5}, "bytes: expected a whole number of at least 128, got 1.5"),
        ({"sha256": None}, "sha256: expected 64 hexadecimal digits, got None"),
    ],
)
def test_entries_of_another_make_are_refused(folder, changes, message):
    """Entries are checked even if the manifest's own checksum is right, and verifying ends."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["files"]["a.npy"] |= changes
    manifests.write(folder / MANIFEST, manifests.sealed(manifest))
    with pytest.raises(ValueError, match=message) as caught:
        read(folder, verify=True)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    "files",
    [None, {"a.npy": {}}, {"../b/a.npy": {"dtype": 0, "shape": 0, "bytes": 0, "sha256": 0}}],
)
def test_manifests_of_another_make_are_refused(folder, files):
    manifests.write(folder / MANIFEST, manifests.sealed({**HEAD, "files": files}))
    with pytest.raises(ValueError, match=r"manifest\.json: files.*: expected "):
        read(folder)


def test_unreadable_paths(tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected a test folder, got no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file: expected a .*folder"):
        read(tmp_path / "file")
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    with pytest.raises(ValueError, match="manifest.json: expected a JSON file, got Is a directory"):
        read(tmp_path / "odd")


def test_permission_refused(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(folder / "a.npy"))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(ValueError, match=r"expected a readable folder, got .*Permission denied"):
        read(folder)


KILLED = """
import os, sys
import numpy as np
from fastrag.index.storage import write_folder

def die(event, args):
    if event == "fastrag.folders":
        print(args[0], flush=True)
        if args[0] == sys.argv[2]:
            os._exit(9)

sys.addaudithook(die)
write_folder(sys.argv[1], {"a": np.full((3, 4), 7, np.float32)}, {"format": "test", "version": 1})
"""
STEPS = ["open", "block a", "array a", "manifest", "synced", "aside", "in", "done"]


def write_and_die(path, step):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), step]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_save_has_the_steps_that_are_killed_below(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(folders, "step", lambda name, path: seen.append(name))
    write_folder(folder, {"a": ARRAYS["a"]}, HEAD)
    assert seen == STEPS
    assert siblings(folder) == ["f"]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_old_or_new_is_whole(folder, step):
    assert write_and_die(folder, step).returncode == 9
    _, arrays = read(folder, verify=True)
    expected = np.full((3, 4), 7, np.float32) if step in ("in", "done") else ARRAYS["a"]
    np.testing.assert_array_equal(arrays["a"], expected)
    write_folder(folder, {"a": ARRAYS["a"] + 2}, HEAD)  # and saving goes on, leftovers are gone
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"] + 2)
    assert siblings(folder) == ["f"]


def test_killed_between_the_renames(folder):
    assert write_and_die(folder, "aside").returncode == 9
    assert not folder.exists()
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"])
    assert folder.exists()


def at_step(monkeypatch, step, act):
    """Does something once, in the middle of a save."""
    waiting = [act]
    monkeypatch.setattr(
        folders, "step", lambda name, path: name == step and waiting and waiting.pop()()
    )


def test_a_reader_between_the_renames_does_not_fail_the_save(folder, monkeypatch):
    seen = []
    at_step(monkeypatch, "aside", lambda: seen.append(read(folder, verify=True)[1]["a"]))
    write_folder(folder, {"a": ARRAYS["a"] + 1}, HEAD)
    np.testing.assert_array_equal(seen[0], ARRAYS["a"])  # the old folder, whole
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"] + 1)
    assert siblings(folder) == ["f"]


@pytest.mark.parametrize("between", ["_checked_manifest", "_open_array"])
def test_a_save_while_reading_gives_the_new_folder_not_a_mix(folder, monkeypatch, between):
    plain, saved = getattr(storage, between), []

    def interrupted(*arguments):
        found = plain(*arguments)
        if not saved:
            saved.append(write_folder(folder, {"a": ARRAYS["a"] + 1, "b": ARRAYS["b"] + 1}, HEAD))
        return found

    monkeypatch.setattr(storage, between, interrupted)
    manifest, arrays = read(folder)
    assert manifest == {key: saved[0][key] for key in manifest}
    assert set(arrays) == {"a", "b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name] + 1)


def test_a_live_writers_temporary_folder_is_left_alone(folder):
    with FolderWriter(folder, format="test", version=1) as first:
        first.put("a", ARRAYS["a"] + 5)
        write_folder(folder, {"a": ARRAYS["a"] + 4}, HEAD)
        np.testing.assert_array_equal(read(folder)[1]["a"], ARRAYS["a"] + 4)
        first.commit({})
    np.testing.assert_array_equal(read(folder, verify=True)[1]["a"], ARRAYS["a"] + 5)
    assert siblings(folder) == ["f"]
