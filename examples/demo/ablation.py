"""The demo against its ablations: what joint training adds, at equal steps, over three seeds.

    python -m examples.demo.ablation [--table freshness] [--seeds 0 1 2] [--steps N] [--out DIR]

| row             | retriever                                    |
|-----------------|----------------------------------------------|
| frozen BM25     | BM25 over the same words (package `bm25s`)   |
| frozen start    | the random encoders that the others start at |
| joint           | trained, as in the demo                      |
| permuted labels | trained, answers shuffled over the questions |

The first three are trained twice, on the loss of RAG-Sequence and on that of RAG-Token, and each
decodes as it was trained: the comparison of Lewis et al. 2020, table 6. All rows of a seed start
from the same models, after the same cloze warm-up. The BM25 rows train and answer with the K best
passages by BM25; their BM25 scores are the `doc_scores`, and their temperature is learned, from 1.
A frozen retriever does not explore: it has nothing to find out.
Where answers do not depend on questions, no ranking that depends on them helps: *ranked first*, how
many different passages come first for the test questions, shows a retriever that lost the question.

`--table freshness` compares refresh policies instead, a row each. In its first row the passage
encoder does not train; in the others it does, and the index becomes stale as far as the policy lets
it. Drift and overlap@10 are exact, over all passages and 100 dev questions, and averaged over steps
that are no multiples of a period. Recall is measured twice: with the index as training leaves it
(*stale*), and with all passages encoded again, as a saved model has them; EM with the latter.

Every finished row is a file under `<out>/rows`; a second call makes the missing ones only.
`table.json` and `table.md` hold the means, `intervals.svg` of `--table freshness` those of the
rebuilds over the steps between two of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from examples.demo.system import (
    Settings,
    build_model,
    make_config,
    measure,
    warm_up_generator,
)
from fastrag import FlatIndex, PassageStore, RagModel
from fastrag.data import DefaultDataset, Question, RagCollator, default_dataset
from fastrag.eval import DenseRetriever, EvalResult, evaluate_retrieval
from fastrag.profiling import set_ranges
from fastrag.train import RagTrainer
from fastrag.train.record import git_state

# table -> figure -> its heading and how its mean is written
FIGURES: dict[str, dict[str, tuple[str, str]]] = {}
FIGURES["retrievers"] = {
    "recall@1_before": ("recall@1 before", ".3f"),
    "recall@1_after": ("recall@1", ".3f"),
    "recall@5_after": ("recall@5", ".3f"),
    "ranked_first_before": ("ranked first before", ".0f"),
    "ranked_first_after": ("ranked first", ".0f"),
    "em_after": ("EM", ".3f"),
    "em_unseen_wording": ("EM, unseen wording", ".3f"),
    "train_seconds": ("training s", ".0f"),
}
FIGURES["freshness"] = {
    "em_after": ("EM", ".3f"),
    "recall@1_after": ("recall@1", ".3f"),
    "recall@5_after": ("recall@5", ".3f"),
    "mrr_after": ("MRR@5", ".3f"),
    "recall@1_stale": ("recall@1, stale", ".3f"),
    "recall@5_stale": ("recall@5, stale", ".3f"),
    "drift": ("drift", ".4f"),
    "overlap": ("overlap@10", ".3f"),
    "drift_end": ("drift at the end", ".4f"),
    "overlap_end": ("overlap@10 at the end", ".3f"),
    "encoded": ("encoded per step", ".0f"),
    "encode_share": ("encoding", ".1%"),
    "refresh_share": ("refresh", ".1%"),
    "train_cpu_seconds": ("CPU s", ".0f"),
    "train_seconds": ("wall s", ".0f"),
}
CURVES = {  # of the figure, and their colours
    "em_after": "#0072B2",
    "recall@1_after": "#009E73",
    "recall@1_stale": "#E69F00",
    "overlap": "#8C8C8C",
}
PROBE_STEPS = 37  # coprime to the periods, so that vectors of all ages are measured
PROBE_QUESTIONS = 100
ROOT = Path(__file__).resolve().parents[2]


class WordCounts(nn.Module):
    """A question as counts of words: with BM25 weights as passage vectors, q . d is BM25's score.

    Args:
        vocab_size: V, the width of the vectors.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.dim = vocab_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, S]` ids and mask to counts `[B, V]`."""
        counts = torch.zeros(len(input_ids), self.dim)
        return counts.scatter_add_(1, input_ids, attention_mask.float())


def bm25_vectors(passages: PassageStore, vocab_size: int) -> Tensor:
    """BM25 weight of every word in every passage, `[N, V]`, from `bm25s` and its defaults."""
    import bm25s

    ids, lengths = passages.gather(torch.arange(len(passages)), "encoder")
    corpus = [
        [str(each) for each in row[:length]]
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
    bm25 = bm25s.BM25()
    bm25.index(corpus, show_progress=False)
    vectors = torch.zeros(len(passages), vocab_size)
    for word in {word for words in corpus for word in words}:
        vectors[:, int(word)] = torch.from_numpy(bm25.get_scores([word]))
    return vectors


def joint(start: Path, marginal: str) -> RagModel:
    """The demo's model."""
    return RagModel.from_pretrained(start, marginal=marginal)


def frozen_start(start: Path, marginal: str) -> RagModel:
    """Encoders and temperature stay as they are; the generator alone learns."""
    model = RagModel.from_pretrained(
        start, marginal=marginal, train_passage_encoder=False, explore=0
    )
    for name, parameter in model.named_parameters():
        if not name.startswith("reader.generator."):
            parameter.requires_grad_(False)
    return model


def frozen_bm25(start: Path, marginal: str) -> RagModel:
    """BM25 in place of the encoders; generator and temperature learn."""
    model = RagModel.from_pretrained(start)
    vocab_size = len(model.processor.question_tokenizer)
    index = FlatIndex(vocab_size)
    index.add(bm25_vectors(model.passages, vocab_size))
    return RagModel(
        WordCounts(vocab_size),
        None,
        model.generator,
        index,
        model.passages,
        model.processor,
        n_docs=model.n_docs,
        marginal=marginal,
        tau=1.0,
        learn_tau=True,
    )


def query_side(start: Path, marginal: str) -> RagModel:
    """The demo's model with a passage encoder that stays as it is."""
    return RagModel.from_pretrained(start, marginal=marginal, train_passage_encoder=False)


class Row(NamedTuple):
    """A row of a table: how its model is made, its loss, and the refresh policy of its index."""

    make: Callable[[Path, str], RagModel]
    marginal: str = "sequence"
    policy: str = "frozen"


JOINT = f"every:{Settings.refresh}"
POLICIES = ("frozen", "every:3", "every:10", "every:30", "every:100")
POLICIES += ("sweep:32", "rolling:32", "drift:0.1", "map", "rolling:32+map")
POLICIES += ("rolling:32+write-back", "map+write-back", "rolling:32+map+write-back")
TABLES: dict[str, dict[str, Row]] = {
    "retrievers": {
        "frozen BM25": Row(frozen_bm25),
        "frozen BM25, token": Row(frozen_bm25, "token"),
        "frozen start": Row(frozen_start),
        "frozen start, token": Row(frozen_start, "token"),
        "joint": Row(joint, policy=JOINT),
        "joint, token": Row(joint, "token", JOINT),
        "permuted labels": Row(joint, policy=JOINT),
    },
    "freshness": {
        "query side only": Row(query_side),
        **{policy: Row(joint, policy=policy) for policy in POLICIES},
    },
}
ROWS = {name: row for rows in TABLES.values() for name, row in rows.items()}


class Probe(TrainerCallback):
    """Measure staleness and the cost of refreshing during training.

    The time of its own measurements, and the passages that they encode, do not count.

    Args:
        trainer: the trainer.
        questions: questions of the overlap.
    """

    def __init__(self, trainer: RagTrainer, questions: Sequence[Question]) -> None:
        self.trainer = trainer
        self.questions = questions
        self.seconds: dict[str, float] = {}  # CPU time by stage
        self.own = [0.0, 0.0]  # CPU and wall time
        self.encoded = 0
        self.found: list[tuple[int, float, float]] = []  # step, drift, overlap
        self._counts = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure now and then; `RefreshCallback` comes first."""
        if state.global_step % PROBE_STEPS == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Measure drift and overlap over all passages."""
        begin = time.process_time(), time.perf_counter()
        model: RagModel = self.trainer.model
        training, self._counts = model.training, False
        model.eval()
        with torch.no_grad():
            batch = model.processor.question_batch(self.questions)
            query_emb = model.retriever.encode_questions(**batch)
        found = self.trainer.refresher.staleness(query_emb, step=step)
        model.train(training)
        self.found.append((step, found.drift, found.overlap))
        self._counts = True
        now = time.process_time(), time.perf_counter()
        self.own = [own + n - b for own, n, b in zip(self.own, now, begin, strict=True)]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count passages that are encoded outside the steps, and the CPU time of the stages."""

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            begin = time.process_time()
            yield
            if self._counts:
                spent = time.process_time() - begin
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        def count(encoder: nn.Module, _inputs: Any, vectors: Tensor) -> None:
            self.encoded += len(vectors) * (self._counts and not encoder.training)

        encoder = self.trainer.refresher.retriever.passage_encoder
        hook = None if encoder is None else encoder.register_forward_hook(count)
        set_ranges(timed)
        try:
            yield
        finally:
            set_ranges(None)
            if hook is not None:
                hook.remove()


def training_questions(data: DefaultDataset, row: str, seed: int) -> list[Question]:
    """The training questions, for `permuted labels` each with the answers of another one."""
    questions = list(data.questions["train"])
    if row != "permuted labels":
        return questions
    answers = [question.answers for question in questions]
    random.Random(seed).shuffle(answers)
    return [
        dataclasses.replace(question, answers=other)
        for question, other in zip(questions, answers, strict=True)
    ]


def make_start(folder: Path, settings: Settings) -> None:
    """Write the common start of a seed's rows: random encoders, warmed-up generator."""
    data = default_dataset()
    model = build_model(data, settings)
    warm_up_generator(model, data, settings, progress=False)
    model.save_pretrained(folder, include_index=True)


def make_row(row: str, start: Path, settings: Settings) -> dict[str, Any]:
    """Train and evaluate one row.

    Args:
        row: a key of `ROWS`.
        start: the folder that `make_start` wrote.
        settings: see `Settings`.

    Returns:
        The row's settings and figures on the test questions.
    """
    data = default_dataset()
    test = data.questions["test"]
    make, marginal, policy = ROWS[row]
    model = make(start, marginal)
    out = start.parent / "run" / slug(row)
    config = make_config(settings, out, start=start, progress=False)
    config.training.eval_strategy, config.training.eval_steps = "no", None
    config.loss.marginal = marginal
    config.refresh.policy = policy
    trainer = RagTrainer(
        model,
        config,
        RagCollator(model.processor),
        training_questions(data, row, settings.seed),
    )
    own: dict[str, Any] = {}
    if row in TABLES["freshness"]:
        own = train_and_probe(trainer, data.questions["dev"][:PROBE_QUESTIONS])
        retriever = DenseRetriever(model.retriever, model.processor.question_batch)
        stale = evaluate_retrieval(retriever, test, ks=(1, 5)).metrics
        own |= {f"recall@{k}_stale": stale[f"gold-recall@{k}"] for k in (1, 5)}
        trainer.refresher.finish(settings.steps)  # whatever the policy says
    else:
        before = measure(model, test, name="before", progress=False)
        own |= {f"recall@{k}_before": before.metrics[f"recall@{k}"] for k in (1, 5)}
        own["ranked_first_before"] = n_ranked_first(before)
        begin = time.perf_counter()
        trainer.train()
        own["train_seconds"] = round(time.perf_counter() - begin, 1)
        trainer.finish_index()
        own["em_unseen_wording"] = measure(
            model, data.questions["test_unseen_wording"], name="unseen", progress=False
        ).metrics["em"]
    after = measure(model, test, name="after", progress=False)
    return {
        "row": row,
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "recall@1_after": after.metrics["recall@1"],
        "recall@5_after": after.metrics["recall@5"],
        "mrr_after": after.metrics["gold-mrr@5"],
        "ranked_first_after": n_ranked_first(after),
        "em_after": after.metrics["em"],
        **own,
        "commit": (git_state(ROOT) or {}).get("commit"),
    }


def train_and_probe(trainer: RagTrainer, questions: Sequence[Question]) -> dict[str, Any]:
    """Train, and return the figures of staleness and of what the refresh costs."""
    probe = Probe(trainer, questions)
    trainer.add_callback(probe)
    begin = time.process_time(), time.perf_counter()
    with probe.measuring():
        trainer.train()
    now = time.process_time(), time.perf_counter()
    cpu, wall = (n - b - own for n, b, own in zip(now, begin, probe.own, strict=True))
    steps = trainer.state.global_step
    course = list(probe.found)
    if not course:
        raise ValueError(f"steps: expected at least {PROBE_STEPS} to measure, got {steps}")
    probe.measure(steps)
    _, drift_end, overlap_end = probe.found[-1]
    return {
        "drift": statistics.fmean(drift for _, drift, _ in course),
        "overlap": statistics.fmean(overlap for _, _, overlap in course),
        "drift_end": drift_end,
        "overlap_end": overlap_end,
        "staleness": course,
        "encoded": probe.encoded / steps,
        "encode_share": probe.seconds.get("refresh/encode", 0.0) / cpu,
        "refresh_share": probe.seconds.get("refresh", 0.0) / cpu,
        "train_cpu_seconds": round(cpu, 1),
        "train_seconds": round(wall, 1),
    }


def n_ranked_first(result: EvalResult) -> int:
    """How many different passages are the best one of some question."""
    return len({each.retrieved[0] for each in result.predictions})


def summarise(rows: Sequence[dict[str, Any]], table: str = "retrievers") -> list[dict[str, Any]]:
    """Mean, least and greatest of every figure of a table over the seeds of each row."""
    entries = []
    for name in TABLES[table]:
        members = [row for row in rows if row["row"] == name]
        if members:
            entry: dict[str, Any] = {"row": name, "seeds": [row["seed"] for row in members]}
            for figure in FIGURES[table]:
                values = [row[figure] for row in members]
                entry[figure] = {
                    "mean": statistics.fmean(values),
                    "min": min(values),
                    "max": max(values),
                }
            entries.append(entry)
    return entries


def markdown(entries: Sequence[dict[str, Any]], steps: int, table: str = "retrievers") -> str:
    """The table for people: means, with the range over the seeds in brackets."""
    seeds = entries[0]["seeds"] if entries else []
    figures = FIGURES[table]
    lines = [
        f"Held-out facts (test), {steps} steps, mean over seeds {', '.join(map(str, seeds))} "
        "(least to greatest).",
        "",
        "| row | " + " | ".join(heading for heading, _ in figures.values()) + " |",
        "|---" * (1 + len(figures)) + "|",
    ]
    for entry in entries:
        cells = [entry["row"]]
        for figure, (_, digits) in figures.items():
            mean, least, greatest = (
                format(entry[figure][key], digits) for key in ("mean", "min", "max")
            )
            cells.append(mean if len(seeds) == 1 else f"{mean} ({least} to {greatest})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_intervals(entries: Sequence[dict[str, Any]], steps: int, path: Path) -> None:
    """Draw what an older index costs: the rows `every:n` over n, `frozen` as one of all steps."""
    from matplotlib.figure import Figure

    names = {f"every:{n}": n for n in range(1, steps)} | {"frozen": steps}
    rebuilt = {names[entry["row"]]: entry for entry in entries if entry["row"] in names}
    x = sorted(rebuilt)
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, colour in CURVES.items():
        mean, least, most = ([rebuilt[n][name][key] for n in x] for key in ("mean", "min", "max"))
        label, _ = FIGURES["freshness"][name]
        axes.plot(x, mean, marker="o", label=label, color=colour)
        axes.vlines(x, least, most, color=colour)
    axes.set(xscale="log", xlabel="steps between two rebuilds of the index", ylim=(0, 1.03))
    axes.set_xticks(x, list(map(str, x)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def slug(row: str) -> str:
    """The name of a row in file names."""
    return re.sub(r"[^\w.+]+", "-", row)


def row_file(out: Path, row: str, seed: int) -> Path:
    """Where a finished row is kept."""
    return out / "rows" / f"{slug(row)}-{seed}.json"


def finished(path: Path, settings: Settings) -> dict[str, Any] | None:
    """Read a row, if it is there and was made with these settings."""
    if not path.is_file():
        return None
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row if row["settings"] == dataclasses.asdict(settings) else None


def spawn(arguments: Sequence[str], threads: int) -> None:
    """Run this module in a process of its own, with its share of the cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo.ablation", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ablation {' '.join(arguments)}\n{done.stdout[-4000:]}")


def make_all(out: Path, table: str, seeds: Sequence[int], settings: Settings, workers: int) -> None:
    """Make the rows of a table that are missing, several at a time, then the table."""
    out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // workers)
    steps, batch_size = settings.steps, settings.batch_size
    common = ["--steps", str(steps), "--batch-size", str(batch_size), "--out", str(out.resolve())]
    missing = [
        (row, seed)
        for row in TABLES[table]
        for seed in seeds
        if finished(row_file(out, row, seed), dataclasses.replace(settings, seed=seed)) is None
    ]
    starts = sorted({seed for _, seed in missing})
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(starts) + len(missing), desc="ablation", unit="run") as bar,
    ):
        for jobs in (
            [["--only", "start", "--seeds", str(seed), *common] for seed in starts],
            [["--only", row, "--seeds", str(seed), *common] for row, seed in missing],
        ):
            running = {pool.submit(spawn, job, threads): job for job in jobs}
            try:
                for done in as_completed(running):
                    done.result()
                    bar.set_postfix_str(" ".join(running[done][1:4:2]))
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    rows = [
        row
        for name in TABLES[table]
        for seed in seeds
        if (row := finished(row_file(out, name, seed), dataclasses.replace(settings, seed=seed)))
    ]
    entries = summarise(rows, table)
    text = markdown(entries, steps, table)
    (out / "table.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text, encoding="utf-8")
    if table == "freshness":
        plot_intervals(entries, steps, out / "intervals.svg")
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.ablation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--table", choices=TABLES, default="retrievers", help="rows to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="joint training steps")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="questions")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder")
    parser.add_argument("--workers", type=int, default=2, help="rows trained at a time")
    parser.add_argument("--only", choices=("start", *ROWS), help="make this alone, here")
    args = parser.parse_args(argv)
    settings = Settings(steps=args.steps, batch_size=args.batch_size)
    try:
        if args.only is None:
            make_all(args.out, args.table, args.seeds, settings, args.workers)
            return 0
        for seed in args.seeds:
            settings = dataclasses.replace(settings, seed=seed)
            start = args.out / f"seed-{seed}" / "start"
            if args.only == "start":
                make_start(start, settings)
            else:
                result = make_row(args.only, start, settings)
                path = row_file(args.out, args.only, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command makes the missing rows")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
