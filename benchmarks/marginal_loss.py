"""Forward and backward of the marginal loss from hidden states, on a CPU in float32.

    python -m benchmarks.marginal_loss [--shape B,K,T,H,V ...] [--providers cpp gemms]

Providers take turns within each round, each round begun by another, so that what else the machine
does falls on all of them:

    gemms    the three products alone, each in its faster orientation, into memory as ours has it
    cpp      fastrag, passes in C++
    torch    fastrag, passes of torch
    gather   torch: logits, log_softmax, gather, logsumexp over passages
    hf       the loss of transformers' RagTokenForGeneration or RagSequenceForGeneration

Ratios are to the first one named. One that frees hundreds of megabytes disturbs the next, so that a
pair is best measured alone.

Nothing is timed before all providers' losses and gradients agree with the float64 oracle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.ops import backends, workspace

SHAPES = ("2,5,32,512,50265", "4,8,16,576,49152")  # BART's vocabulary; SmolLM's
CHECKED = (3, 4, 5, 16, 131)
PAD = 0
OURS = {"token": F.rag_token_nll, "sequence": F.rag_sequence_nll}
ORACLES = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}


@dataclass
class Problem:
    hidden: Tensor  # [B, K, T, H]
    weight: Tensor  # [V, H]
    doc_scores: Tensor  # [B, K]
    labels: Tensor  # [B, T]; PAD does not count

    @classmethod
    def random(cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Problem:
        n_examples, n_passages, n_tokens, width, vocab = shape
        torch.manual_seed(0)
        hidden = torch.randn(n_examples, n_passages, n_tokens, width)
        weight = torch.randn(vocab, width) / width**0.5
        scores = torch.randn(n_examples, n_passages)
        labels = torch.randint(1, vocab, (n_examples, n_tokens))
        return cls(*(x.to(dtype).requires_grad_() for x in (hidden, weight, scores)), labels)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.doc_scores

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves()))


Provider = Callable[[str, Problem], tuple[Tensor, ...]]


def fastrag_on(backend: str) -> Provider:
    def run(marginal: str, p: Problem) -> tuple[Tensor, ...]:
        os.environ[backends.BACKEND_VARIABLE] = backend
        loss = OURS[marginal](
            p.hidden, p.weight, p.labels, p.doc_scores, reduction="sum", ignore_index=PAD
        )
        return p.backward(loss)

    return run


def gather(marginal: str, p: Problem) -> tuple[Tensor, ...]:
    logp = (p.hidden @ p.weight.t()).log_softmax(-1)
    labels = p.labels[:, None, :, None].expand(*logp.shape[:3], 1)
    gold = logp.gather(-1, labels).squeeze(-1)
    prior = p.doc_scores.log_softmax(1)
    counts = p.labels != PAD
    if marginal == "token":
        per_token = (prior.unsqueeze(2) + gold).logsumexp(1)
        return p.backward(-torch.where(counts, per_token, 0.0).sum())
    seq_logp = torch.where(counts.unsqueeze(1), gold, 0.0).sum(2)
    return p.backward(-(prior + seq_logp).logsumexp(1).sum())


def transformers_loss(marginal: str, p: Problem) -> tuple[Tensor, ...]:
    from transformers.models.rag import modeling_rag

    n_passages = p.hidden.shape[1]
    generator = SimpleNamespace(pad_token_id=PAD, bos_token_id=None)
    config = SimpleNamespace(n_docs=n_passages, bos_token_id=None, generator=generator)
    stub = SimpleNamespace(config=config)
    kind = modeling_rag.RagSequenceForGeneration
    if marginal == "token":
        kind = modeling_rag.RagTokenForGeneration
        stub.marginalize = lambda *args: kind.marginalize(stub, *args)
    # get_nll shifts its targets left by one and fills up with a pad: the last label is lost to it.
    target = torch.cat([p.labels.new_ones(len(p.labels), 1), p.labels[:, :-1]], 1)
    logits = p.hidden.flatten(0, 1) @ p.weight.t()
    return p.backward(kind.get_nll(stub, logits, p.doc_scores, target).sum())


def gemms(marginal: str, p: Problem) -> tuple[Tensor, ...]:
    x, weight = p.hidden.detach().flatten(0, 2), p.weight.detach()
    buffer = workspace.take(len(weight) * len(x))
    z = buffer[: len(weight) * len(x)].view(len(weight), len(x))
    torch.mm(weight, x.t(), out=z)
    dweight = workspace.advise(torch.empty_like(weight))
    torch.mm(z, x, out=dweight)
    dhidden = z.t() @ weight
    workspace.give_back(buffer)
    return dhidden, dweight


PROVIDERS: dict[str, Provider] = {
    "gemms": gemms,
    "cpp": fastrag_on("cpp"),
    "torch": fastrag_on("torch"),
    "gather": gather,
    "hf": transformers_loss,
}


def check(marginal: str) -> None:
    """Asserts that all providers agree with the oracle, on labels of which the last is ignored."""
    wide, narrow = (Problem.random(CHECKED, dtype) for dtype in (torch.float64, torch.float32))
    wide.labels[:, -1] = narrow.labels[:, -1] = PAD
    nll, _ = ORACLES[marginal](
        wide.hidden, wide.weight, wide.labels, wide.doc_scores, ignore_index=PAD
    )
    expected = wide.backward(nll.sum())
    for name, provider in PROVIDERS.items():
        if name == "gemms":
            continue
        for found, right in zip(provider(marginal, narrow), expected, strict=True):
            error = (found.double() - right).norm() / right.norm()
            assert error < 1e-5, f"{name}, {marginal}: relative error {error:.1e}"


def measure(
    marginal: str, shape: tuple[int, ...], rounds: int, names: list[str]
) -> dict[str, tuple[float, float]]:
    """Returns median milliseconds of each provider, by the clock and of processor time.

    The first round is not counted. Processor time, that of all threads, is what a busy machine
    disturbs less.
    """
    problem = Problem.random(shape)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        # Whoever comes behind a provider that freed much memory may pay for that: not always one.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            provider = PROVIDERS[name]
            start, start_cpu = time.perf_counter(), time.process_time()
            provider(marginal, problem)
            spent = (time.perf_counter() - start, time.process_time() - start_cpu)
            if turn:
                times[name].append((1e3 * spent[0], 1e3 * spent[1]))
    return {
        name: (statistics.median(t for t, _ in values), statistics.median(t for _, t in values))
        for name, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="B,K,T,H,V")
    parser.add_argument("--marginal", nargs="+", default=["token"], choices=sorted(OURS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median milliseconds")
    for marginal in args.marginal:
        check(marginal)
        for text in args.shape:
            found = measure(marginal, tuple(map(int, text.split(","))), args.rounds, args.providers)
            print(f"{marginal} B,K,T,H,V = {text}")
            base, (base_clock, base_cpu) = next(iter(found.items()))
            for name, (clock, cpu) in found.items():
                print(
                    f"  {name:8s} {clock:7.0f} ms, processor time {cpu:7.0f} ms   "
                    f"({clock / base_clock:.2f} and {cpu / base_cpu:.2f} of {base})"
                )


if __name__ == "__main__":
    main()
