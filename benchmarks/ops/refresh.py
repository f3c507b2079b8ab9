"""Refresh policies: training steps of a retriever whose passage encoder trains, one mode a policy.

    question encoder, passages of the batch -> scores -> backward -> SGD -> IndexRefresher.step

A call makes N / r steps, after which `rolling` has encoded every passage once and `every` all of
them in the last step, so both encode the same number; `sweep` needs a step to copy the weights, and
encodes as many in the others; `frozen` encodes none. The passages of each question are given and
there is no generator, so that the times differ by the policy. Under each table stand the share of
encoding in the time, and what a search after the steps still finds.

The output is the vector of each passage as a search sees it. Training does not depend on it, so the
check makes the same steps literally and knows the vectors of all passages at every step: `frozen`
must have those of the first, `every` those of the last, `sweep` those of one step, `rolling` those
of any after the first, and a map must be closer to the last than `frozen` is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.registry import Call, Op, Outputs, Provider, Shape, ours

MODES = ("frozen", "every", "sweep", "rolling", "rolling+map")
LEARNING_RATE = 2e-3
VOCAB = 8192
# Encoders by width: layers and heads. 384 is that of MiniLM.
SIZES = {16: (1, 2), 128: (2, 4), 384: (6, 12)}
# Largest difference of vectors of length 1 that two ways to encode may have.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
N_OVERLAP = 10


@dataclass(frozen=True)
class Problem:
    shape: Shape  # N, r, B, K, L, H
    dtype: torch.dtype  # of 16 bits: float32 weights under torch.autocast
    device: torch.device

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        return replace(self, dtype=dtype)

    def autocast(self) -> torch.autocast:
        half = self.dtype.itemsize == 2
        return torch.autocast(self.device.type, self.dtype if half else None, enabled=half)


class Tokens:
    """Passages of random token ids, as the passage store gives them."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.device = ids, ids.device

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, stream: str, rows: Tensor | None = None) -> Tensor:
        return torch.full((len(self) if rows is None else len(rows),), self.ids.shape[1])

    def gather(self, rows: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        return self.ids[rows], torch.full_like(rows, self.ids.shape[1])


class Parts:
    """Encoders, passages and questions of a problem, made from its numbers."""

    def __init__(self, problem: Problem) -> None:
        n, self.n_rolling, n_questions, n_docs, length, width = problem.shape
        self.n_steps = max(1, n // self.n_rolling)
        drawn = torch.Generator().manual_seed(0)
        self.tokens = Tokens(torch.randint(VOCAB, (n, length), generator=drawn).to(problem.device))
        steps = self.n_steps
        rows = torch.randint(n, (steps, n_questions, n_docs), generator=drawn)
        asked = torch.randint(VOCAB, (steps, n_questions, length), generator=drawn)
        self.rows, self.questions = rows.to(problem.device), asked.to(problem.device)
        wide = torch.promote_types(problem.dtype, torch.float32)
        self.question_encoder, self.passage_encoder = (
            make_encoder(width, seed).to(problem.device, wide) for seed in (0, 0)
        )
        trained = [*self.question_encoder.parameters(), *self.passage_encoder.parameters()]
        self.optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def encode(self, rows: Tensor) -> Tensor:
        """Encode passages `[n]` or `[B, K]` with the present weights."""
        ids = self.tokens.ids[rows.flatten()]
        vectors = self.passage_encoder(ids, torch.ones_like(ids))
        return vectors.unflatten(0, rows.shape)

    def all(self) -> Tensor:
        with torch.no_grad():
            return self.encode(torch.arange(len(self.tokens), device=self.tokens.device)).float()


def make_encoder(width: int, seed: int) -> Any:
    from transformers import BertConfig, BertModel

    from fastrag.nn import TextEncoder

    if width not in SIZES:
        raise ValueError(f"H: expected one of {', '.join(map(str, SIZES))}, got {width}")
    layers, heads = SIZES[width]
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextEncoder(BertModel(config, add_pooling_layer=False), normalize=True).train()


def loss_of(scores: Tensor) -> Tensor:
    """The first passage of each question is the right one."""
    return -(scores.float() / 0.05).log_softmax(1)[:, 0].mean()


# -------------------------------------------------------------------------------------- providers


class Ours:
    """Steps of a `Retriever` with an `IndexRefresher`."""

    def __init__(self, mode: str, problem: Problem) -> None:
        from fastrag import IndexRefresher
        from fastrag.index import FlatIndex
        from fastrag.nn import Retriever

        self.parts, self.problem = Parts(problem), problem
        parts = self.parts
        index = FlatIndex(problem.shape[-1], device=problem.device)
        passages: Any = parts.tokens
        self.retriever = Retriever(
            parts.question_encoder,
            parts.passage_encoder,
            index,
            passages,
            n_docs=problem.shape[3],
            tau=0.05,
            train_passage_encoder=True,
        ).train()
        self.retriever.refresh_index()
        sweep = math.ceil(problem.shape[0] / max(1, parts.n_steps - 1))
        settings = {
            "every": f":{parts.n_steps}",
            "rolling": f":{parts.n_rolling}",
            "sweep": f":{sweep}",
        }
        word, plus, rest = mode.partition("+")
        policy = f"{word}{settings.get(word, '')}{plus}{rest}"
        self.refresher = IndexRefresher(self.retriever, policy, samples=0)
        self.done = 0

    def __call__(self) -> Outputs:
        for rows, asked in zip(self.parts.rows, self.parts.questions, strict=True):
            self.done += 1
            with self.problem.autocast():
                found = self.retriever(asked, torch.ones_like(asked), rows=rows)
                self.parts.optimizer.zero_grad()
                loss_of(0.05 * found.doc_scores).backward()
            self.parts.optimizer.step()
            self.refresher.step(self.done, found)
        self.refresher.flush()
        n = len(self.parts.tokens)
        return (self.retriever.vectors(torch.arange(n, device=self.problem.device)),)


class Literal:
    """The same steps in plain torch; `rolling` goes round in the order of the rows."""

    def __init__(self, mode: str, problem: Problem) -> None:
        self.parts, self.mode, self.problem = Parts(problem), mode, problem
        with problem.autocast():
            self.vectors = self.parts.all()
        self.next = 0

    def train(self, step: int) -> None:
        rows, asked = self.parts.rows[step], self.parts.questions[step]
        with self.problem.autocast():
            query_emb = self.parts.question_encoder(asked, torch.ones_like(asked))
            scores = torch.einsum("bd,bkd->bk", query_emb, self.parts.encode(rows))
            self.parts.optimizer.zero_grad()
            loss_of(scores).backward()
        self.parts.optimizer.step()

    def __call__(self) -> Outputs:
        parts = self.parts
        for step in range(parts.n_steps):
            self.train(step)
            if self.mode == "every" and step == parts.n_steps - 1:
                with self.problem.autocast():
                    self.vectors = parts.all()
            if self.mode == "rolling":
                rows = (self.next + torch.arange(parts.n_rolling)) % len(parts.tokens)
                rows = rows.to(self.problem.device)
                with torch.no_grad(), self.problem.autocast():
                    self.vectors[rows] = parts.encode(rows).float()
                self.next += parts.n_rolling
        return (self.vectors,)


def encoder_alone(mode: str, problem: Problem) -> Call:
    """Encode what the steps train on, forward and backward, and what the policy encodes."""
    steps = Literal(mode, problem)

    def encode() -> Outputs:
        for rows in steps.parts.rows:
            with problem.autocast():
                steps.parts.encode(rows).sum().backward()
        if mode != "frozen":
            with problem.autocast():
                steps.parts.all()
        return ()

    return encode


# -------------------------------------------------------------------------------------- the entry


def oracle(mode: str, problem: Problem) -> Outputs:
    """Return the vectors of all passages at every step, `[steps + 1, N, D]`."""
    steps = Literal("frozen", problem)
    found = [steps.vectors]
    for step in range(steps.parts.n_steps):
        steps.train(step)
        with problem.autocast():
            found.append(steps.parts.all())
    return (torch.stack(found),)


def check(provider: Provider, mode: str, problem: Problem, found: Outputs) -> str:
    """Compare each vector with those of the steps that its policy allows."""
    (every_step,) = oracle(mode, problem)
    difference = (found[0].to(every_step.dtype) - every_step).norm(dim=2)  # [steps + 1, N]
    if mode == "rolling+map":
        mapped = difference[-1].mean()
        stale = (every_step[0] - every_step[-1]).norm(dim=1).mean()
        return "" if mapped < stale else f"vectors: {mapped:.3g} from the last, frozen {stale:.3g}"
    if mode == "sweep":
        difference = difference[1:].amax(dim=1, keepdim=True)
    allowed = {"frozen": difference[:1], "every": difference[-1:]}.get(mode, difference)
    error = float(allowed.amin(dim=0).max())
    limit = TOLERANCE.get(problem.dtype, 0.05)
    return "" if error <= limit else f"vectors: {error:.3g} from those of any step, at most {limit}"


@contextmanager
def counted(encoder: nn.Module) -> Iterator[list[float]]:
    """Count the seconds of passes in eval mode."""
    seconds, forward = [0.0], encoder.forward

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        result = forward(*given)
        seconds[0] += 0.0 if encoder.training else time.perf_counter() - start
        return result

    patched: Any = encoder
    patched.forward = timed
    try:
        yield seconds
    finally:
        patched.forward = forward


def note(mode: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Return the share of encoding in the time of a call, and how stale the index is after it."""
    steps = Ours(mode, Problem(shape, dtype, device))
    steps()
    with counted(steps.parts.passage_encoder) as seconds:
        start = time.perf_counter()
        steps()
        share = seconds[0] / (time.perf_counter() - start)
    asked = steps.parts.questions[0]
    with torch.no_grad():
        query_emb = steps.parts.question_encoder(asked, torch.ones_like(asked))
    found = steps.refresher.staleness(query_emb, k=N_OVERLAP, step=steps.done)
    return (
        f"{mode}: encoding {100 * share:.0f} % of the time; overlap@{N_OVERLAP} "
        f"{found.overlap:.3f}, drift {found.drift:.2e}, oldest vector {found.oldest} steps"
    )


def flops(mode: str, shape: Shape) -> float:
    """Count matrix products: three passes over what trains, one over what the policy encodes."""
    n, n_rolling, n_questions, n_docs, length, width = shape
    layers = SIZES[width][0]
    per_passage = 2.0 * layers * length * (12 * width**2 + 2 * length * width)
    trained = (n // n_rolling) * n_questions * (n_docs + 1)
    return per_passage * (3 * trained + (n if mode != "frozen" else 0))


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count the vectors, written once."""
    return float(itemsize * shape[0] * shape[-1])


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    return Problem(shape, dtype, device)


SWEEP = ((1024, 64, 4, 4, 32, 128), (4096, 64, 8, 4, 64, 384))

OP = Op(
    name="refresh",
    about="training steps by refresh policy",
    dims=("N", "r", "B", "K", "L", "H"),
    modes=MODES,
    outputs=("vectors",),
    make=make,
    make_checked=make,
    oracle=oracle,
    providers=(
        Provider("encoder", encoder_alone, "ceiling"),
        ours("torch", Ours, name="fastrag"),
        Provider("literal", Literal, modes=("frozen", "every", "rolling")),
    ),
    ceiling="encoder",
    checked=((12, 4, 2, 2, 6, 16),),
    shapes={"cpu": SWEEP[:1], "cuda": SWEEP},
    small=(48, 16, 2, 2, 6, 16),
    flops=flops,
    bytes=least_bytes,
    check=check,
    note=note,
)
