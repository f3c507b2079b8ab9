"""Read the training log and the checkpoints of a run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag.eval.batches import check_evaluated, in_batches
from fastrag.inspect.charts import CHARTS
from fastrag.messages import clipped, shown
from fastrag.train.checkpoints import checkpoints
from fastrag.train.models import load_retriever

if TYPE_CHECKING:
    from fastrag.data import Question

# A chart computes with differences of its values, which stay finite.
_LARGEST = 1e300


@dataclass(frozen=True, slots=True)
class History:
    """The passages that each checkpoint of a run retrieves for each question.

    Attributes:
        steps: steps of the checkpoints, ascending.
        retrieved: for each question and each checkpoint, `(id, title)` of the passages, best first.
    """

    steps: tuple[int, ...]
    retrieved: tuple[tuple[tuple[tuple[str, str], ...], ...], ...]


def passage_history(
    run: str | os.PathLike[str],
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    k: int = 5,
    index: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> History:
    """Retrieve with each checkpoint of a run, with its own index if the run changes the index.

    Args:
        run: the run folder.
        questions: the questions.
        k: passages per question.
        index: a folder from `fastrag index build`; None: the index of each checkpoint.
        limit: only `choose_fixed(questions, limit)` of `fastrag.eval.batches`.
        batch_size: questions per batch.
        device: where questions are encoded.
        progress: show progress bars.

    Returns:
        The passages; without any step if the folder holds no checkpoint.

    Raises:
        ValueError: a checkpoint cannot be read, or as `fastrag.eval.evaluate_retrieval`.
    """
    chosen, [k] = check_evaluated(questions, batch_size, k, limit)
    found: list[list[tuple[tuple[str, str], ...]]] = [[] for _ in chosen]
    folders = checkpoints(run)
    for folder in folders:
        dense = load_retriever(folder, index)
        dense.retriever.to(device)
        passages = dense.passages
        rows: list[list[int]] = []
        with in_batches(chosen, batch_size, progress, folder.name) as batches:
            for batch in batches:
                rows += dense(batch, k).rows.tolist()
        for of_question, best in zip(found, rows, strict=True):
            of_question.append(
                tuple((passages.ids[row], passages.title(row)) for row in best if row >= 0)
            )
    steps = tuple(int(folder.name.rpartition("-")[2]) for folder in folders)
    return History(steps, tuple(map(tuple, found)))


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the `metrics.jsonl` of a run for its charts.

    Args:
        path: the file; it need not exist.

    Returns:
        The lines in file order. The last line is left out if it was cut off, because a process
        that is killed or still running leaves one.

    Raises:
        ValueError: a line is no JSON object with a step, or a value of a chart is no number.
    """
    source = Path(path)
    if not source.is_file():
        return []
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{clipped(source)}: expected UTF-8: {error}") from error
    entries = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # malformed, endless digits, or endlessly nested
            if i == len(lines):
                break
            entry = None
        _check(entry, line, f"{clipped(source)}:{i}")
        entries.append(entry)
    return entries


def _check(entry: Any, line: str, where: str) -> None:
    step = entry.get("step") if isinstance(entry, dict) else None
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        raise ValueError(f"{where}: expected a JSON object with a step, got {shown(line)}")
    for name, value in entry.items():
        if value is None or not any(chart.label_of(name) for chart in CHARTS):
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) < _LARGEST
        ):
            raise ValueError(f"{where}: {clipped(name)}: expected a number, got {shown(value)}")
