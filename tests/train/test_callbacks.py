"""The metrics file, the curve, the terminal line and the collator's own random draws."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastrag.data import Question
from fastrag.train import MetricsFileCallback, RefreshCallback, TerminalCallback, plot_curve
from fastrag.train.callbacks import CurveCallback, read_metrics
from fastrag.train.collation import ResumableCollator
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


def test_plot_curve_draws_loss_and_metrics(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"step": i, "loss": 5.0 / (1 + i)} for i in range(20)]
    plot_curve(entries, tmp_path / "loss.png")
    entries += [
        {"step": i, "eval_recall@1": i / 20, "eval_recall@20": 0.9, "eval_em": i / 30}
        for i in range(0, 20, 5)
    ]
    entries.append({"step": 19, "eval_em": None})
    assert plot_curve(entries, tmp_path / "sub" / "all.png")
    loss, whole = imread(tmp_path / "loss.png"), imread(tmp_path / "sub" / "all.png")
    assert loss.shape == whole.shape
    width = loss.shape[1] // 2
    drawn = np.abs(loss - whole).sum(axis=2) > 0.1
    assert drawn[:, width:].sum() > 1000  # metrics stand on the right
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


def test_terminal_line_is_short() -> None:
    logs = {"loss": 2.34567, "learning_rate": 1e-4, "grad_norm": 3.0, "kl": 0.01, "epoch": 1.0}
    assert TerminalCallback.line(logs, 20) == "step 20  loss 2.35  lr 0.0001  kl 0.01"
    evaluation = {"eval_recall@1": 0.5, "eval_em": 0.25, "epoch": 1.0}
    assert TerminalCallback.line(evaluation, 20) == "step 20  recall@1 0.5  em 0.25"


def test_refresh_is_called_when_due() -> None:
    calls: list[int] = []
    model: Any = SimpleNamespace(refresh_index=calls.append)
    callback = RefreshCallback(model, "every:3", batch_size=7)
    for step in range(1, 8):
        callback.on_step_end(None, at(step), None)
    assert calls == [7, 7] and callback.refreshed_at == 6
    assert callback.changing and not RefreshCallback(model).changing
    with pytest.raises(ValueError, match="refresh: expected one of"):
        RefreshCallback(model, "hourly")


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
