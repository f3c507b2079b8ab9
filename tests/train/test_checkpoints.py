"""Checkpoint folders: whole or absent, rotation, and refusal of what does not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def test_commit_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    for text in ("old", "new"):
        folder = module.begin_folder(target)
        (folder / "file").write_text(text)
        if text == "new":
            assert (target / "file").read_text() == "old"
        module.commit_folder(target)
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("again", ["resumed", "another is written"])
def test_killed_between_the_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    target = complete(tmp_path, 1)
    module.begin_folder(target)
    rename = os.rename

    def killed(source: Path, destination: Path) -> None:
        if Path(destination) == target:
            raise KeyboardInterrupt
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            module.commit_folder(target)
    assert not target.exists()
    if again == "another is written":
        module.begin_folder(target)
        assert (target / module.STATE).is_file()
    module.remove_leftovers(tmp_path)
    assert module.checkpoints(tmp_path) == [target]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


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
    module.write_weights(model, tmp_path)
    stored = load_file(tmp_path / module.WEIGHTS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() & dict(model.named_parameters()).keys() == trained
    assert not any(name.startswith("passage_encoder.model.e") for name in trained)
    other = tiny.rag_model(learn_tau=True)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    module.read_weights(other, tmp_path)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_weights_of_another_configuration(tmp_path: Path) -> None:
    module.write_weights(tiny.rag_model(), tmp_path)
    other = tiny.rag_model("causal")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"model.safetensors: checkpoint of another configuration"):
        module.read_weights(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="another configuration: log_tau expected shape"):
        module.read_weights(tiny.rag_model(learn_tau=True), tmp_path)


def test_index_by_reference_and_whole(tmp_path: Path) -> None:
    model = tiny.rag_model()
    module.write_index(model, tmp_path, changing=False, refreshed_at=7)
    assert module.read_index(model, tmp_path) == 7
    assert not (tmp_path / "index").exists()
    source = model.index.source
    module.write_index(model, tmp_path, changing=True, refreshed_at=9)
    assert model.index.source == source  # the folder is renamed later
    expected = model.index.index_emb.clone()
    model.index.update(torch.tensor([0]), torch.ones(1, 16))
    assert module.read_index(model, tmp_path) == 9
    assert torch.equal(model.index.index_emb, expected)


def test_damaged_json_names_the_line(tmp_path: Path) -> None:
    (tmp_path / module.INDEX).write_text('{\n"kept": \n')
    with pytest.raises(ValueError, match=r"index\.json:3: "):
        module.read_index(tiny.rag_model(), tmp_path)
