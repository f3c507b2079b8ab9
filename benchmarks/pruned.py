"""Time pruned and plain training steps of the demo's model, once its posterior has found its place.

    python -m benchmarks.pruned [--n-docs 16] [--plain-docs 16] [--prune 0.01] [--train 200]
                                [--rounds 5] [--query-side]

The model is the demo's, trained for some steps with pruning. Then plain and pruned steps over the
same batches take turns. A step is forward, backward and AdamW. CPU time is that of all threads of
the process: unlike wall time, it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from examples.demo.run import quiet
from examples.demo.system import Settings, build_model, warm_up_generator
from fastrag import IndexRefresher, RagModel
from fastrag.data import RagCollator, default_dataset
from fastrag.train import parameter_groups

STEPS_A_TURN = 4
Batch = dict[str, torch.Tensor]


class Trainer:
    """The demo's joint training as a bare loop."""

    def __init__(self, settings: Settings) -> None:
        data = default_dataset()
        self.model: RagModel = build_model(data, settings)
        warm_up_generator(self.model, data, settings)
        self.questions = data.questions["train"]
        self.settings = settings
        self.collator = RagCollator(self.model.processor)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(
                self.model,
                retriever_lr=settings.retriever_lr,
                reader_lr=settings.generator_lr,
            ),
            betas=(0.9, 0.98),
        )
        self.refresher = IndexRefresher(self.model, f"every:{settings.refresh}")
        self.model.train()

    def batches(self) -> Iterator[Batch]:
        """Yield batches of shuffled questions without end."""
        shuffled = torch.Generator().manual_seed(self.settings.seed)
        while True:
            order = torch.randperm(len(self.questions), generator=shuffled)
            for rows in order.split(self.settings.batch_size)[:-1]:
                yield self.collator([self.questions[row] for row in rows.tolist()])

    def step(self, batch: Batch) -> Any:
        """Make one step and return the model's output."""
        output = self.model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output


def compare(
    settings: Settings,
    prune: float,
    *,
    plain_docs: int,
    n_train: int,
    n_rounds: int,
    query_side: bool,
) -> list[str]:
    """Return the lines of the report; plain steps have `plain_docs` passages per question."""
    trainer = Trainer(settings)
    model, batches = trainer.model, trainer.batches()
    model.prune = prune
    for step, batch in enumerate(itertools.islice(batches, n_train), start=1):
        trainer.step(batch)
        trainer.refresher.step(step)
    model.train_passage_encoder = not query_side
    wall: dict[str, list[float]] = {"plain": [], "pruned": []}
    cpu: dict[str, list[float]] = {"plain": [], "pruned": []}
    read, dropped = [], []
    for _ in range(n_rounds):
        turn = list(itertools.islice(batches, STEPS_A_TURN))
        sides = (("plain", None, plain_docs), ("pruned", prune, settings.n_docs))
        for name, model.prune, model.n_docs in sides:
            start = time.perf_counter(), time.process_time()
            for batch in turn:
                output = trainer.step(batch)
                if model.prune is not None:
                    read.append(float(output.n_kept) / output.rows.numel())
                    dropped.append(float(output.dropped))
            wall[name].append((time.perf_counter() - start[0]) / STEPS_A_TURN)
            cpu[name].append((time.process_time() - start[1]) / STEPS_A_TURN)
    k = f"K {settings.n_docs} (plain {plain_docs})"
    shape = f"B {settings.batch_size}, {k}, {settings.marginal}"
    lines = [f"{shape}, prune {prune:g}, after {n_train} steps, {torch.get_num_threads()} threads"]
    for clock, times in (("wall", wall), ("cpu", cpu)):
        plain, pruned = (statistics.median(times[name]) for name in ("plain", "pruned"))
        lines.append(
            f"{clock:<5} plain {1 / plain:.2f} steps/s, pruned {1 / pruned:.2f} steps/s, "
            f"ratio {plain / pruned:.2f}"
        )
    share, lost = statistics.mean(read), statistics.mean(dropped)
    lines.append(f"read with gradient {share:.1%} of the contexts, dropped posterior {lost:.2e}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and print the report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruned", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--n-docs", type=int, default=16, help="passages per question, K")
    parser.add_argument("--plain-docs", type=int, help="K of plain steps; default: --n-docs")
    parser.add_argument("--prune", type=float, default=0.01, help="least posterior")
    parser.add_argument("--marginal", choices=("sequence", "token"), default="sequence")
    parser.add_argument("--train", type=int, default=200, help="steps before the comparison")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--query-side", action="store_true", help="time steps without the passage encoder"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    quiet()
    settings = dataclasses.replace(
        Settings(), seed=args.seed, n_docs=args.n_docs, marginal=args.marginal
    )
    report = compare(
        settings,
        args.prune,
        plain_docs=args.plain_docs or args.n_docs,
        n_train=args.train,
        n_rounds=args.rounds,
        query_side=args.query_side,
    )
    print("\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
