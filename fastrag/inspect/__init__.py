"""The inspector: one HTML page on what a model retrieves, reads and answers, and on its run."""

from __future__ import annotations

from fastrag.inspect.page import check_page, render_page, write_page
from fastrag.inspect.readings import Reading, read_answers
from fastrag.inspect.run import History, passage_history, read_log

__all__ = [
    "History",
    "Reading",
    "check_page",
    "passage_history",
    "read_answers",
    "read_log",
    "render_page",
    "write_page",
]
