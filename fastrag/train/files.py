"""Files that are replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary sibling to write, which takes the file's name when the block ends.

    A reader, or a process that is killed, sees the old file or the new one; after an error in the
    block the old one stays and the sibling is gone. A symbolic link stays one: the file that it
    names is replaced.

    Args:
        path: the file to appear or to be replaced.

    Yields:
        The path to write to.

    Example:
        >>> with replacing("curve.txt") as temporary:            # doctest: +SKIP
        ...     temporary.write_text("loss 0.5")
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
