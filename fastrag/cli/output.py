"""What commands print: metrics, errors in one line, warnings, and nothing of transformers."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from fastrag import terminal
from fastrag.messages import clipped, refusal

_LONGEST = 2000  # characters of an error: its values are cut, but other libraries write books


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
    """Print a warning above the progress bars: one line, or on a terminal as many as it takes."""
    if issubclass(category, (DeprecationWarning, FutureWarning)):
        return
    from tqdm import tqdm

    words = ["fastrag: warning:", *str(message).split()]
    room = terminal.width() if sys.stderr.isatty() else sys.maxsize
    tqdm.write("\n".join(terminal.wrap(words, room)), file=sys.stderr)
