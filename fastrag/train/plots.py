"""The curve of a run: loss, quality of the answers, and retrieval, over optimiser steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrag.folders import replacing

Entries = Sequence[dict[str, Any]]


def plot_curve(entries: Entries, path: str | os.PathLike[str]) -> bool:
    """Draw the loss, then recall@k, EM and F1, then entropy of the prior and KL, then staleness.

    The file is replaced in one step, so that a viewer never reads half a picture.

    Args:
        entries: lines of `metrics.jsonl`: mappings with `step` and any of `loss`, `eval_loss`,
            `eval_recall@<k>`, `eval_em`, `eval_f1`, `prior_entropy`, `kl`, `staleness`,
            `staleness_retrieved`, `overlap@<k>`. A panel without points is left out.
        path: the PNG to write; the title names its folder.

    Returns:
        True when a picture was written; False without matplotlib or without any point.

    Example:
        >>> plot_curve([], "curve.png")
        False
    """
    panels = [draw for draw, names in _PANELS if any(map(names, _names(entries)))]
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4.8 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    n = entries[-1]["step"]
    title = f"{Path(path).absolute().parent.name}, {n} step{'s' if n != 1 else ''}"
    figure.suptitle(title, parse_math=False)  # a folder's name may contain dollar signs
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        lines = draw(axes, entries)
        axes.set(xlabel="step")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend(  # above the axes, where it covers no point
            handles=lines,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=5,
            frameon=False,
            fontsize="small",
            handlelength=1.2,
            columnspacing=1.0,
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _draw_loss(axes: Any, entries: Entries) -> list[Any]:
    axes.set(ylabel="marginal NLL per label token")
    return [
        *_line(axes, entries, "loss", "training", "tab:blue"),
        *_line(axes, entries, "eval_loss", "evaluation", "tab:orange", marker="."),
    ]


def _draw_shares(axes: Any, entries: Entries) -> list[Any]:
    axes.set(ylabel="share of the evaluation questions", ylim=(-0.02, 1.02))
    lines = []
    for name in sorted(filter(_is_share, _names(entries)), key=_order):
        label = name.removeprefix("eval_")
        label = label.upper() if label in ("em", "f1") else label
        # dashed: where answers are one word long, F1 is EM and would hide it
        style = "--" if label == "F1" else "-"
        lines += _line(axes, entries, name, label, marker=".", linestyle=style)
    return lines


def _draw_retriever(axes: Any, entries: Entries) -> list[Any]:
    right = axes.twinx()  # KL is often a hundredth of the entropy
    lines = [
        *_line(axes, entries, "prior_entropy", "entropy of the prior", "tab:blue"),
        *_line(right, entries, "kl", "KL (right)", "tab:red"),
    ]
    axes.set(ylabel="entropy, nats")
    right.set(ylabel="KL(posterior ‖ prior), nats")
    for each in filter(lambda each: each.lines, (axes, right)):
        each.set_ylim(0.0, 1.05 * each.dataLim.ymax or 1.0)
    return lines


def _draw_staleness(axes: Any, entries: Entries) -> list[Any]:
    right = axes.twinx()
    lines = [
        *_line(axes, entries, "staleness", "all passages", "tab:blue"),
        *_line(axes, entries, "staleness_retrieved", "retrieved passages", "tab:orange"),
    ]
    for name in sorted(filter(_is_overlap, _names(entries)), key=_order):
        lines += _line(right, entries, name, f"{name} (right)", "tab:green", marker=".")
    axes.set(ylabel="1 − cos(stored, fresh vector)")
    right.set(ylabel="share of the nearest that stay", ylim=(-0.02, 1.02))
    if axes.lines:
        axes.set_ylim(0.0, 1.05 * axes.dataLim.ymax or 1.0)
    return lines


def _line(
    axes: Any, entries: Entries, name: str, label: str, color: Any = None, **style: Any
) -> Any:
    points = [(each["step"], each[name]) for each in entries if each.get(name) is not None]
    if len(points) == 1:  # a line alone would not show
        style["marker"] = "."
    return (
        axes.plot(*zip(*points, strict=True), label=label, color=color, **style) if points else []
    )


def _names(entries: Entries) -> set[str]:
    """Return the names that have a point."""
    return {name for entry in entries for name, value in entry.items() if value is not None}


def _is_share(name: str) -> bool:
    return name.startswith("eval_recall@") or name in ("eval_em", "eval_f1")


def _is_overlap(name: str) -> bool:
    return name.startswith("overlap@")


_PANELS: tuple[tuple[Callable[[Any, Entries], list[Any]], Callable[[str], bool]], ...] = (
    (_draw_loss, lambda name: name in ("loss", "eval_loss")),
    (_draw_shares, _is_share),
    (_draw_retriever, lambda name: name in ("prior_entropy", "kl")),
    (_draw_staleness, lambda name: name.startswith("staleness") or _is_overlap(name)),
)


def _order(name: str) -> tuple[int, int, str]:
    kind, _, k = name.partition("@")
    return (0, int(k), kind) if k.isdigit() else (1, 0, kind)
