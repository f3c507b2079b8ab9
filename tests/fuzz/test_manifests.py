"""Manifests altered at random: a folder loads the same content, or a ValueError names the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag import FaissIndex, FlatIndex, manifests
from fastrag.index import Index, PassageStore, flat_changes
from fastrag.nn import TextEncoder
from fastrag.nn import checkpoint as saved_model
from fastrag.train import checkpoint_contents
from tests import tiny

N, DIM = 4, 3
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from(
        ["", "x", "../x", "/", "0" * 64, "0" * 8, "|O", "<f2", "int8", "\0", "é" * 300]
    ),
    st.sampled_from([[], {}, [-1], ["x"], {"x": 1}, [[1]], {"vectors.npy": {}}]),
).map(copy.deepcopy)


def make_index(dtype: str, folder: Path) -> None:
    index = FlatIndex(DIM, dtype)
    index.add(torch.arange(N * DIM, dtype=torch.float32).reshape(N, DIM))
    index.remove(torch.tensor([1]))
    index.save(folder)


def make_faiss(folder: Path) -> None:
    index = FaissIndex(DIM, "Flat")
    index.add(torch.arange(N * DIM, dtype=torch.float32).reshape(N, DIM))
    index.save(folder)


def make_changes(folder: Path) -> None:
    base = folder.with_name("base")
    make_index("int8", base)
    index = FlatIndex.load(base)
    index.track_changes()
    index.update(torch.tensor([2]), torch.ones(1, DIM))
    assert flat_changes.save_changes(index, folder)


def index_content(folder: Path, load: Callable[[Path], Any] | None = None) -> Any:
    index = Index.load(folder, verify=True) if load is None else load(folder)
    return index.vectors(torch.arange(N)).tolist(), index.removed.tolist(), index.dim, len(index)


def store_content(folder: Path) -> Any:
    store = PassageStore.load(folder, verify=True)
    rows = torch.arange(-1, len(store))
    gathered = [store.gather(rows, stream)[0].tolist() for stream in ("encoder", "generator")]
    return gathered, [store.passage(row) for row in range(len(store))], store.row_of("p1")


def make_checkpoint(folder: Path) -> None:
    folder.mkdir()
    model = tiny.rag_model()
    checkpoint_contents.write_weights(model, folder)
    checkpoint_contents.write_index(model, folder, changing=False)


def checkpoint_content(folder: Path) -> Any:
    checkpoint_contents.read_weights(MODEL, folder)
    checkpoint_contents.read_index(MODEL, folder)
    return None


def settings_content(folder: Path) -> Any:
    settings = saved_model._read_settings(folder, given_base=False)
    # A model that was saved before a setting existed does not have it.
    return sorted(
        settings.keys() - {*saved_model._LATER_SETTINGS, "null_score", "posterior_encoder"}
    )


MODEL = tiny.rag_model()
# name -> how it is made, the file that is altered, and what is to stay the same when it is read
KINDS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "float32": (lambda path: make_index("float32", path), "manifest.json", index_content),
    "int8": (lambda path: make_index("int8", path), "manifest.json", index_content),
    "changes": (
        make_changes,
        "manifest.json",
        lambda path: index_content(path, flat_changes.load_changes),
    ),
    "faiss": (make_faiss, "manifest.json", index_content),
    "passages": (lambda path: tiny.store(n=3).save(path), "manifest.json", store_content),
    "model": (MODEL.save_pretrained, "manifest.json", settings_content),
    "settings": (MODEL.save_pretrained, saved_model.CONFIG, settings_content),
    "encoder": (
        lambda path: tiny.encoder().save_pretrained(path),
        "fastrag_encoder.json",
        lambda path: TextEncoder.from_pretrained(path).dim,
    ),
    "frozen": (make_checkpoint, checkpoint_contents.FROZEN, checkpoint_content),
    "reference": (make_checkpoint, checkpoint_contents.INDEX, checkpoint_content),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    make, file, content = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "f"
    make(folder)
    return folder / file, content, content(folder)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value, from the outermost in."""
    found = [at]
    for key in value if isinstance(value, dict) else range(len(value)) if _is_list(value) else ():
        found += places(value[key], (*at, key))
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def altered(draw: Callable[[st.SearchStrategy[Any]], Any], manifest: Any) -> Any:
    """A value changed, taken out or put in, at one place or at several."""
    whole = [copy.deepcopy(manifest)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(places(whole[0])))
        holder: Any = whole
        for key in (0, *at)[:-1]:
            holder = holder[key]
        last = (0, *at)[-1]
        change = draw(st.sampled_from(["value", "value", "value", "gone", "more", "text"]))
        if change == "gone" and at:
            del holder[last]
        elif change == "more" and isinstance(holder[last], dict):
            holder[last][draw(st.sampled_from(["x", "files", "../x.npy", ""]))] = draw(ODD)
        elif change == "more" and isinstance(holder[last], list):
            holder[last].append(draw(ODD))
        elif change == "text":
            holder[last] = str(holder[last])
        else:
            holder[last] = draw(ODD)
    return whole[0]


def check(kind: tuple[Path, Callable[[Path], Any], Any], data: st.DataObject) -> None:
    path, content, expected = kind
    whole = path.read_bytes()
    try:
        if data.draw(st.integers(0, 4)) == 0:  # bytes, as a failing disk alters them
            raw = bytearray(whole)
            for _ in range(data.draw(st.integers(1, 3))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            path.write_bytes(raw[: data.draw(st.integers(len(raw) - 3, len(raw)))])
        else:
            manifest = json.loads(whole)
            was_sealed = manifest.pop(manifests.SEAL, None) is not None
            manifest = altered(data.draw, manifest)
            if was_sealed and isinstance(manifest, dict):
                manifest = manifests.sealed(manifest)
            path.write_text(json.dumps(manifest))
        try:
            found = content(path.parent)
        except ValueError as error:
            assert str(path.parent) in str(error)
        else:
            assert found == expected
    finally:
        path.write_bytes(whole)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.data())
def test_an_altered_manifest(kind: Any, data: st.DataObject) -> None:
    check(kind, data)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=1200)
@given(st.data())
def test_ten_thousand_altered_manifests(kind: Any, data: st.DataObject) -> None:
    check(kind, data)
