"""The curve of a run: loss, recall@k and answers over optimiser steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrag.train.files import replacing


def plot_curve(entries: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draw the loss on the left, recall@k, EM and F1 on the right.

    The file is replaced in one step, so that a viewer never reads half a picture.

    Args:
        entries: lines of `metrics.jsonl`: mappings with `step` and any of `loss`, `eval_loss`,
            `eval_recall@<k>`, `eval_em`, `eval_f1`.
        path: the PNG to write.

    Returns:
        True when a picture was written; False without matplotlib or without any point.

    Example:
        >>> plot_curve([], "curve.png")
        False
    """
    losses = _series(entries, "loss")
    names = {
        name
        for entry in entries
        for name in entry
        if name.startswith("eval_recall@") or name in ("eval_em", "eval_f1")
    }
    shares = {name: _series(entries, name) for name in sorted(names, key=_order)}
    if not losses[0] and not shares:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*losses, label="training", color="tab:blue")
    evaluated = _series(entries, "eval_loss")
    if evaluated[0]:
        left.plot(*evaluated, label="evaluation", color="tab:orange", marker=".")
    left.set(xlabel="step", ylabel="marginal NLL per label token")
    left.legend()
    for name, points in shares.items():
        label = name.removeprefix("eval_")
        label = label.upper() if label in ("em", "f1") else label
        # dashed: where answers are one word long, F1 is EM and would hide it
        right.plot(*points, label=label, marker=".", linestyle="--" if label == "F1" else "-")
    right.set(xlabel="step", ylim=(0.0, 1.02))
    if shares:
        right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _series(entries: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(each["step"], each[name]) for each in entries if each.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _order(name: str) -> tuple[int, int, str]:
    kind, _, k = name.partition("@")
    return (0, int(k), kind) if k.isdigit() else (1, 0, kind)
