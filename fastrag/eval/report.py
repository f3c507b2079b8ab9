"""Reports of evaluations: one row for a model, a retriever and a decoding, as in Lewis et al. 2020.

    rows = [Row("trained", "model", evaluate(model, questions)), ...]
    write_report("results.md", rows, "data/dev.jsonl")

The suffix of the file chooses the form: a table in Markdown (`.md`) or CSV (`.csv`), all figures as
JSON (`.json`), or the answers themselves, one JSON object a line (`.jsonl`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrag.eval.calibration import Calibration
from fastrag.eval.evaluate import EvalResult, Prediction
from fastrag.eval.retrieval import Ranking
from fastrag.folders import replacing
from fastrag.messages import shown

_ANSWERS = {"em": "EM", "f1": "F1", "cover_em": "cover-EM", "nll": "NLL/token"}
_LABELS = ("model", "retriever", "marginal", "n_docs")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a report.

    Attributes:
        model: name of the model.
        retriever: "model" for the model's own retriever, or the name of another one, "bm25".
        result: what `evaluate` returned, which names the decoding.
    """

    model: str
    retriever: str
    result: EvalResult

    @property
    def labels(self) -> dict[str, str | int]:
        """The labels of the row: model, retriever, decoding and passages per answer."""
        found = (self.model, self.retriever, self.result.marginal, self.result.n_docs)
        return dict(zip(_LABELS, found, strict=True))


def to_markdown(rows: Sequence[Row], questions: str) -> str:
    """Return the answers of each row, and retrieval and reliability of each prior, as tables.

    Args:
        rows: the rows.
        questions: name of the questions.
    """
    count = int(rows[0].result.metrics["n_questions"])
    names = [name for name in _ANSWERS if any(name in row.result.metrics for row in rows)]
    answers = [
        [row.model, row.retriever, row.result.decoding]
        + [_cell(row.result, name) for name in names]
        for row in rows
    ]
    # all decodings of a model answer from the same passages
    found = {f"{row.model}, {row.retriever}": row.result for row in reversed(rows)}
    retrieval = [
        [name, *(_cell(result, name) for result in reversed(found.values()))]
        for name in _metrics(rows)
        if "@" in name or name == "ece"
    ]
    parts = [
        f"{count} questions of `{questions}`. In parentheses: 95 % bootstrap intervals over "
        "questions.",
        _table(["Model", "Retriever", "Decoding", *(_ANSWERS[name] for name in names)], answers),
        _table(["Model, retriever", *reversed(found)], retrieval),
    ]
    for name, result in reversed(found.items()):
        if result.calibration is not None:
            parts.append(f"Prior of {name}:")
            head = ["p(z|x)", "Passages", "Mean p", "Right"]
            parts.append(_table(head, reliability(result.calibration)))
    return "\n\n".join(parts) + "\n"


def reliability(calibration: Calibration) -> list[list[str]]:
    """Return the cells of a reliability table: range, passages, mean probability, share right."""
    return [
        [
            f"{each.low:.1f} – {each.high:.1f}",
            str(each.n),
            f"{each.confidence:.3f}",
            f"{each.accuracy:.3f}",
        ]
        for each in calibration.bins
        if each.n
    ]


def to_csv(rows: Sequence[Row], questions: str) -> str:
    """Return one line a row, with three columns for each metric: value, lower and upper end.

    Args:
        rows: the rows.
        questions: name of the questions.
    """
    metrics = _metrics(rows)
    columns = [f"{name}{end}" for name in metrics for end in ("", "_low", "_high")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_LABELS, "questions", "n_questions", *columns])
    for row in rows:
        cells: list[Any] = [*row.labels.values(), questions]
        cells.append(int(row.result.metrics["n_questions"]))
        for name in metrics:
            cells += [row.result.metrics.get(name, ""), *(row.result.interval(name) or ("", ""))]
        writer.writerow(cells)
    return file.getvalue()


def to_json(rows: Sequence[Row], questions: str) -> str:
    """Return all figures, with the reliability tables.

    Args:
        rows: the rows.
        questions: name of the questions.
    """
    listed = []
    for row in rows:
        result = row.result
        intervals = {name: result.interval(name) for name in result.metrics}
        bins = () if result.calibration is None else result.calibration.bins
        listed.append(
            row.labels
            | {
                "metrics": result.metrics,
                "intervals": {name: ends for name, ends in intervals.items() if ends},
                "reliability": [plain(each) for each in bins],
            }
        )
    return json.dumps({"questions": questions, "rows": listed}, indent=1) + "\n"


def to_jsonl(rows: Sequence[Row], questions: str) -> str:
    """Return the predictions of all rows, one JSON object a line.

    Args:
        rows: the rows.
        questions: name of the questions, which each prediction states itself.
    """
    return _jsonl(row.labels | plain(each) for row in rows for each in row.result.predictions)


REPORTS: dict[str, Callable[[Sequence[Row], str], str]] = {
    ".md": to_markdown,
    ".csv": to_csv,
    ".json": to_json,
    ".jsonl": to_jsonl,
}


def check_report(path: str | os.PathLike[str], name: str = "path") -> None:
    """Raise ValueError unless a report can be written at a path.

    Args:
        path: the file.
        name: what messages call it.
    """
    whole = Path(path).absolute()
    if whole.suffix not in REPORTS:
        raise ValueError(f"{name}: expected a name ending in {list(REPORTS)}, got {shown(path)}")
    if whole.is_dir() or not whole.parent.is_dir():
        raise ValueError(f"{name}: expected a file in an existing folder, got {shown(path)}")


def write_report(path: str | os.PathLike[str], rows: Sequence[Row], questions: str) -> None:
    """Write a report in the form that the suffix of the file names, whole or not at all.

    Args:
        path: the file, one of `.md`, `.csv`, `.json` and `.jsonl`.
        rows: at least one row.
        questions: name of the questions.

    Raises:
        ValueError: no rows, another suffix, or no such folder.
    """
    check_report(path)
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    _write(path, REPORTS[Path(path).suffix](rows, questions))


def write_records(
    path: str | os.PathLike[str], records: Iterable[Prediction] | Iterable[Ranking]
) -> None:
    """Write predictions or rankings, one JSON object a line, whole or not at all.

    Args:
        path: the file.
        records: those of `EvalResult.predictions` or `RetrievalResult.rankings`.
    """
    _write(path, _jsonl(plain(each) for each in records))


def plain(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON has them; NaN becomes None."""
    values = dataclasses.asdict(record)
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in values.items()
    }


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Return the names of all metrics but the number of questions, in the order of the rows."""
    names = dict.fromkeys(name for row in rows for name in row.result.metrics)
    return [name for name in names if name != "n_questions"]


def _cell(result: EvalResult, name: str) -> str:
    if name not in result.metrics:
        return ""
    ends = result.interval(name)
    value = f"{result.metrics[name]:.3f}"
    return value if ends is None else f"{value} ({ends[0]:.3f}–{ends[1]:.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _jsonl(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
