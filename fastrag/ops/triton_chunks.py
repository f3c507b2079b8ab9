"""The chunks of the triton backend: cuBLAS products with Triton passes between them.

The operands of products have the dtype of the hidden states, such as bfloat16 or float16, and the
logits are float32. Rows of logits are padded to a multiple of 64, because the fast products need
aligned rows, and V may be odd (50265). The passes apply bias, scale and softcap when they read the
logits. They load and store 16 bytes at a time and include the padding, whose values are never used.
The gradient goes to a second buffer in the dtype of the operands or, for float32, overwrites the
logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.kernels import group_pass, linear_logp, mixture_pass, row_pass
from fastrag.ops.chunks import (
    Call,
    ChunkLogits,
    GroupPass,
    LinearHead,
    RowStats,
    SequenceSums,
    TokenSums,
    TokenWeights,
    add_product,
)
from fastrag.ops.positions import Chunk

PITCH = 64


class TritonGroupPass(GroupPass):
    """The group pass in Triton, one launch per method, with maths in float32."""

    @staticmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        hit, target, spread = group_pass.token_group(
            logp,
            mixture,
            chunk.position,
            chunk.example,
            chunk.counted,
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
        group_pass.sequence_rows(
            stats.logp,
            stats.mean_logp,
            chunk.chunk_rows,
            chunk.position,
            chunk.counted,
            call.bad,
            call.smoothing,
            sums.token_logp,
        )

    @staticmethod
    def sequence_posterior(call: Call, examples: slice, sums: SequenceSums) -> None:
        group_pass.sequence_posterior(
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
        return group_pass.sequence_weights(
            sums.log_post, call.example_weight, chunk.example, chunk.counted
        )


class TritonChunkLogits(ChunkLogits):
    """Logits and statistics in float32 from operands in the dtype of the hidden states."""

    group_pass = TritonGroupPass

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        super().__init__(head, x, gold)
        self._raw = self._buffer(torch.float32)
        for part, weight in head.weight_slices():
            add_product(self._raw[:, part], x, weight.t(), first=True)
        bias = None if head.bias is None else padded_bias(head.bias)
        self._head = (bias, head.logit_scale, head.softcap)

    @staticmethod
    def operand_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        operand = 0 if head.operand_dtype == torch.float32 else head.operand_dtype.itemsize
        return padded(head.n_ids) * (4 + operand)

    @classmethod
    def forward(
        cls, head: LinearHead, x: Tensor, gold: Tensor, *, with_mean: bool = False
    ) -> RowStats:
        """Compute the statistics in the epilogue of the product, without writing the logits."""
        if with_mean:
            return super().forward(head, x, gold, with_mean=True)
        n_splits = linear_logp.splits(x.shape[0], head.n_ids, x.dtype)
        settings = (head.bias, head.logit_scale, head.softcap, n_splits)
        return RowStats(*linear_logp.linear_logp(x, head.weight_slices(), gold, *settings))

    @classmethod
    def forward_bytes(cls, head: LinearHead, n_passages: int, *, with_mean: bool) -> float:
        if with_mean:
            return super().forward_bytes(head, n_passages, with_mean=True)
        # The hidden states of the rows and a temporary of their gather. The product is split, which
        # takes more memory, only for few rows.
        return 2 * head.weight.shape[1] * head.operand_dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        logp, self._log_z, mean = row_pass.row_statistics(
            self._raw,
            self.gold,
            *self._head,
            vocab_size=self.head.n_ids,
            with_mean=with_mean,
        )
        return RowStats(logp, self._log_z, mean)

    def resume(self, log_z: Tensor) -> None:
        self._log_z = log_z

    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        out = self._gradient_buffer()
        row_pass.row_gradient(
            self._raw,
            self.gold,
            *self._head,
            self._log_z,
            weight.contiguous(),
            smoothing,
            self.head.vocab_size,
            out,
        )
        return out[:, : self.head.n_ids]

    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        stats = self.statistics()
        smooth, share = mixture_pass.mixture_statistics(
            self._raw,
            *self._head,
            *self._log_z,
            log_prior.contiguous(),
            vocab_size=self.head.n_ids,
        )
        return stats, smooth, share

    def mixture_gradient(
        self, log_prior: Tensor, hit: Tensor, target: Tensor, spread: Tensor
    ) -> Tensor:
        out = self._gradient_buffer()
        mixture_pass.mixture_gradient(
            self._raw,
            self.gold,
            *self._head,
            *self._log_z,
            *(x.contiguous() for x in (log_prior, hit, target, spread)),
            out,
        )
        return out[:, : self.head.n_ids]

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """Allocate [n, n_ids] with padding after each row."""
        return self.x.new_empty(self.x.shape[0], padded(self.head.n_ids), dtype=dtype)

    def _gradient_buffer(self) -> Tensor:
        # In place for numbers of equal size: each is read and written by the same thread.
        same = self.x.dtype == self._raw.dtype
        return self._raw if same else self._buffer(self.x.dtype)


def padded(n_ids: int) -> int:
    """Return the number of elements from one row of logits to the next."""
    return -(-n_ids // PITCH) * PITCH


def padded_bias(bias: Tensor) -> Tensor:
    """Return bias with padding, `[padded(n_ids)]`; bias itself if it needs none."""
    n_ids = bias.shape[0]
    if n_ids == padded(n_ids):
        return bias
    out = bias.new_empty(padded(n_ids))
    out[:n_ids] = bias
    return out
