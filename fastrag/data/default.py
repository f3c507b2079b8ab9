"""The embedded default data set: real-world facts that need nothing downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
from importlib import resources

from fastrag.data.readers import Passage, Question, read_passages, read_questions
from fastrag.messages import shown

SPLITS = ("train", "dev", "test", "dev_unseen_wording", "test_unseen_wording")


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultDataset:
    """A corpus and its questions by split.

    Args:
        passages: the corpus, in row order.
        questions: split name to questions.
    """

    passages: list[Passage]
    questions: dict[str, list[Question]]


def default_dataset() -> DefaultDataset:
    """Reads the facts that ship with the package.

    Returns:
        passages, and questions under `train`, `dev`, `test`, `dev_unseen_wording` and
        `test_unseen_wording`; `Question.meta` holds `field` and `wording`.

    Raises:
        ValueError: the package data are missing, or a question names another split.

    Example:
        >>> dataset = default_dataset()
        >>> sorted(dataset.questions)
        ['dev', 'dev_unseen_wording', 'test', 'test_unseen_wording', 'train']
    """
    folder = resources.files("fastrag.data") / "facts"
    with contextlib.ExitStack() as stack:
        passages_path, questions_path = (
            stack.enter_context(resources.as_file(folder / name))
            for name in ("passages.jsonl.xz", "questions.jsonl.xz")
        )
        passages = list(read_passages(passages_path))
        questions: dict[str, list[Question]] = {split: [] for split in SPLITS}
        for question in read_questions(questions_path):
            split = question.meta.get("split")
            if split not in questions:
                raise ValueError(
                    f"{questions_path.name}: question {shown(question.id)}: expected a split of "
                    f"{list(SPLITS)}, got {shown(split)}"
                )
            questions[split].append(question)
    return DefaultDataset(passages, questions)
