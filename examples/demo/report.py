"""Report of the demo in the terminal: the curve, six answers with their passages, the scores."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 80
BAR = 24
ROWS = (
    ("recall@1: the right passage first", "recall@1_before", "recall@1_after"),
    ("recall@5: among the first five", "recall@5_before", "recall@5_after"),
    ("exact match: the right answer", "em_before", "em_after"),
    ("exact match, unseen wording", None, "em_unseen_wording"),
    ("exact match, gold passage deleted", None, "em_gold_removed"),
)


def curve(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw recall@1 and EM over steps with bars of text.

    Args:
        entries: the lines of a `metrics.jsonl`.

    Returns:
        One line per evaluation.

    Example:
        >>> print(curve([{"step": 50, "eval_recall@1": 0.5, "eval_em": 0.25}]))
          step  recall@1                         exact match
            50  ############             0.500   ######                   0.250
    """
    lines = [f"{'step':>6}  {'recall@1':<{BAR + 9}}exact match"]
    for entry in entries:
        if "eval_em" in entry:
            recall, em = entry["eval_recall@1"], entry["eval_em"]
            lines.append(f"{entry['step']:>6}  {_bar(recall)}   {_bar(em)}")
    return "\n".join(lines)


def _bar(share: float) -> str:
    return f"{'#' * round(share * BAR):<{BAR}} {share:.3f}"


def table(summary: Mapping[str, Any]) -> str:
    """The figures of a run on the test questions, before and after joint training.

    Args:
        summary: what `summary.json` holds.

    Returns:
        A table of text.
    """
    lines = [f"{'held-out facts (test)':<36}{'before':>8}{'after':>8}"]
    for label, before, after in ROWS:
        first = f"{summary[before]:.3f}" if before else ""
        lines.append(f"{label:<36}{first:>8}{summary[after]:>8.3f}")
    lines.append(
        f"seed {summary['seed']}, {summary['steps']} joint steps, "
        f"{summary['train_seconds']:.0f} s of training"
    )
    return "\n".join(lines)


def answers(entries: Sequence[Mapping[str, Any]], without_passage: Mapping[str, Any] | None) -> str:
    """Show the six questions with their passages and answers.

    Args:
        entries: one per question: `question`, `expected`, `answer`, `correct`, and the best
            passage before and after joint training as `before` and `after`.
        without_passage: the same, without `before`, for the question that was asked once more
            after its passage had been removed from the index.

    Returns:
        Text of at most `WIDTH` columns.
    """
    lines = [
        f"{len(entries)} test questions, drawn by a rule before any setting was tuned;",
        "before and after: the passage ranked first before and after joint training",
    ]
    for number, entry in enumerate(entries, 1):
        lines += ["", f"{number}  {entry['question']}", *_passage("before", entry["before"])]
        lines += [*_passage("after", entry["after"]), *_verdict(entry)]
    if without_passage is not None:
        lines += [
            "",
            "The same model, the passage of this question removed from the index: an answer",
        ]
        lines += ["is read there or not at all, so this one must be wrong", ""]
        lines += [f"   {without_passage['question']}"]
        lines += [*_passage("now", without_passage["after"]), *_verdict(without_passage)]
    return "\n".join(lines)


def _passage(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"   {label:<8}", subsequent_indent=" " * (3 + 8)
    )


def _verdict(entry: Mapping[str, Any]) -> list[str]:
    mark = "✓" if entry["correct"] else "✗"
    text = f"{mark} {entry['answer']}   (expected: {entry['expected']})"
    return _passage("answer", text)
