"""The group pass of the triton backend: one launch each."""

from __future__ import annotations

from torch import Tensor

from fastrag.kernels import group_pass as kernels
from fastrag.ops.chunk_logits import RowStats
from fastrag.ops.group_pass import Call, GroupPass, SequenceSums, TokenSums, TokenWeights
from fastrag.ops.positions import Chunk


class TritonGroupPass(GroupPass):
    """Maths in float32."""

    @staticmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        hit, target, spread = kernels.token_group(
            logp,
            mixture,
            chunk.position,
            chunk.example,
            chunk.counts,
            call.log_prior,
            call.example_weight,
            call.bad,
            call.smoothing,
            call.smoothing / call.vocab_size,
            sums.log_marginal,
            sums.occupancy,
            sums.log_post,
            sums.token_logp,
        )
        return TokenWeights(hit) if mixture is None else TokenWeights(hit, target, spread)

    @staticmethod
    def sequence_rows(call: Call, chunk: Chunk, stats: RowStats, sums: SequenceSums) -> None:
        kernels.sequence_rows(
            stats.logp,
            stats.mean_logp,
            chunk.row,
            chunk.position,
            chunk.counts,
            call.bad,
            call.smoothing,
            sums.token_logp,
        )

    @staticmethod
    def sequence_posterior(call: Call, examples: slice, sums: SequenceSums) -> None:
        kernels.sequence_posterior(
            sums.token_logp,
            call.log_prior,
            call.example_weight,
            call.active,
            examples.start,
            examples.stop,
            sums.nll,
            sums.log_post,
            sums.dscores,
        )

    @staticmethod
    def sequence_weights(call: Call, chunk: Chunk, sums: SequenceSums) -> Tensor:
        return kernels.sequence_weights(
            sums.log_post, call.example_weight, chunk.example, chunk.counts
        )
