"""Answers from given contexts: fastrag's decoders against `generate` of Hugging Face's RAG classes.

`token`: greedy RAG-Token. `sequence-thorough`: RAG-Sequence with beams under each passage, and each
candidate scored under all passages. No answer ends before T tokens, so that all providers make as
many. For `token`, contexts have a quarter to the whole of L tokens, as passages differ in length;
for `sequence-thorough` all have L, because Hugging Face makes the candidates without the mask.

The models are those of `rag_step`: BART of random weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import Call, Goal, Op, Outputs, Provider, Shape, ours
from benchmarks.ops import rag_step_corpus as texts
from benchmarks.ops.rag_step import make_generator, size_of
from benchmarks.ops.rag_step_corpus import EOS, PAD

TOKEN, THOROUGH = "token", "sequence-thorough"
N_BEAMS = 4  # of `sequence-thorough`
# A search in half precision may take another turn where two tokens are nearly as probable.
LOSS_OF_SCORE = {torch.float32: 1e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Problem:
    shape: Shape  # B, K, L, T, H
    dtype: torch.dtype
    device: torch.device

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same numbers in another dtype."""
        return replace(self, dtype=dtype)


class Parts:
    """Generator, contexts and scores of a problem, made from its numbers."""

    def __init__(self, mode: str, problem: Problem) -> None:
        n_questions, self.n_docs, width, self.n_tokens, hidden, *_ = problem.shape
        n = n_questions * self.n_docs
        drawn = torch.Generator().manual_seed(0)
        shortest = max(1, width // 4) if mode == TOKEN else width
        lengths = torch.linspace(shortest, width, n).long()[torch.randperm(n, generator=drawn)]
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = torch.randint(EOS + 1, size_of(hidden).vocab, (n, width), generator=drawn)
        self.ids = ids.where(mask.bool(), PAD).to(problem.device)
        self.mask = mask.to(problem.device)
        scores = torch.randn(n_questions, self.n_docs, generator=drawn)
        self.scores = scores.to(problem.device)
        self.rows = torch.arange(n, device=problem.device).view(n_questions, -1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator = make_generator(hidden)
        self.generator = self.generator.to(problem.device, problem.dtype).eval()
        self.generator.generation_config.forced_eos_token_id = None


def with_fastrag(mode: str, problem: Problem) -> Call:
    from fastrag.generation import DECODERS, Search
    from fastrag.nn import adapt_generator

    parts = Parts(mode, problem)
    adapter = adapt_generator(parts.generator)
    n_tokens = parts.n_tokens
    settings: dict[str, Any] = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
    if mode == THOROUGH:
        settings["num_beams"] = N_BEAMS

    @torch.no_grad()
    def decode() -> Outputs:
        given = (parts.ids, parts.mask, parts.scores, parts.rows)
        return (DECODERS[mode](Search(adapter, *given, pad_id=PAD, **settings)).sequences,)

    return decode


def with_hugging_face(mode: str, problem: Problem) -> Call:
    from transformers import DPRConfig, DPRQuestionEncoder
    from transformers.models.rag import modeling_rag

    parts = Parts(mode, problem)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = DPRQuestionEncoder(DPRConfig(**tiny, intermediate_size=16, vocab_size=8))
    config = texts.rag_config(
        encoder.config, parts.generator.config, parts.n_docs, problem.shape[2]
    )
    n_tokens = parts.n_tokens
    if mode == TOKEN:
        model = modeling_rag.RagTokenForGeneration(config, encoder, parts.generator)
        model.generation_config.forced_eos_token_id = None
        settings = {"min_length": n_tokens + 1, "max_length": n_tokens + 1}  # with the start token
    else:
        model = modeling_rag.RagSequenceForGeneration(config, encoder, parts.generator)
        settings = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens}
        settings |= {"num_beams": N_BEAMS, "num_return_sequences": 1}
    model.eval()

    @torch.no_grad()
    def generate() -> Outputs:
        answers = model.generate(
            context_input_ids=parts.ids,
            context_attention_mask=parts.mask,
            doc_scores=parts.scores.to(problem.dtype),
            n_docs=parts.n_docs,
            **settings,
        )
        return (answers[:, 1:],)

    return generate


def with_encoder(mode: str, problem: Problem) -> Call:
    parts = Parts(mode, problem)
    encoder = parts.generator.get_encoder()

    @torch.no_grad()
    def encode() -> Outputs:
        return (encoder(input_ids=parts.ids, attention_mask=parts.mask)[0],)

    return encode


# ---------------------------------------------------------------------------------------- the entry


@torch.no_grad()
def token_logp(parts: Parts, answers: Tensor) -> Tensor:
    """Return log p(.|x,z_k,y_<t) of all tokens, `[B, K, T + 1, V]`, after `[B, T]` of an answer."""
    each = answers.repeat_interleave(parts.n_docs, dim=0)
    start = each.new_full((len(each), 1), EOS)
    logits = parts.generator(
        input_ids=parts.ids,
        attention_mask=parts.mask,
        decoder_input_ids=torch.cat([start, each], dim=1),
        use_cache=False,
    ).logits
    return logits.log_softmax(-1).unflatten(0, parts.scores.shape)


def score(mode: str, parts: Parts, answers: Tensor) -> Tensor:
    """Return log p(y|x) of answers `[B, T]`, `[B]`."""
    log_prior = parts.scores.double().log_softmax(1)
    logp = token_logp(parts, answers)[:, :, :-1].double()
    tokens = answers[:, None, :, None].expand(-1, parts.n_docs, -1, -1)
    logp = logp.gather(3, tokens).squeeze(3)  # [B, K, T]
    if mode == TOKEN:
        return (log_prior.unsqueeze(2) + logp).logsumexp(1).sum(1)
    return (log_prior + logp.sum(2)).logsumexp(1)


@torch.no_grad()
def oracle(mode: str, problem: Problem) -> Outputs:
    """Compute it literally: no cache, all logits; the best of all candidates, scored one by one."""
    parts = Parts(mode, problem)
    log_prior = parts.scores.to(problem.dtype).log_softmax(1)[:, :, None]
    answers = parts.ids.new_empty(len(log_prior), 0)
    if mode == TOKEN:
        for _ in range(parts.n_tokens):
            marginal = (log_prior + token_logp(parts, answers)[:, :, -1]).logsumexp(1)
            marginal[:, EOS] = -torch.inf
            answers = torch.cat([answers, marginal.argmax(1, keepdim=True)], dim=1)
        return (answers,)
    found = parts.generator.generate(
        parts.ids,
        attention_mask=parts.mask,
        num_beams=N_BEAMS,
        num_return_sequences=N_BEAMS,
        min_new_tokens=parts.n_tokens,
        max_new_tokens=parts.n_tokens,
    )[:, 1:]
    candidates = found.unflatten(0, (len(log_prior), -1))  # [B, K * N_BEAMS, T]
    scores = torch.stack([score(mode, parts, each) for each in candidates.unbind(1)], dim=1)
    return (candidates[torch.arange(len(scores)), scores.argmax(1)],)


def check(provider: Provider, mode: str, problem: Problem, found: Outputs) -> str:
    """Compare the probabilities of the answers, because two answers may be equally probable."""
    parts = Parts(mode, problem.to(torch.float64))
    (right,) = oracle(mode, problem.to(torch.float64))
    lost = score(mode, parts, right) - score(mode, parts, found[0])
    limit = LOSS_OF_SCORE.get(problem.dtype, 1.0)
    if found[0].shape != right.shape or lost.abs().max() > limit:
        return f"answers: {lost.max():.3g} less in log p than those of the oracle"
    return ""


def flops(mode: str, shape: Shape) -> float:
    """Count matrix products of reading the contexts, and of each token under each passage."""
    n_questions, n_docs, context_width, answer_width, width = shape
    size = size_of(width)
    n_context = n_questions * n_docs * context_width
    n_answer = n_questions * n_docs * answer_width * (1 if mode == TOKEN else 2 * N_BEAMS)
    encoder = n_context * (12 * width**2 + 2 * context_width * width)
    decoder = n_answer * (14 * width**2 + (answer_width + 2 * context_width) * width)
    return 2.0 * (size.layers * (encoder + decoder) + n_answer * width * size.vocab)


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count the weights, read once a token."""
    width, size = shape[4], size_of(shape[4])
    return float(itemsize * shape[3] * (14 * size.layers * width**2 + size.vocab * width))


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    return Problem(shape, dtype, device)


SWEEP = ((4, 5, 128, 32, 256),)

OP = Op(
    name="decode",
    about="answers from given contexts",
    dims=("B", "K", "L", "T", "H"),
    modes=(TOKEN, THOROUGH),
    outputs=("answers",),
    make=make,
    make_checked=make,
    oracle=oracle,
    providers=(
        Provider("encoder", with_encoder, "ceiling"),
        ours("cpp", with_fastrag, devices=("cpu",)),
        ours("torch", with_fastrag),
        Provider("hf", with_hugging_face),
    ),
    ceiling="encoder",
    checked=((2, 3, 12, 4, 16), (4, 5, 40, 8, 16)),
    shapes={"cpu": SWEEP, "cuda": SWEEP},
    small=(2, 2, 16, 4, 16),
    flops=flops,
    bytes=least_bytes,
    goals=(
        Goal("hf", at_least=1.5, where=lambda mode, shape: mode == TOKEN),
        Goal("hf", at_least=3.0, where=lambda mode, shape: mode == THOROUGH),
    ),
    check=check,
)
