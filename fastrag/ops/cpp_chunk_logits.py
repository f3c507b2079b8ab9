"""The logits of one chunk on a CPU: GEMMs of torch, and passes in C++ between them.

The buffer is [V, n] = W X^T, the orientation in which the GEMM is fastest; the two GEMMs that
follow take it as it is. It holds x W^T throughout: each pass makes bias, logit_scale and softcap
anew from it, so that the gradient needs no second buffer. csrc/loss/row_pass.h has the equations.

    statistics   one read of the buffer          gradient   one read and write of it
    (a mixture: one read more for its statistics)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag import _C
from fastrag.ops import backends, workspace
from fastrag.ops.chunk_logits import ChunkLogits, RowStats
from fastrag.ops.linear_head import LinearHead


class CppChunkLogits(ChunkLogits):
    """float32 on the CPU. Its memory is the buffer that the thread keeps, and goes back to it."""

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        super().__init__(head, x, gold)
        shape = (head.n_words, x.shape[0])
        self._buffer = workspace.take(shape[0] * shape[1])
        self._z0 = self._buffer[: shape[0] * shape[1]].view(shape)
        for part, weight in head.weight_slices():
            torch.mm(weight, x.t(), out=self._z0[part])
        self._pass = _C.RowPass(
            self._z0.numpy(),
            gold.contiguous().numpy(),
            bias=None if head.bias is None else _array(head.bias),
            logit_scale=head.logit_scale,
            softcap=head.softcap or 0.0,
            threads=torch.get_num_threads(),
            isa=backends.forced_isa(),
        )

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)  # None: __init__ did not get that far
        if buffer is not None:
            workspace.give_back(buffer)

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        return head.n_words * head.dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        logp, log_z = self.x.new_empty(len(self.x)), self.x.new_empty(2, len(self.x))
        mean = torch.empty_like(logp) if with_mean else None
        self._pass.statistics(logp.numpy(), log_z.numpy(), None if mean is None else mean.numpy())
        self.resume(log_z)
        return RowStats(logp, log_z, mean)

    def resume(self, log_z: Tensor) -> None:
        self._log_z = _array(log_z)

    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        self._pass.gradient(self._log_z, _array(weight), smoothing, self.head.vocab_size)
        return self._z0.t()

    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        stats = self.statistics()
        mean_mixture, mean_share = log_prior.new_empty(len(log_prior)), torch.empty_like(log_prior)
        means = (mean_mixture.numpy(), mean_share.numpy())
        self._pass.mixture_statistics(self._log_z, _array(log_prior), *means)
        return stats, mean_mixture, mean_share

    def mixture_gradient(
        self, log_prior: Tensor, hit: Tensor, target: Tensor, spread: Tensor
    ) -> Tensor:
        parts = (_array(part) for part in (log_prior, hit, target, spread))
        self._pass.mixture_gradient(self._log_z, *parts)
        return self._z0.t()


def _array(x: Tensor) -> Any:
    return x.detach().to(torch.float32).contiguous().numpy()
