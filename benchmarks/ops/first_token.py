"""Time to the first token of an answer where the passages were read before, for other questions.

`known`: all prefixes are kept. `whole` reads the contexts as if there were none. The ceiling reads
the questions alone, without any passage to look at.

The model is a decoder-only one of random weights; contexts have half to the whole of L tokens, of
which the last S are the question and the template's words around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.harness.registry import Call, Goal, Op, Outputs, Provider, Shape, ours
from benchmarks.ops.rag_step_corpus import EOS, PAD

KNOWN = "known"
VOCAB, LAYERS, HEAD_DIM = 32000, 2, 64
# Largest difference in log p; in half precision it is that of the states.
ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Problem:
    shape: Shape  # B, K, L, S, H
    dtype: torch.dtype
    device: torch.device

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        return replace(self, dtype=dtype)


class Parts:
    """Generator, contexts and scores of a problem, made from its numbers."""

    def __init__(self, problem: Problem) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        n_questions, n_docs, width, own, hidden = problem.shape
        n = n_questions * n_docs
        drawn = torch.Generator().manual_seed(0)
        shortest = max(own + 1, width // 2)
        lengths = torch.linspace(shortest, width, n).long()[torch.randperm(n, generator=drawn)]
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        ids = torch.randint(EOS + 1, VOCAB, (n, width), generator=drawn)
        self.ids = ids.where(mask.bool(), PAD).to(problem.device)
        self.mask = mask.to(problem.device)
        self.prefix_len = (lengths - own).to(problem.device)
        self.n_own = own
        scores = torch.randn(n_questions, n_docs, generator=drawn)
        self.scores = scores.to(problem.device)
        self.rows = torch.arange(n, device=problem.device).view(n_questions, -1)
        heads = max(1, hidden // HEAD_DIM)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator = LlamaForCausalLM(config)
        self.generator = self.generator.to(problem.device, problem.dtype).eval()


def _first_token(parts: Parts, **settings: Any) -> Call:
    from fastrag.generation import Search, rag_token
    from fastrag.nn import adapt_generator

    adapter = adapt_generator(parts.generator)

    def decode() -> Outputs:
        given = (parts.ids, parts.mask, parts.scores, parts.rows)
        search = Search(adapter, *given, pad_id=PAD, max_new_tokens=1, **settings)
        return (rag_token(search).scores,)

    decode()  # what the adapter tries at first, and the prefixes
    return decode


def with_prefix_cache(mode: str, problem: Problem) -> Call:
    from fastrag.nn import PrefixCache

    parts = Parts(problem)
    return _first_token(parts, prefix_cache=PrefixCache(1 << 32), prefix_len=parts.prefix_len)


def with_whole_contexts(mode: str, problem: Problem) -> Call:
    return _first_token(Parts(problem))


def with_questions(mode: str, problem: Problem) -> Call:
    parts = Parts(problem)
    base = parts.generator.model

    @torch.no_grad()
    def read() -> Outputs:
        ids, mask = (each[:, -parts.n_own :] for each in (parts.ids, parts.mask))
        return (base(input_ids=ids, attention_mask=mask)[0],)

    return read


@torch.no_grad()
def oracle(mode: str, problem: Problem) -> Outputs:
    """Compute log p of the most probable first token from all logits."""
    parts = Parts(problem)
    places = (parts.mask.cumsum(dim=1) - 1).clamp(min=0)
    settings = {"attention_mask": parts.mask, "position_ids": places}
    logits = parts.generator(parts.ids, **settings).logits[:, -1]
    logp = logits.log_softmax(-1).unflatten(0, parts.scores.shape)
    log_prior = parts.scores.to(problem.dtype).log_softmax(1).unsqueeze(2)
    return ((log_prior + logp).logsumexp(1).amax(1),)


def check(provider: Provider, mode: str, problem: Problem, found: Outputs) -> str:
    """Compare log p of the first tokens."""
    (right,) = oracle(mode, problem.to(torch.float64))
    error = (found[0].double() - right).abs().max()
    if error > ERROR.get(problem.dtype, 0.1):
        return f"scores: off by {error:.3g}"
    return ""


def flops(mode: str, shape: Shape) -> float:
    """Count matrix products of reading the questions."""
    n_questions, n_docs, width, own, hidden = shape
    n = n_questions * n_docs
    tokens = n * own * (16 * hidden**2 + 2 * width * hidden)
    return 2.0 * (LAYERS * tokens + n * hidden * VOCAB)


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count the weights and the kept states, each read once."""
    n_questions, n_docs, width, own, hidden = shape
    states = n_questions * n_docs * (width - own) * 2 * LAYERS * hidden
    return float(itemsize * (16 * LAYERS * hidden**2 + VOCAB * hidden + states))


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    return Problem(shape, dtype, device)


SWEEP = ((4, 5, 128, 16, 256), (1, 10, 256, 24, 256))

OP = Op(
    name="first_token",
    about="time to the first token after passages that were read before",
    dims=("B", "K", "L", "S", "H"),
    modes=(KNOWN,),
    outputs=("scores",),
    make=make,
    make_checked=make,
    oracle=oracle,
    providers=(
        Provider("questions", with_questions, "ceiling"),
        ours("cpp", with_prefix_cache, devices=("cpu",)),
        ours("torch", with_prefix_cache),
        Provider("whole", with_whole_contexts),
    ),
    ceiling="questions",
    checked=((2, 3, 12, 4, 16), (4, 5, 40, 8, 64)),
    shapes={"cpu": SWEEP, "cuda": SWEEP},
    small=(2, 2, 16, 4, 16),
    flops=flops,
    bytes=least_bytes,
    goals=(Goal("whole", at_least=2.0),),
    check=check,
)
