"""Saves an index over another one again and again, each time killed at another step.

    python interruptible_save.py FOLDER KIND N_POINTS

Prints one line of JSON per point: the step's name, and what a load with all checks then found,
"old" or "new". Each save is a fork of this process, killed by SIGKILL as the step is reached; the
last line is a save that nobody killed. Blocks are made small, so that there are many steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastrag import FaissIndex, FlatIndex
from fastrag.index import inputs, storage

N, DIM = 512, 16
MAKE = {
    "float32": lambda: FlatIndex(DIM),
    "int8": lambda: FlatIndex(DIM, "int8"),
    "faiss": lambda: FaissIndex(DIM, "IVF8,Flat"),
}


def make(kind: str, sign: float) -> Any:
    index = MAKE[kind]()
    index.add(sign * torch.randn(N, DIM, generator=torch.Generator().manual_seed(0)))
    index.remove(torch.tensor([1, 2]))
    return index


def save(index: Any, folder: Path, killed_at: int) -> list[str]:
    """Saves in a fork, killed at the n-th step (from 1; 0: never); the steps it reached."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        steps = 0

        def at_step(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal steps
            if event == "fastrag.folders":
                steps += 1
                os.write(writing, f"{arguments[0]}\n".encode())
                if steps == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(at_step)
        index.save(folder)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        reached = lines.read().splitlines()
    _, status = os.waitpid(child, 0)
    expected = signal.SIGKILL if killed_at else 0
    if status != expected:
        raise RuntimeError(f"step {killed_at}: expected status {expected}, got {status}")
    return reached


def main(folder: Path, kind: str, n_points: int) -> None:
    torch.set_num_threads(1)
    storage._BLOCK_BYTES = 512
    inputs.BLOCK_BYTES = 2048
    old, new = make(kind, 1.0), make(kind, -1.0)
    checksums = {old.checksum(): "old", new.checksum(): "new"}
    old.save(folder)
    steps = save(new, folder, 0)
    # all of the steps that come once, and of the many blocks as many as there is room for
    single = [i for i, name in enumerate(steps, 1) if not name.startswith("block")]
    blocks = [i for i in range(1, len(steps) + 1) if i not in single]
    n_blocks = n_points - len(single)
    blocks = [blocks[i * len(blocks) // n_blocks] for i in range(n_blocks)]
    for at in sorted({*single, *blocks}):
        old.save(folder)
        reached = save(new, folder, at)
        found = type(old).load(folder, verify=True)
        line = {"step": reached[-1], "found": checksums[found.checksum()]}
        sys.stdout.write(json.dumps(line) + "\n")
    old.save(folder)
    save(new, folder, 0)
    line = {"step": "none", "found": checksums[type(old).load(folder, verify=True).checksum()]}
    line["beside"] = sorted(os.listdir(folder.parent))
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
