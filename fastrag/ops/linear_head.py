"""A language model head, and the gradients that its chunks add up to.

HeadGradients.add         contracts the gradient of x W^T + bias with W and x: a chunk of rows
HeadGradients.add_words   the same for all rows and a slice of the vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrag.ops import workspace


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Language model head; `dtype` is the dtype of the maths whatever the weight is stored in.

    Products may take operands of fewer bits, `operand`, and still add up in `dtype`.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype
    operand: torch.dtype | None = None  # None: dtype
    sliced_from: int | None = None  # V, where the weight is only a slice of its rows

    @property
    def operand_dtype(self) -> torch.dtype:
        return self.dtype if self.operand is None else self.operand

    @property
    def n_words(self) -> int:
        return self.weight.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.n_words if self.sliced_from is None else self.sliced_from

    def words(self, part: slice) -> LinearHead:
        """The head of a slice of the vocabulary, its weight converted to an operand already."""
        weight = self.weight[part].to(self.operand_dtype)
        bias = None if self.bias is None else self.bias[part]
        return replace(self, weight=weight, bias=bias, sliced_from=self.vocab_size)

    def weight_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (rows of W, those rows as an operand); W at once where no cast is needed."""
        if self.weight.dtype == self.operand_dtype:
            yield slice(0, self.n_words), self.weight
            return
        row_bytes = self.weight.shape[1] * self.operand_dtype.itemsize
        for rows in self.word_slices(workspace.WEIGHT_SLICE_BYTES // row_bytes):
            yield rows, self.weight[rows].to(self.operand_dtype)

    def word_slices(self, limit: int) -> Iterator[slice]:
        """Cuts the vocabulary into slices of at most `limit` words, or of one."""
        # A slice of the logits starts at a multiple of this: cuBLAS wants aligned matrices.
        step = 64 if limit >= 64 else 1
        for part in workspace.even_slices(-(-self.n_words // step), max(1, limit // step)):
            yield slice(part.start * step, min(part.stop * step, self.n_words))


class HeadGradients:
    """Accumulates the gradients of hidden, weight and bias over chunks.

    `late`: they are unscaled, and backward has yet to multiply them. dhidden is then kept in the
    dtype of hidden, except float16 whose range would undo loss scaling; dweight and dbias are kept
    in the dtype of the maths until that one final cast. Otherwise dhidden and dweight have the
    dtypes of their inputs; dweight is then no place to add up in, and takes one `add_words` for
    each slice.
    """

    def __init__(
        self,
        head: LinearHead,
        hidden: Tensor,
        *,
        need_dx: bool,
        need_dw: bool,
        need_db: bool,
        late: bool = True,
    ) -> None:
        self.head = head
        n_rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
        self.shape = hidden.shape
        # One row more than there are: padding of `valid_rows` writes there (see marginal_nll).
        dx_dtype = dhidden_dtype(hidden.dtype) if late else hidden.dtype
        self.dhidden = hidden.new_zeros(n_rows + 1, width, dtype=dx_dtype) if need_dx else None
        weight, dtype = head.weight, head.dtype if late else head.weight.dtype
        self.dweight = (
            workspace.advise(weight.new_empty(weight.shape, dtype=dtype)) if need_dw else None
        )
        self.dbias = weight.new_zeros(head.vocab_size, dtype=head.dtype) if need_db else None
        self._written = False  # the first chunk writes dweight: zeroing V * H numbers costs a pass

    def __bool__(self) -> bool:
        return not (self.dhidden is None and self.dweight is None and self.dbias is None)

    def add(self, draw: Tensor, x: Tensor, rows: Tensor) -> None:
        """Adds a chunk: draw [n, V] is the gradient of x W^T + bias, rows [n] where x came from."""
        if self.dbias is not None:
            self.dbias.add_(draw.sum(0, dtype=self.dbias.dtype))
        if self.dweight is not None:
            add_product(self.dweight, draw.t(), x, first=not self._written)
            self._written = True
        if self.dhidden is not None:
            dx = torch.empty_like(x, dtype=self.head.dtype)
            for part, weight in self.head.weight_slices():
                add_product(dx, draw[:, part], weight, first=part.start == 0)
            self.put_rows(dx, rows)

    def add_words(self, part: slice, draw: Tensor, x: Tensor) -> None:
        """Writes what a slice of the vocabulary says: draw [n, words], of all rows that count."""
        if self.dbias is not None:
            torch.sum(draw, 0, dtype=self.dbias.dtype, out=self.dbias[part])
        if self.dweight is not None:
            dweight = self.dweight[part]
            wide = dweight
            if dweight.dtype != self.head.dtype:
                wide = torch.empty_like(dweight, dtype=self.head.dtype)
            add_product(wide, draw.t(), x, first=True)
            if wide is not dweight:
                dweight.copy_(wide)
            self._written = True

    def put_rows(self, dx: Tensor, rows: Tensor) -> None:
        """Writes dx [n, H], complete, where its rows [n] of hidden came from."""
        if self.dhidden is not None:
            self.dhidden[rows] = dx.to(self.dhidden.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dhidden (shaped as hidden), dweight and dbias; empty where not needed."""
        if self.dweight is not None and not self._written:
            self.dweight.zero_()
        dhidden = None if self.dhidden is None else self.dhidden[:-1].view(self.shape)
        return self._or_empty(dhidden), self._or_empty(self.dweight), self._or_empty(self.dbias)

    def _or_empty(self, grad: Tensor | None) -> Tensor:
        return self.head.weight.new_empty(0, dtype=self.head.dtype) if grad is None else grad


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a b; for the first of a sum total = a b, whatever stood there.

    Operands of fewer bits than total are multiplied as they are and added up in its dtype; where
    torch cannot, on a CPU, they are converted first, to the same result.
    """
    if a.dtype == total.dtype or not total.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def dhidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the unscaled gradient of hidden states of `dtype` is kept."""
    return torch.float32 if dtype == torch.float16 else dtype
