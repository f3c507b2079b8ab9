"""The logits of one chunk on a GPU: cuBLAS products, Triton passes between them.

The products keep the dtype of the hidden states, bfloat16 or float16, and leave float32 logits in
rows padded to a multiple of 64: V = 50265 is odd, and a matrix whose rows start at odd addresses
loses the fast products. Bias, scale and softcap are folded in by the passes that read the logits.
The gradient goes to a second buffer in the dtype of the operands, or, for float32, over the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.kernels import linear_logp, mixture_pass, row_pass
from fastrag.ops.chunk_logits import ChunkLogits, RowStats
from fastrag.ops.linear_head import LinearHead, add_product

PITCH = 64


class TritonChunkLogits(ChunkLogits):
    """Operands in the dtype of the hidden states, logits and statistics in float32."""

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        super().__init__(head, x, gold)
        self._raw = self._buffer(torch.float32)
        for part, weight in head.weight_slices():
            add_product(self._raw[:, part], x, weight.t(), first=True)
        self._head = (head.bias, head.logit_scale, head.softcap)

    @staticmethod
    def operand_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        operand = 0 if head.operand_dtype == torch.float32 else head.operand_dtype.itemsize
        return padded(head.vocab_size) * (4 + operand)

    @classmethod
    def token_logp(cls, head: LinearHead, x: Tensor, gold: Tensor) -> Tensor:
        """The logits are never written: statistics in the epilogue of the product."""
        n_splits = linear_logp.splits(x.shape[0], head.vocab_size, x.dtype)
        settings = (head.bias, head.logit_scale, head.softcap, n_splits)
        return linear_logp.linear_logp(x, head.weight_slices(), gold, *settings)

    @classmethod
    def token_logp_bytes(cls, head: LinearHead, n_passages: int) -> float:
        # The rows themselves, gathered and on their way there; splits are for few rows.
        return 2 * head.weight.shape[1] * head.operand_dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        logp, mean, self._peak, self._log_sum = row_pass.row_statistics(
            self._raw, self.gold, *self._head, with_mean=with_mean
        )
        return RowStats(logp, mean)

    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        out = self._gradient_buffer()
        row_pass.row_gradient(
            self._raw,
            self.gold,
            *self._head,
            self._peak,
            self._log_sum,
            weight.contiguous(),
            smoothing,
            out,
        )
        return out

    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        stats = self.statistics()
        smooth, share = mixture_pass.mixture_statistics(
            self._raw, *self._head, self._peak, self._log_sum, log_prior.contiguous()
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
            self._peak,
            self._log_sum,
            *(x.contiguous() for x in (log_prior, hit, target, spread)),
            out,
        )
        return out

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """[n, V], its rows padded; what stands behind column V is never read."""
        n, vocab_size = self.x.shape[0], self.head.vocab_size
        return self.x.new_empty(n, padded(vocab_size), dtype=dtype)[:, :vocab_size]

    def _gradient_buffer(self) -> Tensor:
        # Numbers of one size may overwrite each other: each is read and written by one thread.
        same = self.x.dtype == self._raw.dtype
        return self._raw if same else self._buffer(self.x.dtype)


def padded(vocab_size: int) -> int:
    """Numbers from one row to the next."""
    return -(-vocab_size // PITCH) * PITCH
