"""The six questions that the demo ends with, drawn by a rule before any setting was tuned.

`six_questions.json` holds the rule, its seed and the questions that it draws.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrag.data import Question

SIX_QUESTIONS = Path(__file__).with_name("six_questions.json")


class SixQuestions(NamedTuple):
    """The questions that end the demo.

    Attributes:
        asked: the questions, in the order in which they are asked.
        without_passage: the one that is asked again with its passage removed from the index; None
            when the test questions given do not hold it.
    """

    asked: list[Question]
    without_passage: Question | None


def six_questions(test: Sequence[Question]) -> SixQuestions:
    """Find the six questions among the test questions.

    Args:
        test: the test split, or a part of it.

    Returns:
        Those of the six that are among them.
    """
    chosen = read_six()
    by_id = {question.id: question for question in test}
    return SixQuestions(
        asked=[by_id[each] for each in chosen["questions"] if each in by_id],
        without_passage=by_id.get(chosen["passage_removed"]),
    )


def draw_six(test: Sequence[Question]) -> dict[str, Any]:
    """Apply the rule of `six_questions.json`.

    Args:
        test: the test split.

    Returns:
        `questions` and `passage_removed`, as the file must hold them.
    """
    chosen = read_six()
    draw = random.Random(chosen["seed"])
    drawn = [
        draw.choice([question.id for question in test if question.meta["field"] in fields])
        for fields in chosen["groups"]
    ]
    return {"questions": drawn, "passage_removed": draw.choice(drawn)}


def read_six() -> dict[str, Any]:
    """Read `six_questions.json`."""
    contents: dict[str, Any] = json.loads(SIX_QUESTIONS.read_text(encoding="utf-8"))
    return contents
