"""The metrics file, the curve, the terminal line and the collator's own random draws."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastrag.data import Question
from fastrag.freshness import IndexRefresher
from fastrag.train import MetricsFileCallback, RefreshCallback, TerminalCallback, plot_curve
from fastrag.train.batches import ResumableCollator
from fastrag.train.callbacks import CurveCallback, read_metrics
from tests import tiny


def at(step: int) -> Any:
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def test_metrics_file_of_a_new_run_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 4, "loss": 9.0}\n')
    callback = MetricsFileCallback(path)
    callback.on_log(None, at(0), None, {"eval_em": 0.0})  # evaluated before training
    assert read_metrics(path) == [{"step": 4, "loss": 9.0}]
    callback.on_train_begin(None, at(0), None)
    callback.on_log(None, at(1), None, {"loss": torch.tensor(2.0), "kl": float("nan")})
    assert read_metrics(path) == [
        {"step": 0, "eval_em": 0.0},
        {"step": 1, "loss": 2.0, "kl": None},
    ]


def test_metrics_file_of_a_resumed_run_is_cut_at_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (0, 1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 4, "lo')
    callback = MetricsFileCallback(path)
    callback.on_train_begin(None, at(2), None)
    callback.on_log(None, at(3), None, {"loss": 30.0})
    assert [(each["step"], each["loss"]) for each in read_metrics(path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Title, every series, and legends that cover no point; what has no point gets no axes."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    entries = [training_log(step=i, loss=5.0 / (1 + i)) for i in range(20)]
    metrics = {"eval_recall@20": 0.9, "eval_recall@1": 0.3, "eval_em": 0.2, "eval_f1": 0.2}
    entries += [{"step": i, "eval_loss": 2.0} | metrics for i in range(0, 20, 5)]
    entries.append({"step": 19, "eval_em": None, "eval_best_em": 0.5})
    entries.append({"step": 19, "staleness": 0.25, "staleness_retrieved": 0.5, "overlap@10": 0.9})
    path = tmp_path / "$my run$" / "curve.png"
    assert plot_curve(entries, path) and imread(path).ndim == 3
    [figure] = saved
    assert figure.get_suptitle() == "$my run$, 19 steps"
    legends = {each: each.get_legend() for each in figure.axes if each.get_legend()}
    named = [[text.get_text() for text in legend.get_texts()] for legend in legends.values()]
    assert named == [
        ["training", "evaluation"],
        ["recall@1", "recall@20", "EM", "F1"],
        ["entropy of the prior", "KL (right)"],
        ["all passages", "retrieved passages", "overlap@10 (right)"],
    ]
    lines = {line.get_label(): line for each in figure.axes for line in each.lines}
    assert {lines[name].get_ydata()[0] for name in ("KL (right)", "recall@1")} == {0.01234, 0.3}
    for axes, legend in legends.items():
        assert not axes.bbox.overlaps(legend.get_window_extent())
    assert plot_curve([{"step": 1, "loss": 2.0, "kl": None}], tmp_path / "loss.png")
    assert [each.get_ylabel() for each in saved[1].axes] == ["marginal NLL per label token"]
    assert not plot_curve([{"step": 1, "other": 2.0}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_curve_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Figure, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    curve = CurveCallback(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    with pytest.warns(UserWarning, match=r"curve\.png: the curve is not drawn: No space left"):
        curve.draw()


def training_log(**changes: Any) -> dict[str, Any]:
    logs = {"loss": 2.345678, "grad_norm": 3.0, "learning_rate": 1e-4, "prior_entropy": 1.38629}
    logs |= {"posterior_entropy": 1.2, "kl": 0.01234, "unique_passages": 412}
    logs |= {"passages_cut": 0.71, "retriever_lr": 1e-5, "steps_per_second": 8.5, "epoch": 1.0}
    return logs | changes


def test_the_line_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = TerminalCallback.line(training_log(), 20)
    assert line == "step 20  loss 2.3457  entropy 1.386  kl 0.0123  unique 412  cut 71 %"
    # what is learned late shows, and a long run still has one line a log
    late = [TerminalCallback.line(training_log(loss=loss), 10**6) for loss in (0.012345, 0.012339)]
    assert late[0] != late[1] and all(len(each) <= 80 for each in late)
    assert "loss nan" in TerminalCallback.line(training_log(loss=math.nan), 20)
    assert "loss 0.5000" in TerminalCallback.line(training_log(loss=0.5), 20)


def test_the_line_of_an_evaluation_has_no_raw_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shares = {"recall@1": 0.5, "recall@5": 1.0, "em": 0.25, "f1": 0.3333}
    metrics = {f"eval_{name}": value for name, value in shares.items()}
    metrics |= {"eval_n_questions": 200.0, "eval_loss": 2.345678, "eval_runtime": 3.2, "epoch": 1.0}
    words = "recall@1 0.500  recall@5 1.000  em 0.250  f1 0.333  loss 2.3457"
    assert TerminalCallback.line(metrics, 20) == f"step 20  {words}"
    best = {name.replace("eval_", "eval_best_"): value for name, value in metrics.items()}
    lines = TerminalCallback.line(best, 20).splitlines()
    assert " ".join(lines).split() == f"step 20 best: {words}".split()
    assert all(len(each) <= 80 for each in lines)
    end = {"train_runtime": 75.2, "train_samples_per_second": 9.5, "train_loss": 3.87}
    assert TerminalCallback.line(end, 20) == "step 20  trained for 01:15"
    assert TerminalCallback.line({"mine": 0.123456, "epoch": 1.0}, 3) == "step 3  mine 0.1235"


def test_the_refresher_gets_the_step_and_what_was_retrieved() -> None:
    """It observes training steps only, and adds its figures to the log."""
    model, seen = tiny.rag_model(train_passage_encoder=True), []

    class Refresher(IndexRefresher):
        def step(self, step: int, retrieved: Any = None, encoder: Any = None) -> None:
            seen.append(step)

        def observe(self, retrieved: Any) -> None:
            seen.append(retrieved)

        def summary(self, step: int) -> dict[str, float]:
            return {"staleness": 0.25}

    callback = RefreshCallback(Refresher(model, "rolling:3"))
    callback.on_train_begin(None, at(0), None)
    for step, training in enumerate((True, False), start=1):
        model.train(training)(**tiny.batch())
        callback.on_step_end(None, at(step), None)
    callback.on_train_end(None, at(2), None)
    model.train()(**tiny.batch())
    callback.on_step_end(None, at(3), None)
    [retrieved, *steps] = seen
    assert steps == [1, 2, 3] and retrieved.hits.rows.shape == (4, 3)
    logs, evaluation = {"loss": 1.0}, {"eval_em": 0.5}
    for each in (logs, evaluation):
        callback.on_log(None, at(3), None, each)
    assert logs == {"loss": 1.0, "staleness": 0.25} and evaluation == {"eval_em": 0.5}


def test_random_answers_depend_on_seed_epoch_and_batch_alone() -> None:
    questions = [Question(q.id, q.question, answers=tuple(tiny.COLOURS)) for q in tiny.questions()]
    collator = ResumableCollator(tiny.collator(answer_choice="random"), seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = collator(questions)["labels"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(collator(questions)["labels"], first)
    assert not torch.equal(collator(questions[::-1])["labels"].flip(0), first)
    collator.epoch = 1
    assert not torch.equal(collator(questions)["labels"], first)
