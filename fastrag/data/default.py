"""The embedded default data set: real-world facts, without a download."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from importlib import resources

from fastrag.data.benchmarks import (
    PASSAGES,
    QUESTIONS,
    read_benchmark,
    read_benchmark_passages,
)
from fastrag.data.readers import Passage, Question, read_passages, read_questions
from fastrag.messages import shown

DEFAULT = "default"  # what a config and the command line call this data set
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


class PassageFile:
    """A passages file that is read, in bounded memory, when it is iterated.

    Ids that occur twice are left to `PassageStore.build`. `operator.length_hint` returns the number
    of lines, from which a progress bar estimates the time left.

    Args:
        path: as `source` of `read_passages`.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> Iterator[Passage]:
        return read_passages(self._path, unique=False)

    def __length_hint__(self) -> int:
        if self._path.endswith((".gz", ".xz")):
            return NotImplemented
        try:
            with open(self._path, "rb") as file:
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        except OSError:  # iterating says why
            return NotImplemented


def default_dataset() -> DefaultDataset:
    """Read the facts that ship with the package.

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


def load_passages(source: str) -> Iterable[Passage]:
    """Read a corpus by its name in a config or on the command line, for `PassageStore.build`.

    Args:
        source: a passages file, `default` for the embedded data set, or a published data set as
            `form:path`, for example `beir:data/scifact` (see `read_benchmark_passages`).

    Returns:
        The passages; a file is a `PassageFile`.

    Raises:
        ValueError: the file is malformed.
        OSError: the file cannot be read.

    Example:
        >>> len(list(load_passages("default"))) > 1000
        True
    """
    if source == DEFAULT:
        return default_dataset().passages
    form, _, path = source.partition(":")
    return read_benchmark_passages(form, path) if form in PASSAGES else PassageFile(source)


def load_questions(source: str) -> list[Question]:
    """Read questions by their name in a config or on the command line.

    Args:
        source: a questions file, `default:<split>` for a split of the embedded data set, or a
            published data set as `form:path`, for example `popqa:data/test.tsv` (see
            `read_benchmark`).

    Returns:
        The questions in file order.

    Raises:
        ValueError: the file is malformed or empty, or there is no such split.
        OSError: the file cannot be read.

    Example:
        >>> load_questions("default:dev")[0].answers != ()
        True
    """
    if source == DEFAULT or source.startswith(f"{DEFAULT}:"):
        splits = default_dataset().questions
        split = source.partition(":")[2]
        if split not in splits:
            raise ValueError(
                f"questions: expected default:<split> with one of {', '.join(splits)}, "
                f"got {shown(source)}"
            )
        return list(splits[split])
    form, _, path = source.partition(":")
    questions = list(read_benchmark(form, path) if form in QUESTIONS else read_questions(source))
    if not questions:
        raise ValueError(f"{source}: expected at least one question, got none")
    return questions
