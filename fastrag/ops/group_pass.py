"""From the log-probabilities of a chunk's rows to marginal, posterior and row weights.

    token     w_kt = softmax_k(a_k + l_kt)             a group is the K rows of a position
    sequence  w_k = softmax_k(a_k + sum_t l_kt)        a group is the K*T rows of an example

Small numbers only: [n] in, [G, K] out, and what the whole call gathers, [B, K, T] at most. A
`GroupPass` answers for a backend; the logits themselves are a `ChunkLogits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops.chunk_logits import RowStats
from fastrag.ops.positions import Chunk


@dataclass(frozen=True, slots=True)
class Call:
    """What all chunks of one call share."""

    log_prior: Tensor  # [B, K]
    example_weight: Tensor  # [B]
    active: Tensor  # [B] bool, has a label that counts
    bad: Tensor  # [B*T + 1] bool, label is none of the vocabulary
    smoothing: float
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TokenSums:
    """What RAG-Token gathers by position; the last entry is where padding writes."""

    log_marginal: Tensor  # [B*T + 1]
    occupancy: Tensor  # [B*T + 1, K], sum_v of the gradient's target
    log_post: Tensor  # [B*T + 1, K]
    token_logp: Tensor  # [B*T + 1, K]


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weights of ChunkLogits.gradient (hit alone) or of mixture_gradient (all three)."""

    hit: Tensor  # [G, K]
    target: Tensor | None = None  # [G, K]
    spread: Tensor | None = None  # [G]


@dataclass(frozen=True, slots=True)
class SequenceSums:
    """What RAG-Sequence gathers."""

    token_logp: Tensor  # [B*K*T + 1], by row; the last entry is where padding writes
    nll: Tensor  # [B]
    log_post: Tensor  # [B, K]
    dscores: Tensor  # [B, K]


class GroupPass(ABC):
    """Every method writes into the sums of its call."""

    @staticmethod
    @abstractmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        """logp [n]; mixture: mean_v M_v [G] and mean_v r_kv [G, K], for smoothing."""

    @staticmethod
    @abstractmethod
    def sequence_rows(call: Call, chunk: Chunk, stats: RowStats, sums: SequenceSums) -> None:
        """Puts the chunk's log-probabilities, smoothed, in their places; 0 where nothing counts."""

    @staticmethod
    @abstractmethod
    def sequence_posterior(call: Call, examples: slice, sums: SequenceSums) -> None:
        """Closes examples whose rows have all been put in place."""

    @staticmethod
    @abstractmethod
    def sequence_weights(call: Call, chunk: Chunk, sums: SequenceSums) -> Tensor:
        """The weights [n] of ChunkLogits.gradient for rows of closed examples."""


class TorchGroupPass(GroupPass):
    """Plain torch, on every device and in every dtype."""

    @staticmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        counts = chunk.counts.unsqueeze(1)
        prior = call.log_prior[chunk.example]
        logp = logp.view(prior.shape).masked_fill(call.bad[chunk.position].unsqueeze(1), torch.nan)
        joint = torch.where(counts, prior + logp, 0.0)
        log_marginal = joint.logsumexp(1)
        # Not joint - log_marginal: both may be far from 0, and their rounding would go into w.
        log_post = joint.log_softmax(1)
        target = posterior = log_post.exp()
        if mixture is not None:
            log_marginal = torch.lerp(log_marginal, mixture[0], call.smoothing)
            target = torch.lerp(posterior, mixture[1], call.smoothing)
        sums.log_marginal[chunk.position] = torch.where(chunk.counts, log_marginal, 0.0)
        sums.occupancy[chunk.position] = torch.where(counts, target, 0.0)
        sums.log_post[chunk.position] = log_post
        sums.token_logp[chunk.position] = torch.where(counts, logp, 0.0)
        upstream = torch.where(chunk.counts, call.example_weight[chunk.example], 0.0)
        hit = upstream.unsqueeze(1) * posterior
        if mixture is None:
            return TokenWeights(hit)
        spread = upstream * (call.smoothing / call.vocab_size)
        return TokenWeights(hit * (1.0 - call.smoothing), upstream.unsqueeze(1) * target, spread)

    @staticmethod
    def sequence_rows(call: Call, chunk: Chunk, stats: RowStats, sums: SequenceSums) -> None:
        logp = stats.logp
        if stats.mean_logp is not None:
            logp = torch.lerp(logp, stats.mean_logp, call.smoothing)
        logp = logp.view(len(chunk.counts), -1)
        logp = logp.masked_fill(call.bad[chunk.position].unsqueeze(1), torch.nan)
        sums.token_logp[chunk.row] = torch.where(chunk.counts.unsqueeze(1), logp, 0.0).view(-1)

    @staticmethod
    def sequence_posterior(call: Call, examples: slice, sums: SequenceSums) -> None:
        prior, active = call.log_prior[examples], call.active[examples].unsqueeze(1)
        seq_logp = sums.token_logp[:-1].view(*call.log_prior.shape, -1)[examples].sum(2)
        joint = torch.where(active, prior + seq_logp, 0.0)
        log_post = joint.log_softmax(1)
        sums.nll[examples] = torch.where(active.squeeze(1), -joint.logsumexp(1), 0.0)
        sums.log_post[examples] = torch.where(active, log_post, prior)
        dscores = torch.where(active, prior.exp() - log_post.exp(), 0.0)
        sums.dscores[examples] = dscores * call.example_weight[examples].unsqueeze(1)

    @staticmethod
    def sequence_weights(call: Call, chunk: Chunk, sums: SequenceSums) -> Tensor:
        weight = call.example_weight.unsqueeze(1) * sums.log_post.exp()
        return torch.where(chunk.counts.unsqueeze(1), weight[chunk.example], 0.0).view(-1)


def group_pass(backend: str) -> type[GroupPass]:
    """Returns the group pass of this backend: that of torch where it brings none of its own."""
    if backend == "triton":
        from fastrag.ops.triton_group_pass import TritonGroupPass

        return TritonGroupPass
    return TorchGroupPass
