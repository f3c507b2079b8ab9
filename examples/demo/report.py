"""What the demo shows in the terminal: the curve, the table, answers with their passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastrag.data import Question, RagCollator
from fastrag.nn import RagModel

BAR = 24
ROWS = (
    ("recall@1", "recall@1_before", "recall@1_after"),
    ("recall@5", "recall@5_before", "recall@5_after"),
    ("exact match", "em_before", "em_after"),
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


def answers(model: RagModel, collator: RagCollator, questions: Sequence[Question]) -> str:
    """Answer questions, each with the passage that the answer came from.

    Args:
        model: the trained model.
        collator: makes its batches.
        questions: what to ask.

    Returns:
        Four lines per question.
    """
    batch = collator(questions)
    batch.pop("labels", None)
    batch.pop("valid_rows", None)
    found = model.generate(**batch, max_new_tokens=16)
    texts = model.generator_tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    blocks = []
    for question, text, row in zip(questions, texts, found.supporting_rows.tolist(), strict=True):
        expected = " or ".join(question.answers)
        blocks.append(
            f"Q  {question.question}\nA  {text.strip()}   (expected: {expected})\n"
            f"   from {model.passages.ids[row]!r}: {model.passages.text(row)}"
        )
    return "\n\n".join(blocks)
