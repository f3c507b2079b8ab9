"""Our providers at another commit and at this checkout, in alternating turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.harness.timing import Case, Result, time_cases


class CommitError(Exception):
    """The other commit cannot be checked out or built; the message says why."""


@dataclass
class Pair:
    """One case at the other commit and now."""

    before: Result
    now: Result

    @property
    def ratio(self) -> float | None:
        """Median over rounds of now / before: a slow moment of the machine affects both."""
        if not (self.before.ok and self.now.ok):
            return None
        pairs = zip(self.before.turns, self.now.turns, strict=True)
        return statistics.median(now.wall / before.wall for before, now in pairs)


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """Yield a temporary worktree of commit `ref` with its extension built."""
    commit = _run("git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", check=False)
    if not commit:
        raise CommitError(f"--base: no commit is called {ref!r} here")
    with tempfile.TemporaryDirectory(prefix="fastrag-base-") as folder:
        tree = Path(folder) / "tree"
        try:
            _run("git", "worktree", "add", "--detach", str(tree), commit.strip())
            if (tree / "csrc").is_dir():
                build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
                _run(*build, cwd=tree)
            yield tree
        finally:
            _run("git", "worktree", "remove", "--force", str(tree), check=False)


def compare(cases: Sequence[Case], tree: Path, rounds: int) -> list[Pair]:
    """Time every case with fastrag from `tree` and with that of this checkout."""
    twice = [case for case in cases for _ in range(2)]
    results = time_cases(twice, rounds, [tree, ROOT] * len(cases))
    return [Pair(*results[i : i + 2]) for i in range(0, len(results), 2)]


def _run(*command: str, cwd: Path = ROOT, check: bool = True) -> str:
    # In a git hook these variables name the repository that the hook is about.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode and check:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CommitError(f"{' '.join(command)}: {said[-1] if said else 'failed'}")
    return done.stdout
