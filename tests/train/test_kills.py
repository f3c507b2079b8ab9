"""SIGKILL at named points of a run with rolling refresh: after it, only whole checkpoints count.

The points are those of a training step, of each file of checkpoint 4, of the deletion of checkpoint
2, and of a resume. The resumed run has the losses of a run that nobody kills, and its last
checkpoint has the same bytes. Runs are forks of this process, which start without loading anything.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from fastrag import manifests
from fastrag.data import Passage, Question
from fastrag.freshness import IndexRefresher
from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import RagModel
from fastrag.train import RagTrainer, checkpoint_contents, checkpoints
from fastrag.train.callbacks import CurveCallback, read_metrics
from tests import tiny
from tests.children import in_child

N_STEPS = 6


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU, a fork of this process cannot run backward"
)


class Point(NamedTuple):
    """A point where the process is killed.

    Attributes:
        name: what has just happened, or is about to; see `Points`.
        step: step of the trainer at that time.
        newest: step of the newest checkpoint that counts then; 0: none.
        resumed: whether it is reached in a resumed run, after a kill in step 5.
    """

    name: str
    step: int
    newest: int
    resumed: bool = False


QUICK = (
    Point("inside optimizer.pt", 4, 2),
    Point("remove 3 of checkpoint-2", 6, 6),
    Point("after reading the index", 0, 4, resumed=True),
)
SLOW = (
    Point("start", 0, 0),
    Point("before the forward pass", 0, 0),
    Point("before the forward pass", 4, 4),
    Point("after the backward pass", 4, 4),
    Point("after the optimiser step", 4, 4),
    Point("before the refresh", 5, 4),
    Point("before the rows are written", 5, 4),
    Point("after the rows are written", 5, 4),
    Point("after the refresh", 5, 4),
    Point("before checkpoint-4", 4, 2),
    Point("open checkpoint-4", 4, 2),
    Point("synced checkpoint-4", 4, 2),
    Point("in checkpoint-4", 4, 2),
    Point("open index", 4, 2),
    Point("block vectors index", 4, 2),
    Point("manifest index", 4, 2),
    Point("in index", 4, 2),
    Point("inside index.json", 4, 2),
    Point("before model.safetensors", 4, 2),
    Point("inside model.safetensors", 4, 2),
    Point("after frozen.json", 4, 2),
    Point("inside refresher.pt", 4, 2),
    Point("after refresher.pt", 4, 2),
    Point("inside scheduler.pt", 4, 2),
    Point("inside rng_state.pth", 4, 2),
    Point("inside trainer_state.json", 4, 2),
    Point("inside manifest.json", 4, 2),
    Point("manifest checkpoint-4", 4, 2),
    Point("finished checkpoint-4", 4, 4),
    Point("withdrawn checkpoint-2", 6, 6),
    Point("deleted checkpoint-2", 6, 6),
    Point("after remove_leftovers", 0, 4, resumed=True),
    Point("after reading the refresher", 0, 4, resumed=True),
    Point("before the forward pass", 4, 4, resumed=True),
    Point("in index", 6, 4, resumed=True),
)


class Points:
    """Kills this process at a point; patches what names the points, in a forked child alone."""

    def __init__(self, trainer: RagTrainer, at: Point) -> None:
        self.trainer, self.at = trainer, at
        self.n_removed = 0
        self.deleting = False

    def reach(self, name: str) -> None:
        if (name, self.trainer.state.global_step) == (self.at.name, self.at.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, name: str, path: str) -> None:
        place = re.sub(r"^\.|\.tmp.*$", "", Path(path).name)
        self.deleting = (name, place) == ("withdrawn", "checkpoint-2")
        self.reach(f"{name} {place}")

    def audit(self, event: str, _: Any) -> None:
        if event == "os.remove" and self.deleting:
            self.n_removed += 1
            self.reach(f"remove {self.n_removed} of checkpoint-2")

    def around(self, owner: Any, name: str, before: str, after: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.reach(before)
            result = function(*args, **kwargs)
            self.reach(after)
            return result

        setattr(owner, name, wrapped)

    def writing(self, owner: Any, name: str, place: int) -> None:
        """Reach points before, inside and after the writing of a file; its path is an argument."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = Path(args[place])
            self.reach(f"before {path.name}")
            result = function(*args, **kwargs)
            if self.at.name == f"inside {path.name}" and "checkpoint" in str(path):
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                self.reach(f"inside {path.name}")
                path.write_bytes(whole)
            self.reach(f"after {path.name}")
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        sys.addaudithook(self.audit)
        self.writing(torch, "save", 1)
        self.writing(checkpoint_contents, "save_file", 1)
        self.writing(manifests, "write", 0)
        self.writing(TrainerState, "save_to_json", 1)
        for owner, name, what in (
            (IndexRefresher, "step", "the refresh"),
            (FlatIndex, "update", "the rows are written"),
            (checkpoints, "begin", "checkpoint-4"),
            (checkpoints, "remove_leftovers", "remove_leftovers"),
            (checkpoint_contents, "read_refresher", "reading the refresher"),
            (checkpoint_contents, "read_index", "reading the index"),
        ):
            self.around(owner, name, f"before {what}", f"after {what}")
        reach = self.reach

        class Steps(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                reach("start")

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                reach("before the forward pass")

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                reach("after the backward pass")

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                reach("after the optimiser step")

        self.trainer.add_callback(Steps())


class Run:
    """A model over 144 passages, whose index is in a folder, and its run in forked children."""

    def __init__(self, root: Path) -> None:
        self.root = root
        pairs = [(name, colour) for name in tiny.NAMES for colour in tiny.COLOURS]
        passages = [Passage(f"p{i}", *pair) for i, pair in enumerate(pairs)]
        parts = (tiny.encoder(), tiny.encoder(), tiny.t5())
        store = PassageStore.build(passages, tiny.processor())
        made = FlatIndex(parts[0].dim)
        self.model = RagModel(
            *parts,
            made,
            store,
            tiny.processor(max_context=32),
            n_docs=3,
            explore=1,
            learn_tau=True,
            train_passage_encoder=True,
        )
        self.model.refresh_index()
        self.model.index.save(root / "base")
        self.model.index = FlatIndex.load(root / "base")
        self.questions = [
            Question(f"q{i}", name, (colour,)) for i, (name, colour) in enumerate(pairs[::5])
        ]

    def trainer(self, folder: Path, model: RagModel | None = None) -> RagTrainer:
        arguments = TrainingArguments(
            str(folder),
            max_steps=N_STEPS,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=2,
            save_total_limit=2,
            learning_rate=5e-3,
            warmup_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = RagTrainer(
            (model or self.model).train(),
            arguments,
            tiny.collator(),
            self.questions,
            refresh="rolling:2+map+write-back",
        )
        trainer.remove_callback(CurveCallback)  # most of the time of such a short run
        return trainer

    def go(self, folder: Path, at: Point | None = None, *, resume: bool = False) -> int:
        """Train in a child up to a point, or to the end; its status."""
        points: list[Points] = []

        def act() -> None:
            trainer = self.trainer(folder)
            if at is not None:
                points.append(Points(trainer, at))
                points[0].install()
            trainer.train(resume_from_checkpoint=resume or None)

        def at_step(name: str, path: str) -> None:
            for each in points:
                each.step(name, path)

        return in_child(act, at_step)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("kills"))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the forks: sums depend on it
    # In this process, because much is imported in a first run, and the forks need not do it again.
    made.trainer(made.root / "whole", copy.deepcopy(made.model)).train()
    torch.set_num_threads(n_threads)
    return made


def losses(folder: Path) -> list[float]:
    return [each["loss"] for each in read_metrics(folder / "metrics.jsonl") if "loss" in each]


def written(folder: Path) -> dict[str, Any]:
    """The checksum of each file of the last checkpoint; that of the trainer contains times."""
    last = folder / f"checkpoint-{N_STEPS}"
    files = json.loads((last / checkpoints.MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name != checkpoints.STATE}


def check(run: Run, folder: Path, at: Point) -> None:
    if at.resumed:
        assert run.go(folder, Point("after the refresh", 5, 4)) == signal.SIGKILL
    assert run.go(folder, at, resume=at.resumed) == signal.SIGKILL
    found = checkpoints.checkpoints(folder)
    assert [path.name for path in found[-1:]] == [f"checkpoint-{at.newest}"] * bool(at.newest)
    for path in found:
        checkpoint_contents.check_files(path)
    assert run.go(folder, resume=bool(found)) == 0
    assert losses(folder) == losses(run.root / "whole")
    assert written(folder) == written(run.root / "whole")
    names = {path.name for path in folder.iterdir()}
    assert {"checkpoint-4", "checkpoint-6"} == {name for name in names if "checkpoint" in name}
    assert not [name for name in names if name.startswith(".") or name == "lock"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs do not wait for the disk, which only a power cut needs."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_three_kills(run: Run, tmp_path: Path) -> None:
    """The index is kept in both ways, and searched through a map."""
    saved = [run.root / "whole" / f"checkpoint-{step}" for step in (4, 6)]
    kept = [json.loads((folder / "index.json").read_text())["kept"] for folder in saved]
    assert kept == ["changes", "whole"] and len(losses(run.root / "whole")) == N_STEPS
    assert all((folder / checkpoint_contents.INDEX_MAP).is_file() for folder in saved)
    for i, point in enumerate(QUICK):
        check(run, tmp_path / str(i), point)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("index/vectors.npy", marks=pytest.mark.slow),
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        "optimizer.pt",
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(run: Run, tmp_path: Path, file: str) -> None:
    """Files cannot grow beyond a size from the beginning of checkpoint 4 on."""
    folder, said = tmp_path / "run", tmp_path / "said"
    room = (run.root / "whole" / "checkpoint-4" / file).stat().st_size - 1

    def act() -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        trainer, begin = run.trainer(folder), checkpoints.begin

        def fill(target: Path) -> None:
            begin(target)
            if target.name == "checkpoint-4":
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))

        checkpoints.begin = fill
        try:
            trainer.train()
        except ValueError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            said.write_text(str(error))

    assert in_child(act, lambda name, path: None) == 0
    beginning = f"{folder}/checkpoint-4: expected room for a checkpoint in a writable folder, got "
    assert said.read_text().startswith(beginning)
    assert said.read_text().endswith(f"; resume from {folder}/checkpoint-2")
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-2"]
    assert run.go(folder, resume=True) == 0
    assert losses(folder) == losses(run.root / "whole")
    assert written(folder) == written(run.root / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("at", SLOW, ids=str)
def test_killed_anywhere(run: Run, tmp_path: Path, at: Point) -> None:
    check(run, tmp_path / "run", at)
