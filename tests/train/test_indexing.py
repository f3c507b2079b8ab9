"""What a config leaves open, and what is taken then."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrag import folders
from fastrag.index import FlatIndex
from fastrag.ops import backends
from fastrag.train import indexing, models
from tests import tiny
from tests.settings import rag_config


@pytest.mark.parametrize(
    ("settings", "corpus"), [({}, "default"), ({"data.corpus": "own.jsonl"}, "own.jsonl")]
)
def test_which_passages_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], corpus: str
) -> None:
    tiny.save_parts(tmp_path)
    parts = {
        "retriever.question_encoder": str(tmp_path / "encoder"),
        "reader.generator": str(tmp_path / "generator"),
        "training.output_dir": str(tmp_path / "run"),
    }

    def asked(source: str) -> None:
        raise LookupError(source)

    monkeypatch.setattr(models, "load_passages", asked)
    with pytest.raises(LookupError, match=f"^{corpus}$"):
        models.build_model(rag_config(parts | settings))


def test_the_posterior_encoder_of_a_config_trains(tmp_path: Path) -> None:
    """It is read from its own folder, reads question and answer, and moves with the loss of jsa."""
    tiny.save_parts(tmp_path)
    tiny.encoder(seed=3).save_pretrained(tmp_path / "posterior")
    tiny.tokenizer("encoder").save_pretrained(tmp_path / "posterior")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "text": p.text}) + "\n" for p in tiny.passages())
    )
    settings = {
        "retriever.question_encoder": str(tmp_path / "encoder"),
        "reader.generator": str(tmp_path / "generator"),
        "data.corpus": str(tmp_path / "corpus.jsonl"),
        "training.output_dir": str(tmp_path / "run"),
        "loss.marginal": "sequence",
        "loss.objective": "jsa:5",
        "loss.posterior_encoder": str(tmp_path / "posterior"),
    }
    config = rag_config(settings)
    model = models.build_model(config).train()
    assert model.posterior_encoder is not None
    for name, tensor in tiny.encoder(seed=3).state_dict().items():
        torch.testing.assert_close(model.posterior_encoder.state_dict()[name], tensor)
    batch = models.build_collator(model, config)(tiny.questions(2))
    model(**batch).loss.backward()
    moved = [p.grad.abs().sum() for p in model.posterior_encoder.parameters() if p.grad is not None]
    assert sum(moved) > 0
    with pytest.raises(ValueError, match=r"^loss\.posterior_encoder: expected null unless"):
        rag_config(settings | {"loss.objective": "emdr2"})


def build_index(folder: Path, n: int, seed: int = 0) -> tuple[Any, Any]:
    return indexing.build_index(
        folder,
        tiny.passages(n),
        tiny.encoder(seed=seed),
        tiny.processor(),
        progress=False,
    )


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "names",
    [
        ["index/thesis.tex"],
        ["index/thesis.tex", "passages/notes.txt"],
        ["passages/manifest.json"],
        ["index/index/vectors.npy", "index/passages/ids.npy"],
    ],
    ids=["index", "both", "manifest", "deeper"],
)
def test_folders_with_our_names_and_foreign_files_survive(tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"files": {"notes.txt": {}}}')
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"out/\w+: expected an empty folder or a fastrag\."):
        build_index(out, 2)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part", ["index", "passages"])
def test_foreign_files_beside_ours_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Put there before the build, or while it encodes."""
    out = tmp_path / "out"
    build_index(out, 2)
    foreign = out / part / "notes.txt"
    foreign.write_text("keep")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"{part}: expected only files that .* got notes\.txt"):
        build_index(out, 3)
    assert snapshot(tmp_path) == before
    foreign.unlink()
    encoded = indexing.EncodedBlocks

    def slow(*arguments: Any, **settings: Any) -> Any:
        foreign.write_text("keep")
        return encoded(*arguments, **settings)

    monkeypatch.setattr(indexing, "EncodedBlocks", slow)
    with pytest.raises(ValueError, match=rf"{part}: expected only files that .* got notes\.txt"):
        build_index(out, 3)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in after if ".out.partial" not in name} == before
    foreign.unlink()
    assert len(build_index(out, 3)[0]) == 3  # what was encoded is not lost
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("n", [4, 5], ids=["same-length", "other-length"])
def test_a_rebuild_between_the_two_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """The folder is replaced after the index was read: both come from the new one."""
    out = tmp_path / "out"
    old = build_index(out, 4)
    rebuilt: list[Any] = []

    def act(name: str, path: Path) -> None:
        if (name, path) == ("read", out / "index") and not rebuilt:
            rebuilt.append(None)
            rebuilt[0] = build_index(out, n, seed=1)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "step", act)
        index, store = indexing.load_index(out)
    new = rebuilt[0]
    assert index.checksum() == new[0].checksum() != old[0].checksum()
    assert store.checksum() == new[1].checksum() and len(index) == len(store) == n


def test_a_folder_that_is_always_replaced_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_index(out, 2)
    n_replaced = 0

    def act(name: str, path: Path) -> None:
        nonlocal n_replaced
        if (name, path) == ("read", out / "index"):
            n_replaced += 1
            shutil.copytree(out, tmp_path / "copy")
            shutil.rmtree(out)
            (tmp_path / "copy").rename(out)

    monkeypatch.setattr(folders, "step", act)
    with pytest.raises(ValueError, match="out: expected a folder that is left alone while it is"):
        indexing.load_index(out)
    assert n_replaced >= 9


def test_passages_of_another_build_are_refused(tmp_path: Path) -> None:
    """Both have the same length and order, so only the checksum tells them apart."""
    one, other = tmp_path / "one", tmp_path / "other"
    index, _ = build_index(one, 4)
    indexing.build_index(
        other,
        tiny.passages(5)[1:],
        tiny.encoder(),
        tiny.processor(),
        progress=False,
    )
    shutil.rmtree(one / "passages")
    shutil.copytree(other / "passages", one / "passages")
    with pytest.raises(ValueError, match="one: expected the passages that the index was built"):
        indexing.load_index(one)
    # an index of another kind takes the place, whose vectors come from anywhere
    own = FlatIndex(index.dim)
    own.add(index.vectors(torch.arange(4)))
    own.save(one / "index")
    assert len(indexing.load_index(one)[0]) == 4
    # and what is made from an index keeps what it belongs to
    index.astype("float16").save(other / "index")
    with pytest.raises(ValueError, match="other: expected the passages that the index was built"):
        indexing.load_index(other)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTRAG_BACKEND", "tourch", "^FASTRAG_BACKEND: no backend is called 'tourch'"),
        ("FASTRAG_BACKEND", "triton", "^FASTRAG_BACKEND=triton cannot run here: "),
        ("FASTRAG_CPU_ISA", "sse9", "^FASTRAG_CPU_ISA: expected one of .* got 'sse9'"),
    ],
)
def test_forced_choices_are_checked_before_the_corpus_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value == "triton" and not backends.why_not("triton"):
        pytest.skip("triton can run here")
    if variable == "FASTRAG_CPU_ISA" and (reason := backends.why_not("cpp")):
        pytest.skip(reason)
    monkeypatch.setenv(variable, value)
    model = tiny.rag_model()
    encoder: Any = model.passage_encoder
    monkeypatch.setattr(type(encoder), "forward", None)
    with pytest.raises((RuntimeError, ValueError), match=message):
        indexing.build_index(
            tmp_path / "index",
            tiny.passages(2),
            encoder,
            tiny.processor(),
            progress=False,
        )
    assert not (tmp_path / "index").exists()
