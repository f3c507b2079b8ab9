"""The logits of one chunk of rows: softmax statistics first, then the gradient in their place.

    z = softcap * tanh(logit_scale * (x W^T + bias) / softcap)      (no softcap: tanh's argument)

`marginal_nll` and `token_logp` own the order of chunks and the marginal over passages; a
`ChunkLogits` owns the vocabulary-sized buffer of one chunk. `open_chunk` makes the one of the
chosen backend; all of them answer the same two pairs of questions:

    statistics          log p(y), and mean_v log p(v)                              each row
    gradient            of -weight * log p~(y), a cross-entropy with a weight per row

    mixture_statistics  mean_v M_v and mean_v r_kv                 smoothed RAG-Token: the K rows
    mixture_gradient    of the smoothed marginal distribution      of a position together

with M_v = log sum_k exp(a_k + log p_kv), the marginal distribution, and r_kv = exp(a_k + log p_kv
- M_v), the share of passage k in it.

A chunk may also hold all rows of a slice of the vocabulary. It is told log_z, which the statistics
of the whole vocabulary have found, by `resume`, and asked for the gradient alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops import workspace
from fastrag.ops.linear_head import LinearHead


@dataclass(frozen=True, slots=True)
class RowStats:
    """What the softmax of each row says."""

    logp: Tensor  # [n], log p(y)
    # [2, n]: max_v z and log sum_v exp(z - max_v z), of which log Z is the sum; kept apart, because
    # where logits are large the sum would lose the digits of the second.
    log_z: Tensor
    mean_logp: Tensor | None = None  # [n], mean_v log p(v), where asked for


class ChunkLogits(ABC):
    """The logits [n, V] of rows x [n, H] with labels gold [n]; n = G * K, position-major.

    Ask for the statistics of one kind, then, at most once, for the gradient of the same kind: it
    takes the place of the logits, and lives as long as this object does.

    For a slice of the vocabulary (`LinearHead.words`) labels count from its first word, -1 for one
    outside; `resume` comes in the place of `statistics`, and there are no mixtures.
    """

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        self.head, self.x, self.gold = head, x, gold

    @staticmethod
    def operand_dtype(dtype: torch.dtype) -> torch.dtype:
        """Dtype in which products take hidden states of `dtype`, the weight and the gradient."""
        return workspace.accumulate_dtype(dtype)

    @staticmethod
    @abstractmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        """Bytes of workspace for each row, averaged over the K rows of a position."""

    @classmethod
    def forward(
        cls, head: LinearHead, x: Tensor, gold: Tensor, *, with_mean: bool = False
    ) -> RowStats:
        """`statistics` where these logits will not be asked for a gradient."""
        return cls(head, x, gold).statistics(with_mean=with_mean)

    @classmethod
    def forward_bytes(cls, head: LinearHead, n_passages: int, *, with_mean: bool) -> float:
        """Bytes of workspace for each row of `forward`."""
        return cls.row_bytes(head, n_passages, mixture=False)

    @abstractmethod
    def statistics(self, *, with_mean: bool = False) -> RowStats:
        """Each row's log p(y) and log Z, and mean_v log p(v) if asked for."""

    @abstractmethod
    def resume(self, log_z: Tensor) -> None:
        """Takes the log_z [2, n] of `statistics`, made before and of the whole vocabulary."""

    @abstractmethod
    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        """The gradient [n, V] of -sum_i weight_i log p~_i(y_i) in x W^T + bias, weight [n].

        log p~(y) = (1 - smoothing) log p(y) + smoothing * mean_v log p(v), hence
        d/dz = weight * (p - smoothing / V - (1 - smoothing) 1[v = y]).
        """

    @abstractmethod
    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        """Each row's log p(y), mean_v M_v [G] and mean_v r_kv [G, K] for log_prior [G, K]."""

    @abstractmethod
    def mixture_gradient(
        self, log_prior: Tensor, hit: Tensor, target: Tensor, spread: Tensor
    ) -> Tensor:
        """The gradient [n, V] in x W^T + bias of a target distribution over passages and words.

        d/dz_kv = target_k p_kv - spread r_kv - hit_k 1[v = y], with hit and target [G, K] and
        spread [G] already weighted by the example.
        """


class TorchChunkLogits(ChunkLogits):
    """Plain torch, on every device and in every dtype."""

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        super().__init__(head, x, gold)
        z = x.new_empty(x.shape[0], head.n_words)
        for part, weight in head.weight_slices():
            torch.mm(x, weight.t(), out=z[:, part])
        if head.bias is not None:
            z.add_(head.bias)
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        self._tanh = None
        if head.softcap is not None:
            self._tanh = z.div_(head.softcap).tanh_()
            z = self._tanh * head.softcap
        self._z = z

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        # tanh, for the chain rule, is a buffer; the mixture is one row of V numbers for each
        # position, and the share of one passage in it another.
        buffers = (1 if head.softcap is None else 2) + (2 / n_passages if mixture else 0)
        return buffers * head.n_words * head.dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        z, (peak, picked) = self._z, self._center()
        mean = z.mean(1) if with_mean else None
        self._log_sum = z.exp_().sum(1).log_()
        log_z = torch.stack([peak, self._log_sum])
        logp = picked - self._log_sum
        return RowStats(logp, log_z, None if mean is None else mean - self._log_sum)

    def resume(self, log_z: Tensor) -> None:
        peak, self._log_sum = log_z
        self._z.sub_(peak.unsqueeze(1)).exp_()

    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        e = self._z  # exp(z - max z)
        e.mul_((weight * torch.exp(-self._log_sum)).unsqueeze(1))
        if smoothing:
            e.sub_((weight * (smoothing / self.head.vocab_size)).unsqueeze(1))
        hit = torch.where(self.gold < 0, 0.0, weight * (smoothing - 1.0))
        e.scatter_add_(1, self.gold.clamp(min=0).unsqueeze(1), hit.unsqueeze(1))
        return self._chain(e)

    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        n_passages = log_prior.shape[1]
        # z becomes log softmax(z), which, unlike exp(z - max z), never underflows.
        z, (peak, picked) = self._z, self._center()
        log_sum = torch.empty_like(picked)
        for k in range(n_passages):
            log_sum[k::n_passages] = z[k::n_passages].exp().sum(1).log_()
        z.sub_(log_sum.unsqueeze(1))
        logp = z.view(-1, n_passages, z.shape[1])
        mixture = logp[:, 0] + log_prior[:, :1]
        for k in range(1, n_passages):
            # logaddexp has no fused multiply: the sum with the prior is its only temporary.
            torch.logaddexp(mixture, logp[:, k] + log_prior[:, k : k + 1], out=mixture)
        self._mixture = mixture
        share = [self._share(log_prior, k).mean(1) for k in range(n_passages)]
        stats = RowStats(picked - log_sum, torch.stack([peak, log_sum]))
        return stats, mixture.mean(1), torch.stack(share, 1)

    def mixture_gradient(
        self, log_prior: Tensor, hit: Tensor, target: Tensor, spread: Tensor
    ) -> Tensor:
        z = self._z
        logp = z.view(-1, log_prior.shape[1], z.shape[1])
        for k in range(log_prior.shape[1]):
            share = self._share(log_prior, k).mul_(spread.unsqueeze(1))
            logp[:, k].exp_().mul_(target[:, k : k + 1]).sub_(share)
        z.scatter_add_(1, self.gold.unsqueeze(1), -hit.reshape(-1, 1))
        return self._chain(z)

    def _center(self) -> tuple[Tensor, Tensor]:
        """z -= max_v z in place; returns that maximum and the centred logit of the label, [n].

        Centring before anything is added up is what keeps log p exact for logits around 1e4.
        """
        z = self._z
        peak = z.amax(1, keepdim=True)
        z.sub_(peak)
        return peak.squeeze(1), z.gather(1, self.gold.unsqueeze(1)).squeeze(1)

    def _share(self, log_prior: Tensor, k: int) -> Tensor:
        """r_k [G, V]; z holds log p."""
        logp = self._z.view(-1, log_prior.shape[1], self._z.shape[1])
        return (logp[:, k] + log_prior[:, k : k + 1]).sub_(self._mixture).exp_()

    def _chain(self, dz: Tensor) -> Tensor:
        """The gradient of the logits becomes that of x W^T + bias, in place."""
        if self._tanh is not None:
            dz.mul_(self._tanh.square_().neg_().add_(1.0))
        if self.head.logit_scale != 1.0:
            dz.mul_(self.head.logit_scale)
        return dz


def chunk_logits(backend: str) -> type[ChunkLogits]:
    """Returns the class that holds the logits of a chunk in this backend."""
    if backend == "cpp":
        from fastrag.ops.cpp_chunk_logits import CppChunkLogits

        return CppChunkLogits
    if backend == "triton":
        from fastrag.ops.triton_chunk_logits import TritonChunkLogits

        return TritonChunkLogits
    return {"torch": TorchChunkLogits}[backend]
