"""Checkpoint folders: whole or absent, rotation, and refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from fastrag import folders, manifests
from fastrag.index import FlatIndex
from fastrag.train import RagTrainer
from fastrag.train import checkpoint_contents as contents
from fastrag.train import checkpoints as module
from tests import tiny


def complete(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / module.STATE).write_text("{}")
    return folder


def test_checkpoints_are_those_with_a_state(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        complete(tmp_path, step)
    (tmp_path / "checkpoint-500").mkdir()  # cut off
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in module.checkpoints(tmp_path)] == [
        "checkpoint-3",
        "checkpoint-20",
        "checkpoint-100",
    ]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it, and nothing tidies up behind it."""


STEPS = ["open", "synced", "aside", "in", "manifest", "finished", "done"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("again", ["resumed", "another is written"])
@pytest.mark.parametrize("before", ["one is there", "none is there"])
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, again: str, before: str
) -> None:
    """The old one or the new one is whole, and neither where there was none."""
    target = tmp_path / "checkpoint-1"
    if before == "one is there":
        complete(tmp_path, 1)
    elif step == "aside":
        pytest.skip("there is none to set aside")

    def die(name: str, path: Path) -> None:
        if name == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(folders, "step", die)
        module.begin(target)
        (target / module.STATE).write_text("new")
        module.finish(target)
    finished = step in ("finished", "done")
    assert module.is_checkpoint(target) == (
        finished or (before == "one is there" and step in ("open", "synced"))
    )
    if again == "another is written" and not finished:
        module.begin(target)
        assert module.checkpoints(tmp_path) == []
    module.remove_leftovers(tmp_path)
    if before == "none is there" and not finished:
        assert not list(tmp_path.iterdir())
    else:
        assert module.checkpoints(tmp_path) == [target]
        assert (target / module.STATE).read_text() == ("new" if finished else "{}")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_unfinished_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    module.begin(tmp_path / "checkpoint-1")
    with pytest.raises(
        ValueError, match="checkpoint-1: expected a whole checkpoint, got one whose"
    ):
        contents.check_files(tmp_path / "checkpoint-1")


def test_only_checkpoints_are_tidied_up(tmp_path: Path) -> None:
    complete(tmp_path, 1)
    for name in (".model.tmp", ".index.old", "notes"):
        (tmp_path / name).mkdir()
    module.remove_leftovers(tmp_path)
    module.remove_leftovers(tmp_path / "none")
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [".index.old", ".model.tmp", "checkpoint-1", "notes"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    def names() -> list[int]:
        return [int(path.name.split("-")[1]) for path in module.checkpoints(tmp_path)]

    for step in (1, 2, 3, 4, 5):
        complete(tmp_path, step)
    module.rotate(tmp_path, None, None)
    assert names() == [1, 2, 3, 4, 5]
    module.rotate(tmp_path, 3, str(tmp_path / "checkpoint-2"))
    assert names() == [2, 4, 5]
    module.rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert names() == [2, 5]


def test_weights_hold_what_trains(tmp_path: Path) -> None:
    model = tiny.rag_model(learn_tau=True)
    contents.write_weights(model, tmp_path)
    stored = load_file(tmp_path / contents.WEIGHTS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() & dict(model.named_parameters()).keys() == trained
    assert not any(name.startswith("retriever.passage_encoder.model.e") for name in trained)
    other = tiny.rag_model(learn_tau=True)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    contents.read_weights(other, tmp_path)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_weights_of_another_configuration(tmp_path: Path) -> None:
    contents.write_weights(tiny.rag_model(), tmp_path)
    other = tiny.rag_model("causal")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"model.safetensors: checkpoint of another configuration"):
        contents.read_weights(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="another configuration: retriever.log_tau expected shape"):
        contents.read_weights(tiny.rag_model(learn_tau=True), tmp_path)


def test_index_by_reference_and_whole(tmp_path: Path) -> None:
    model = tiny.rag_model()
    contents.write_index(model, tmp_path, changing=False)
    contents.read_index(model, tmp_path)
    assert not (tmp_path / "index").exists()
    source = model.index.source
    contents.write_index(model, tmp_path, changing=True)
    assert model.index.source == source  # the folder may be deleted later
    expected = model.index.index_emb.clone()
    model.index.update(torch.tensor([0]), torch.ones(1, 16))
    contents.read_index(model, tmp_path)
    assert torch.equal(model.index.index_emb, expected)


def test_an_index_that_changes_by_the_rows_that_changed(tmp_path: Path) -> None:
    model = tiny.rag_model()
    model.index.save(tmp_path / "base")
    contents.track_index(model)
    model.index.update(torch.tensor([7]), torch.ones(1, 16))
    contents.write_index(model, tmp_path, changing=True)
    assert np.load(tmp_path / "index" / "rows.npy").tolist() == [7]
    expected, version = model.index.index_emb.clone(), model.index.version
    model.index.update(torch.tensor([0]), torch.zeros(1, 16))
    contents.read_index(model, tmp_path)
    assert torch.equal(model.index.index_emb, expected) and model.index.version == version
    contents.read_index(model.retriever, tmp_path)  # as for a search without a generator
    assert torch.equal(model.index.index_emb, expected)
    FlatIndex.load(tmp_path / "base").astype("float16").save(tmp_path / "base")
    with pytest.raises(ValueError, match=r"index: expected the index in .*/base, of which it hold"):
        contents.read_index(model, tmp_path)


def test_no_checkpoint_needs_another_one(tmp_path: Path) -> None:
    """Rotation deletes checkpoints, so the index of one is no base."""
    model = tiny.rag_model()
    model.index.save(complete(tmp_path, 1) / module.INDEX_FOLDER)
    contents.track_index(model)
    model.index.update(torch.tensor([7]), torch.ones(1, 16))
    contents.write_index(model, tmp_path, changing=True)
    assert (tmp_path / "index" / "vectors.npy").stat().st_size == 128 + 12 * 64


def test_an_index_of_another_width(tmp_path: Path) -> None:
    model = tiny.rag_model()
    narrow = FlatIndex(8)
    narrow.add(torch.ones(12, 8))
    narrow.save(tmp_path / "index")
    manifests.write(tmp_path / contents.INDEX, {"version": 1, "kept": "whole"})
    with pytest.raises(ValueError, match=r"index: index: expected vectors of width 16 .* got 8"):
        contents.read_index(model, tmp_path)


@pytest.mark.parametrize("where", ["first", "last"])
def test_resume_refuses_an_altered_index(tmp_path: Path, where: str) -> None:
    """Every size is right, so only the checksum tells; without it the run would go on astray."""

    def trainer() -> RagTrainer:
        model = tiny.rag_model(train_passage_encoder=True)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, use_cpu=True, disable_tqdm=True
        )
        return RagTrainer(model, arguments, tiny.collator(), tiny.questions(), refresh="every:2")

    trainer().train()
    checkpoint = tmp_path / "checkpoint-2"
    file = checkpoint / module.INDEX_FOLDER / "vectors.npy"
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[128 if where == "first" else -1] ^= 0x01  # the header has 128 bytes
    file.write_bytes(altered)
    message = r"checkpoint-2/index/vectors\.npy: expected SHA-256 [0-9a-f]{64}, got"
    with pytest.raises(ValueError, match=message):
        trainer().train(resume_from_checkpoint=str(checkpoint))
    file.write_bytes(whole)
    trainer().train(resume_from_checkpoint=str(checkpoint))


def test_damaged_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / contents.INDEX).write_text('{\n"kept": \n')
    with pytest.raises(ValueError, match=r"index\.json:3: "):
        contents.read_index(tiny.rag_model(), tmp_path)
