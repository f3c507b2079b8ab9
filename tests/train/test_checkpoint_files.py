"""A run resumes from exactly what it wrote: altered, truncated and foreign files are named."""

from __future__ import annotations

import json
import pickle  # noqa: TID251  (written, never read)
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from fastrag import FlatIndex, manifests
from fastrag.train import RagTrainer
from fastrag.train import checkpoint_contents as contents
from fastrag.train import checkpoints as module
from tests import tiny

WRITTEN = (
    *("model.safetensors", "frozen.json", "index.json", "index/manifest.json"),
    *("refresher.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
)
PICKLES = ("refresher.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def make_trainer(run: Path, refresh: str = "every:2") -> RagTrainer:
    arguments = TrainingArguments(
        str(run), max_steps=3, save_steps=2, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    model = tiny.rag_model(train_passage_encoder=True)
    return RagTrainer(model, arguments, tiny.collator(), tiny.questions(), refresh=refresh)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RagTrainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder).train()
    return make_trainer(folder), folder / "checkpoint-2"


@pytest.fixture
def checkpoint(run: tuple[RagTrainer, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(run[1], tmp_path / "checkpoint-2"))


@pytest.fixture
def resume(run: tuple[RagTrainer, Path], checkpoint: Path) -> Callable[[], Any]:
    return lambda: run[0].train(resume_from_checkpoint=str(checkpoint))


class Hostile:
    """A pickle that would run a function when it is loaded."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the pickle was run')",))


def test_the_manifest_lists_every_file(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / module.MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(WRITTEN)
    contents.check_files(checkpoint)


@pytest.mark.parametrize("name", WRITTEN)
def test_one_bit_anywhere_is_found(checkpoint: Path, resume: Callable[[], Any], name: str) -> None:
    whole = (checkpoint / name).read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        altered = bytearray(whole)
        altered[at] ^= 0x10
        (checkpoint / name).write_bytes(altered)
        with pytest.raises(ValueError, match="expected SHA-256 [0-9a-f]{64}, got") as caught:
            resume()
        assert str(caught.value).startswith(f"{checkpoint / name}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*WRITTEN, module.MANIFEST])
@pytest.mark.parametrize("left", [0, 100, -1], ids=["empty", "cut", "one-byte-less"])
def test_a_truncated_file_is_named(
    checkpoint: Path, resume: Callable[[], Any], name: str, left: int
) -> None:
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[:left])
    if (checkpoint / name).read_bytes() == whole:
        pytest.skip("the file is shorter than that")
    with pytest.raises(ValueError, match=r"expected \d+ bytes, got|expected JSON, got") as caught:
        resume()
    assert str(caught.value).startswith(str(checkpoint / name))


def test_an_altered_manifest_is_named(checkpoint: Path, resume: Callable[[], Any]) -> None:
    path = checkpoint / module.MANIFEST
    manifest = json.loads(path.read_text())
    other = manifest | {"files": {**manifest["files"], "optimizer.pt": {"bytes": -1}}}
    for altered in (other, {**manifest, "version": 2}, {"files": {}}, [1]):
        path.write_text(json.dumps(altered))
        with pytest.raises(ValueError, match=r"manifest\.json: "):
            resume()
    del manifest["files"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: .*the manifest was altered"):
        resume()


@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.bin", "more.safetensors"])
def test_a_file_that_the_run_did_not_write_is_named(
    checkpoint: Path, resume: Callable[[], Any], name: str
) -> None:
    (checkpoint / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=f"{name}: expected only files that manifest.json lists"):
        resume()


def test_the_files_of_every_rank_are_listed(checkpoint: Path) -> None:
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(bytes(range(100)))
    module.write_manifest(checkpoint)
    contents.check_files(checkpoint)
    (checkpoint / "rng_state_1.pth").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"rng_state_1\.pth: expected SHA-256"):
        contents.check_files(checkpoint)
    contents.check_files(checkpoint, contents.MODEL_FILES)  # which an evaluation does not read


@pytest.mark.filterwarnings("ignore:.*this checkpoint has no manifest.json")
@pytest.mark.parametrize("name", [*PICKLES, "model.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("kind", ["hostile", "tensors", "cut", "text"])
def test_without_a_manifest_a_file_that_cannot_be_read_is_named(
    checkpoint: Path, resume: Callable[[], Any], name: str, kind: str
) -> None:
    (checkpoint / module.MANIFEST).unlink()
    path = checkpoint / name
    if kind == "hostile":
        path.write_bytes(pickle.dumps(Hostile()))
    elif kind == "tensors":
        torch.save([torch.zeros(3)], path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_text('{"global_step": "2"}')
    with pytest.raises(ValueError, match="expected") as caught:
        resume()
    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


def test_a_whole_checkpoint_goes_on(
    run: tuple[RagTrainer, Path], checkpoint: Path, tmp_path: Path
) -> None:
    """With a note of the user's in it; and, from before there were manifests, with a warning."""
    (checkpoint / "notes.txt").write_text("the best so far")
    first = make_trainer(tmp_path / "first")
    first.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / module.MANIFEST).unlink()
    second = make_trainer(tmp_path / "second")
    with pytest.warns(UserWarning, match=r"checkpoint-2: this checkpoint has no manifest\.json"):
        second.train(resume_from_checkpoint=str(checkpoint))
    assert first.state.global_step == second.state.global_step == 3
    tiny.same_weights(first.model, second.model)


def test_an_evaluated_checkpoint_is_checked(checkpoint: Path) -> None:
    whole = (checkpoint / contents.WEIGHTS).read_bytes()
    (checkpoint / contents.WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected SHA-256"):
        contents.check_files(checkpoint, contents.MODEL_FILES)


def test_the_manifest_is_the_last_file_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = module.write_manifest, []

    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    def spy(folder: Path) -> None:
        before = files(folder)
        write(folder)
        written.append((folder, before, files(folder) - before))

    monkeypatch.setattr(module, "write_manifest", spy)
    make_trainer(tmp_path).train()
    for folder, before, added in written:
        assert added == {module.MANIFEST}
        assert files(folder) == before - {module.UNFINISHED} | added
        manifests.unsealed(folder, json.loads((folder / module.MANIFEST).read_text()))
    assert [folder.name for folder, *_ in written] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("changing", [True, False], ids=["changing", "frozen"])
def test_a_checkpoint_hashes_the_index_at_most_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changing: bool
) -> None:
    """Saving a changing index makes the checksum that the weights' state dict contains."""
    hashed = []
    content, save = FlatIndex._content_sha256, FlatIndex.save

    def spy(index: FlatIndex, what: Callable[..., Any], *args: Any) -> Any:
        hashed.append(index.version)
        return what(index, *args)

    monkeypatch.setattr(FlatIndex, "_content_sha256", lambda index: spy(index, content))
    monkeypatch.setattr(FlatIndex, "save", lambda index, dir: spy(index, save, dir))
    trainer = make_trainer(tmp_path, refresh="every:1" if changing else "frozen")
    trainer.model.index.update(torch.tensor([0]), torch.ones(1, 16))  # it has no checksum yet
    trainer.train()
    saved = [json.loads((tmp_path / f"checkpoint-{n}" / "index.json").read_text()) for n in (2, 3)]
    assert hashed == [each["version"] for each in saved[: 2 if changing else 1]]
    assert trainer.model.index.source is None


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda state: state["param_groups"][0]["params"].pop(),
            r"expected the optimiser state of groups of \[\d+, \d+, \d+, \d+\] parameters, got \[",
        ),
        (
            lambda state: state["state"][2].update(exp_avg=torch.zeros(5, 3)),
            r"expected exp_avg of shape \[\d.*\] for parameter 2, got \[5, 3\]",
        ),
        (lambda state: state.update(masters=[]), "expected an optimiser state without .* with"),
        (lambda state: state.pop("param_groups"), r"expected .* parameters, got \[\]"),
        (lambda state: state.update(state=3), "optimizer.pt: .*int"),
    ],
    ids=["groups", "shape", "copies", "no groups", "no state"],
)
def test_an_optimiser_state_of_other_parameters_is_named(
    checkpoint: Path, resume: Callable[[], Any], alter: Callable[[Any], Any], message: str
) -> None:
    """Its file is as it was written; the optimiser of the run is another one."""
    path = checkpoint / contents.OPTIMIZER
    state = torch.load(path, weights_only=True)
    alter(state)
    torch.save(state, path)
    module.write_manifest(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        resume()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
