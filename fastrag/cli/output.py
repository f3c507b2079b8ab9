"""Output of the commands: metrics, errors in one line, warnings; transformers is kept quiet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from fastrag import terminal
from fastrag.messages import clipped, refusal

if TYPE_CHECKING:
    from fastrag.eval.report import Row

_LONGEST = (
    2000  # characters of an error: values are cut earlier, but messages of other libraries are long
)


def print_metrics(result: Any) -> None:
    """Print the metrics that a training run logs with 95 % intervals, and the decoding."""
    _print_metrics(result, list(result.summary), 12)


def print_result(result: Any) -> None:
    """Print all metrics with 95 % bootstrap intervals, and the reliability of the prior."""
    from fastrag.eval.report import reliability

    _print_metrics(result, list(result.metrics), 18)
    if result.calibration is not None:
        print("p(z|x)       passages    mean p     right")
        for between, n, mean, right in reliability(result.calibration):
            print(f"{between}{n:>12}{mean:>10}{right:>10}")


def _print_metrics(result: Any, names: list[str], room: int) -> None:
    count = int(result.metrics["n_questions"])
    print(f"{'metric':<{room}}{'value':>8}   95 % interval   ({count} questions)")
    for name in names:
        value, ends = result.metrics[name], result.interval(name)
        if name == "n_questions":
            continue
        if ends is None:
            print(f"{name:<{room}}{value:>#8.5g}")
        else:
            print(f"{name:<{room}}{value:>8.3f}   {ends[0]:.3f} – {ends[1]:.3f}")
    print(f"decoding: {result.decoding}")


def print_rows(rows: Sequence[Row]) -> None:
    """Print one line for each row of a report, with the metrics that fit 80 columns."""
    recalls = [name for name in rows[0].result.metrics if name.startswith("recall@")]
    widths = {
        name: max(7, len(name) + 1) for name in ("em", "f1", "cover_em", *recalls[-1:], "nll")
    }
    heads = "".join(f"{name:>{room}}" for name, room in widths.items())
    print(f"{'model':<11}{'retriever':<10}{'decoding':<18}{heads}")
    for row in rows:
        metrics = row.result.metrics
        cells = "".join(
            f"{f'{metrics[name]:.3f}' if name in metrics else '-':>{room}}"
            for name, room in widths.items()
        )
        model = terminal.printable(row.model)[-10:]  # the end of a path says more than its start
        print(f"{model:<11}{row.retriever:<10}{row.result.marginal:<18}{cells}")
    print(f"{int(rows[0].result.metrics['n_questions'])} questions; all measures with --out")


def print_retrieval(results: dict[str, Any], n_passages: int) -> None:
    """Print measures of retrieval with 95 % bootstrap intervals, one column per retriever.

    Args:
        results: a RetrievalResult by name of the retriever.
        n_passages: number of passages.
    """
    from fastrag.eval import bootstrap_interval
    from fastrag.index.bm25 import BM25_B, BM25_K1

    first = next(iter(results.values()))
    columns = "".join(f"{name:>10}   95 % interval" for name in results)
    print(f"{'metric':<16}{columns}")
    for name in first.values:
        cells = []
        for result in results.values():
            values = result.values[name]
            low, high = bootstrap_interval(values)
            cells.append(f"{sum(values) / len(values):>10.3f}   {low:.3f} – {high:.3f}")
        print(f"{name:<16}{''.join(cells)}")
    print(f"{len(first.rankings)} questions, {n_passages} passages. A passage is right by")
    print("gold: the question names its id; answer: it contains an accepted answer.")
    if "BM25" in results:
        print(f"BM25: k1 {BM25_K1}, b {BM25_B}, over title and text.")


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return refusal(error)
    return clipped(error, _LONGEST) or type(error).__name__


def quiet() -> None:
    """Keep transformers' notes and loading bars off the terminal; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning above the progress bars: one line, wrapped on a terminal."""
    if issubclass(category, (DeprecationWarning, FutureWarning)):
        return
    from tqdm import tqdm

    words = ["fastrag: warning:", *str(message).split()]
    room = terminal.width() if sys.stderr.isatty() else sys.maxsize
    tqdm.write("\n".join(terminal.wrap(words, room)), file=sys.stderr)
