"""Progress bar of work on passages: passages and tokens per second, and the time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class PassageBar:
    """A progress bar that counts passages and tokens; a context manager.

    Args:
        name: what is done.
        total: number of passages, for the time left; None: not known.
        done: passages that are done already.
        progress: show it.
    """

    def __init__(self, name: str, total: int | None, done: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        self._n_tokens = 0
        self._bar: Any = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=" passages",
            disable=not progress,
        )

    def update(self, n_passages: int, n_tokens: int = 0) -> None:
        """Count passages and, in work on tokens, their tokens."""
        self._n_tokens += n_tokens
        if self._n_tokens and not self._bar.disable:
            elapsed = self._bar.format_dict["elapsed"] or 1.0
            rate = self._bar.format_sizeof(self._n_tokens / elapsed)
            self._bar.set_postfix_str(f"{rate} tokens/s", refresh=False)
        self._bar.update(n_passages)

    def __enter__(self) -> PassageBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
