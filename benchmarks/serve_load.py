"""Measure requests per second of `fastrag serve`, searched together and one by one.

    python -m benchmarks.serve_load [--kind vectors texts] [--clients 32] [--csv serve_load.csv]

Each client sends the next request when it has the answer to the last, over a connection that stays
open. Two servers of the same index run next to each other and are loaded in alternating rounds: one
with `--max-batch 1`, which searches every request alone, one with the default. With `vectors` a
request holds a vector; with `texts` it holds a question of some ten words, for an encoder of the
shape of MiniLM with random weights. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.harness.arguments import Parser
from benchmarks.harness.measure import facts
from benchmarks.harness.results import COLUMNS, Row, add, percentile_columns, row_of
from benchmarks.harness.timing import OK, Case
from fastrag.data import Passage, RagProcessor
from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import TextEncoder

WORDS = [f"word{i}" for i in range(2000)]
TOPK = 3
COLUMNS_HERE = [*COLUMNS, "ms_p99", "requests_per_s"]
MINILM = {"num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
MODES = {"one by one": ("--max-batch", "1"), "together": ()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("serve_load", __doc__)
    parser.add_argument("--kind", choices=("vectors", "texts"), nargs="+", default=["vectors"])
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384, help="a multiple of 12 for texts")
    parser.add_argument("--clients", type=int, nargs="+", default=[32])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_csv(COLUMNS_HERE)
    chosen = parser.parse_args(argv)
    machine = facts(torch.device("cpu"))
    found = " · ".join(machine[name] for name in ("device", "torch", "commit", "date"))
    print(f"{found} · {machine['threads']} threads · N, D = {chosen.passages}, {chosen.dim}\n")
    print("| queries | clients | handling | requests/s | p50, ms | p99, ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), chosen.passages, chosen.dim)
        for kind in chosen.kind:
            with contextlib.ExitStack() as stack:
                ports = {
                    mode: stack.enter_context(server(Path(folder), kind, options))
                    for mode, options in MODES.items()
                }
                bodies = requests(kind, chosen.dim)
                for n_clients in chosen.clients:
                    rows = measure(kind, n_clients, ports, bodies, chosen, machine)
                    if chosen.csv:
                        add(chosen.csv, rows, COLUMNS_HERE)
    return 0


def measure(
    kind: str,
    n_clients: int,
    ports: dict[str, int],
    bodies: list[bytes],
    chosen: argparse.Namespace,
    machine: dict[str, str],
) -> list[Row]:
    """Load the servers in turn, print a line for each with the ratio of the two, return rows."""
    seconds: dict[str, list[float]] = {mode: [] for mode in ports}
    rates: dict[str, list[float]] = {mode: [] for mode in ports}
    for round_ in range(-1, chosen.rounds):  # the first one warms up and does not count
        for mode, port in ports.items():
            length = chosen.seconds if round_ >= 0 else 1.0
            found, passed = asyncio.run(load(port, n_clients, length, bodies))
            if round_ >= 0:
                seconds[mode] += found
                rates[mode].append(len(found) / passed)
    median = {mode: float(np.median(found)) for mode, found in rates.items()}
    shape = (n_clients, chosen.passages, chosen.dim, TOPK)
    rows = []
    for mode, found in seconds.items():
        p50, p99 = np.quantile(found, (0.5, 0.99)) * 1000
        case = Case("serve", mode.replace(" ", "-"), kind, shape, "float32", "cpu")
        values = percentile_columns([1000 * each for each in found])
        values |= {"ms_p99": f"{p99:.4f}", "requests_per_s": f"{median[mode]:.1f}"}
        rows.append(row_of(case, machine, OK, **values))
        times = f" ({median[mode] / median['one by one']:.1f} ×)" if mode != "one by one" else ""
        print(
            f"| {kind} | {n_clients} | {mode} | {median[mode]:.0f}{times} | {p50:.1f} | {p99:.1f} |"
        )
    return rows


async def load(
    port: int, n_clients: int, seconds: float, bodies: list[bytes]
) -> tuple[list[float], float]:
    """Return the seconds that each request took, and those that passed."""
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = number
        while (started := time.perf_counter()) < end:
            writer.write(bodies[at % len(bodies)])
            at += n_clients
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            answer = await reader.readexactly(int(length[1]))
            found.append(time.perf_counter() - started)
            assert answer.startswith(b'{"result": [[{"document": ')
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(n_clients)))
    return found, time.perf_counter() - started


def requests(kind: str, dim: int, n: int = 256) -> list[bytes]:
    """Return requests as they go through the socket."""
    generator = np.random.default_rng(1)
    queries: list[Any] = (
        generator.standard_normal((n, dim)).astype(np.float32).tolist()
        if kind == "vectors"
        else [" ".join(generator.choice(WORDS, 10)) for _ in range(n)]
    )
    found = []
    for query in queries:
        body = json.dumps({"queries": [query], "topk": TOPK, "return_scores": True}).encode()
        head = f"POST /retrieve HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        found.append(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    return found


@contextlib.contextmanager
def server(folder: Path, kind: str, options: Sequence[str]) -> Iterator[int]:
    """Run a server and give its port."""
    command = [sys.executable, "-m", "fastrag.cli", "serve", "--index", str(folder / "index")]
    command += ["--port", "0", *options]
    if kind == "texts":
        command += ["--encoder", str(folder / "encoder")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.search(r":(\d+)$", line)
        assert port is not None, line
        yield int(port[1])
    finally:
        process.terminate()
        process.wait()


def write(folder: Path, n: int, dim: int) -> None:
    """Write an index with passages of random words, and an encoder that fits it."""
    specials = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    specials |= {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    vocabulary = {word: i for i, word in enumerate([*specials.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=frame
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **specials)
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(WORDS), size=(n, 20))
    passages = PassageStore.build(
        (
            Passage(str(i), WORDS[row[0]], " ".join(WORDS[j] for j in row))
            for i, row in enumerate(chosen)
        ),
        RagProcessor(tokenizer, tokenizer, kind="causal"),
        dir=folder / "index" / "passages",
    )
    index = FlatIndex(dim)
    index.add(generator.standard_normal((n, dim), np.float32))
    index.passages_checksum = passages.checksum()
    index.save(folder / "index" / "index")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=dim, **MINILM)
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False), max_length=512)
    encoder.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")


if __name__ == "__main__":
    sys.exit(main())
