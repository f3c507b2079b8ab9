"""Build an index of N passages from a TSV file with an encoder of random weights.

    python -m tests.train.build_memory FOLDER N DIM [BLOCK_SIZE [DTYPE]]

Prints a line of JSON: seconds, and the peak of the memory that is the process's own, in MiB, above
what it had before the build. Mapped files and the page cache do not count: the system takes their
pages back when it needs memory.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from fastrag.data.default import load_passages
from fastrag.index.passage_writer import BLOCK_ROWS
from fastrag.train import indexing
from tests import tiny


class Encoder(torch.nn.Module):
    """The mean of random word vectors."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.EmbeddingBag(tiny.VOCAB, dim)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.words(input_ids, per_sample_weights=None) * attention_mask.sum(1, keepdim=True)


def own_mib() -> float:
    """Memory of this process without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("RssAnon: expected it in /proc/self/status")


def write_corpus(path: Path, n: int) -> None:
    words = tiny.WORDS
    with path.open("w") as file:
        file.write("id\ttext\ttitle\n")
        for i in range(n):
            text = " ".join(
                words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(8 + i % 17)
            )
            file.write(f"{i}\t{text}\t{words[i % len(words)]}\n")


def main(
    folder: Path, n: int, dim: int, block_size: int = BLOCK_ROWS, dtype: str = "float32"
) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / f"{n}.tsv"
    write_corpus(corpus, n)
    processor, encoder = tiny.processor(), Encoder(dim)
    peak = start = own_mib()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, own_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    index, _ = indexing.build_index(
        folder / f"index{n}",
        load_passages(str(corpus)),
        encoder,
        processor,
        batch_size=512,
        block_size=block_size,
        dtype=dtype,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    figures = {"n": len(index), "dim": index.dim, "dtype": dtype, "seconds": round(seconds, 1)}
    figures |= {"start_mib": round(start), "peak_mib": round(peak - start)}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), *sys.argv[5:])
