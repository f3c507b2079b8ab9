"""`fastrag info`: versions and backends."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    info = commands.add_parser(
        "info", help="print versions and backends, and why a backend is missing"
    )
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastrag import info

    info.main()
    return 0
