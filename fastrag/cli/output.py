"""Output of the commands: metrics, errors in one line, warnings; transformers is kept quiet."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from fastrag import terminal
from fastrag.messages import clipped, refusal

_LONGEST = (
    2000  # characters of an error: values are cut earlier, but messages of other libraries are long
)


def print_metrics(result: Any) -> None:
    """Print a table of metrics with 95 % bootstrap intervals."""
    from fastrag.eval import bootstrap_interval

    answered = [each for each in result.predictions if each.answers]
    judged = [each.hit_rank for each in result.predictions if each.hit_rank is not None]
    print(f"{'metric':<12}{'value':>8}   95 % interval   ({len(result.predictions)} questions)")
    for name, value in result.metrics.items():
        values: list[float] = []
        if name.startswith("recall@"):
            values = [float(0 <= rank < int(name.partition("@")[2])) for rank in judged]
        elif name in ("em", "f1"):
            values = [each.exact_match if name == "em" else each.f1 for each in answered]
        if values:
            low, high = bootstrap_interval(values)
            print(f"{name:<12}{value:>8.3f}   {low:.3f} – {high:.3f}")
        elif name != "n_questions":
            print(f"{name:<12}{value:>#8.5g}")


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
