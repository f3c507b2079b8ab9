"""The logits of one chunk of rows, their softmax statistics and their gradients, in torch.

    z = softcap * tanh(logit_scale * (x W^T + bias) / softcap)      (no softcap: tanh's argument)

`marginal_nll` and `token_logp` own the order of chunks; this module owns what happens to one.
Every pass overwrites the chunk's single [n, V] buffer:

    logits            z
    exp_rows_         exp(z - max_v z), and per row: log p(y), 1 / sum, mean_v log p(v)
    dlogits_          weight * (softmax - target), the gradient of -weight * log p(y)
    HeadGradients.add the same times the chain factor, contracted with W and x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrag.ops import workspace


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Language model head; `dtype` is the dtype of the maths whatever the weight is stored in."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def buffers(self) -> int:
        """How many [n, V] buffers a chunk of n rows needs: the chain factor of softcap is one."""
        return 1 if self.softcap is None else 2

    def weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows of W, those rows in `dtype`); all of W at once where no cast is needed."""
        if self.weight.dtype == self.dtype:
            yield slice(0, self.vocab_size), self.weight
            return
        row_bytes = self.weight.shape[1] * self.dtype.itemsize
        limit = max(1, workspace.WEIGHT_SLICE_BYTES // row_bytes)
        for part in workspace.even_slices(self.vocab_size, limit):
            yield part, self.weight[part].to(self.dtype)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits [n, V] of the rows x [n, H], and tanh(...) if there is a softcap."""
        z = x.new_empty(x.shape[0], self.vocab_size)
        for part, weight in self.weight_slices():
            torch.mm(x, weight.t(), out=z[:, part])
        if self.bias is not None:
            z.add_(self.bias)
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        if self.softcap is None:
            return z, None
        tanh = z.div_(self.softcap).tanh_()
        return tanh * self.softcap, tanh

    def chain_(self, dz: Tensor, tanh: Tensor | None) -> Tensor:
        """Turns the gradient of the logits into that of x W^T + bias, in place; consumes `tanh`."""
        if tanh is not None:
            dz.mul_(tanh.square_().neg_().add_(1.0))
        if self.logit_scale != 1.0:
            dz.mul_(self.logit_scale)
        return dz


@dataclass(frozen=True, slots=True)
class RowStats:
    """What one row's softmax leaves behind, all [n]."""

    logp: Tensor  # log p(y)
    log_sum: Tensor  # log sum_v exp(z_v - max z)
    mean_logp: Tensor | None  # mean_v log p(v), with label smoothing only


def center_rows_(z: Tensor, gold: Tensor) -> Tensor:
    """z -= max_v z in place; returns the centred logit of `gold` [n].

    Centring before anything is added up is what keeps log p exact for logits around 1e4.
    """
    z.sub_(z.amax(1, keepdim=True))
    return z.gather(1, gold.unsqueeze(1)).squeeze(1)


def exp_rows_(z: Tensor, gold: Tensor, *, with_mean: bool) -> RowStats:
    """Overwrites z [n, V] with exp(z - max_v z) and returns the statistics of each row."""
    picked = center_rows_(z, gold)
    mean = z.mean(1) if with_mean else None
    log_sum = z.exp_().sum(1).log_()
    return RowStats(picked - log_sum, log_sum, None if mean is None else mean - log_sum)


def dlogits_(e: Tensor, gold: Tensor, stats: RowStats, weight: Tensor, smoothing: float) -> Tensor:
    """Overwrites e = exp(z - max z) with the gradient of -weight * log p~(y) in the logits.

    log p~(y) = (1 - smoothing) log p(y) + smoothing * mean_v log p(v), hence
    d/dz = weight * (p - smoothing / V - (1 - smoothing) 1[v = y]).
    """
    e.mul_((weight * torch.exp(-stats.log_sum)).unsqueeze(1))
    if smoothing:
        e.sub_((weight * (smoothing / e.shape[1])).unsqueeze(1))
    return e.scatter_add_(1, gold.unsqueeze(1), (weight * (smoothing - 1.0)).unsqueeze(1))


class HeadGradients:
    """Accumulates the gradients of hidden, weight and bias over chunks, unscaled.

    dhidden is kept in the dtype of hidden, except float16 whose range would undo loss scaling;
    dweight and dbias are kept in the dtype of the maths until the one final cast in backward.
    """

    def __init__(
        self,
        head: LinearHead,
        hidden: Tensor,
        *,
        need_dx: bool,
        need_dw: bool,
        need_db: bool,
    ) -> None:
        self.head = head
        n_rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
        self.shape = hidden.shape
        # One row more than there are: padding of `valid_rows` writes there (see marginal_nll).
        self.dhidden = (
            hidden.new_zeros(n_rows + 1, width, dtype=dhidden_dtype(hidden.dtype))
            if need_dx
            else None
        )
        weight, dtype = head.weight, head.dtype
        self.dweight = weight.new_zeros(weight.shape, dtype=dtype) if need_dw else None
        self.dbias = weight.new_zeros(head.vocab_size, dtype=dtype) if need_db else None

    def __bool__(self) -> bool:
        return not (self.dhidden is None and self.dweight is None and self.dbias is None)

    def add(self, draw: Tensor, x: Tensor, rows: Tensor) -> None:
        """Adds a chunk: draw [n, V] is the gradient of x W^T + bias, rows [n] where x came from."""
        if self.dbias is not None:
            self.dbias.add_(draw.sum(0))
        if self.dweight is not None:
            self.dweight.addmm_(draw.t(), x)
        if self.dhidden is not None:
            dx = torch.zeros_like(x)
            for part, weight in self.head.weight_slices():
                dx.addmm_(draw[:, part], weight)
            self.dhidden[rows] = dx.to(self.dhidden.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dhidden (shaped as hidden), dweight and dbias; empty where not needed."""
        dhidden = None if self.dhidden is None else self.dhidden[:-1].view(self.shape)
        return self._or_empty(dhidden), self._or_empty(self.dweight), self._or_empty(self.dbias)

    def _or_empty(self, grad: Tensor | None) -> Tensor:
        return self.head.weight.new_empty(0, dtype=self.head.dtype) if grad is None else grad


def dhidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the unscaled gradient of hidden states of `dtype` is kept."""
    return torch.float32 if dtype == torch.float16 else dtype
