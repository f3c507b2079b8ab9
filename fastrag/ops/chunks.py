"""A chunk of rows of hidden states: its logits, their gradients, and the posterior.

    LinearHead     the language model head, or a slice of its vocabulary
    HeadGradients  the gradients of hidden, weight and bias, summed over chunks
    ChunkLogits    the logits of one chunk: softmax statistics, then the gradient in their place
    GroupPass      marginal, posterior and row weights from the log-probabilities of rows

    z = softcap * tanh(logit_scale * (x W^T + bias) / softcap)      (no softcap: tanh's argument)

`marginal_nll` and `token_logp` iterate over chunks; a `ChunkLogits` holds the vocabulary-sized
buffer of one chunk. A backend implements these ops with a subclass of `ChunkLogits`, whose
`group_pass` is its `GroupPass`. The implementation in plain torch is in this module. The main
methods are two pairs:

    statistics          log p(y), and mean_v log p(v), of each row
    gradient            of -weight * log p~(y), a cross-entropy with one weight per row

    mixture_statistics  mean_v M_v and mean_v r_kv                 smoothed RAG-Token: the K rows
    mixture_gradient    of the smoothed marginal distribution      of a position together

with M_v = log sum_k exp(a_k + log p_kv), the marginal distribution, and r_kv = exp(a_k + log p_kv
- M_v), the share of passage k in it.

A chunk may also hold all rows and a slice of the vocabulary. Then `resume` takes the log_z of the
whole vocabulary from earlier statistics, and only the gradient is computed.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastrag.ops import workspace
from fastrag.ops.positions import Chunk


class LinearHead:
    """The language model head, or a slice of its vocabulary.

    The operands of products may have a shorter dtype than the maths; sums have the dtype `dtype`.

    Args:
        weight: `[n_ids, H]`, in any dtype; n_ids is V or the number of token ids of a slice.
        bias: `[n_ids]`, or None.
        softcap: bound of the logits, or None.
        logit_scale: factor before the softcap.
        dtype: dtype of the maths.
        operand_dtype: dtype of the operands of products; None: `dtype`.
        vocab_size: V; None if the weight is the whole head.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        dtype: torch.dtype,
        operand_dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.weight, self.bias, self.softcap, self.logit_scale = weight, bias, softcap, logit_scale
        self.dtype, self.operand_dtype = dtype, operand_dtype or dtype
        self.n_ids = weight.shape[0]
        self.vocab_size = self.n_ids if vocab_size is None else vocab_size

    def vocab_slice(self, part: slice) -> LinearHead:
        """Return the head of a slice of the vocabulary, its weight in the dtype of operands."""
        return LinearHead(
            self.weight[part].to(self.operand_dtype),
            None if self.bias is None else self.bias[part],
            self.softcap,
            self.logit_scale,
            self.dtype,
            self.operand_dtype,
            self.vocab_size,
        )

    def weight_slices(self) -> Iterable[tuple[slice, Tensor]]:
        """Return slices of W and their weight in the dtype of operands: one if W has this dtype.

        A converted weight is valid until the next slice.
        """
        if self.weight.dtype == self.operand_dtype:
            return ((slice(0, self.n_ids), self.weight),)
        dtype, device = self.operand_dtype, self.weight.device
        limit = workspace.rows_per_slice(self.weight.shape[1], dtype, device)
        return ((part, _converted(self.weight[part], dtype)) for part in self.vocab_slices(limit))

    def vocab_slices(self, limit: int) -> Iterator[slice]:
        """Yield slices of the vocabulary of at most `limit` token ids, or of one."""
        # A slice of the logits starts at a multiple of 64: cuBLAS needs aligned matrices.
        step = 64 if limit >= 64 else 1
        for part in workspace.even_slices(-(-self.n_ids // step), max(1, limit // step)):
            yield slice(part.start * step, min(part.stop * step, self.n_ids))


class HeadGradients:
    """Accumulate the gradients of hidden, weight and bias over chunks.

    With `late`, the gradients are unscaled, and backward multiplies them. Then dhidden and dweight
    have the dtypes of `dhidden_dtype` and `dweight_dtype`, and dbias has the dtype of the maths
    until it is cast in the end. Without `late`, dhidden and dweight have the dtypes of hidden and
    weight; dweight is then not accumulated but written by one `add_vocab_slice` for each slice of
    the vocabulary.

    Attributes:
        wanted: whether any gradient is needed.
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
        # The padding of `valid_rows` writes to an additional last row.
        dx_dtype = dhidden_dtype(hidden.dtype) if late else hidden.dtype
        self.dhidden = hidden.new_zeros(n_rows + 1, width, dtype=dx_dtype) if need_dx else None
        weight = head.weight
        self.dweight_dtype = weight.dtype
        if late:
            self.dweight_dtype = dweight_dtype(weight.dtype, weight.device, head.dtype)
        self.need_dw = need_dw
        # Sums over several chunks are in the dtype of the maths.
        self._dweight: Tensor | None = None
        self.dbias = weight.new_zeros(head.vocab_size, dtype=head.dtype) if need_db else None
        self.wanted = need_dx or need_dw or need_db

    def add(self, draw: Tensor, x: Tensor, chunk_rows: Tensor, *, only: bool = False) -> None:
        """Add a chunk, which may be the only one.

        draw [n, V] is the gradient of x W^T + bias, x = hidden[chunk_rows].
        """
        if self.dbias is not None:
            self.dbias.add_(draw.sum(0, dtype=self.dbias.dtype))
        if self.need_dw:
            first = self._dweight is None  # it writes dweight, which saves zeroing it
            total = self._total(self.dweight_dtype if only else self.head.dtype)
            add_product(total, draw.t(), x, first=first)
        if self.dhidden is not None:
            dx = torch.empty_like(x, dtype=self.head.dtype)
            for part, weight in self.head.weight_slices():
                add_product(dx, draw[:, part], weight, first=part.start == 0)
            self.put_rows(dx, chunk_rows)

    def add_vocab_slice(self, part: slice, draw: Tensor, x: Tensor) -> None:
        """Write a slice of dweight and dbias from draw [n, n_ids] of all rows x [n, H]."""
        if self.dbias is not None:
            torch.sum(draw, 0, dtype=self.dbias.dtype, out=self.dbias[part])
        if self.need_dw:
            add_product(self._total(self.dweight_dtype)[part], draw.t(), x, first=True)

    def put_rows(self, dx: Tensor, chunk_rows: Tensor) -> None:
        """Write dx [n, H], the complete gradient of hidden[chunk_rows]."""
        if self.dhidden is not None:
            self.dhidden[chunk_rows] = dx.to(self.dhidden.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dhidden (in the shape of hidden), dweight and dbias; empty if not needed."""
        empty, dtype = self.head.weight.new_empty, self.head.dtype
        dweight = self._dweight
        if self.need_dw and dweight is None:
            dweight = self._total(self.dweight_dtype).zero_()
        return (
            empty(0, dtype=dtype) if self.dhidden is None else self.dhidden[:-1].view(self.shape),
            empty(0, dtype=dtype) if dweight is None else dweight.to(self.dweight_dtype),
            empty(0, dtype=dtype) if self.dbias is None else self.dbias,
        )

    def _total(self, dtype: torch.dtype) -> Tensor:
        """Return dweight, which the first call makes."""
        if self._dweight is None:
            weight = self.head.weight
            self._dweight = workspace.advise(weight.new_empty(weight.shape, dtype=dtype))
        return self._dweight


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.device.type != "cpu":
        return weight.to(dtype)
    return workspace.block(weight.shape[0], weight.shape[1], dtype).copy_(weight)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Compute total += a b, or total = a b for the first product of a sum.

    On a GPU, operands of 16 bits are multiplied as they are, with products in float32. On a CPU,
    torch's products have the dtype of the operands, which are converted to float32 unless the
    processor multiplies them. If the total has another dtype than the products, they are computed
    block by block.
    """
    if a.dtype.itemsize == 2:
        if total.is_cuda:
            if total.dtype != torch.float32:  # has no other products
                total.copy_(torch.mm(a, b, out_dtype=torch.float32))
            elif first:
                torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
            else:
                torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
            return
        if not workspace.multiplies(a.dtype):
            a, b = a.to(torch.float32), b.to(torch.float32)
    if a.dtype == total.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
        return
    limit = workspace.rows_per_slice(total.shape[1], a.dtype, total.device)
    for part in workspace.even_slices(len(total), limit):
        if a.dtype == torch.float32 and not total.is_cuda:  # b is not a converted weight here
            product = workspace.block(part.stop - part.start, total.shape[1], a.dtype)
            torch.mm(a[part], b, out=product)
        else:
            product = torch.mm(a[part], b)
        if first:
            total[part] = product
        else:
            total[part] += product


@functools.cache
def dhidden_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the unscaled gradient of hidden states of `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache
def dweight_dtype(weight: torch.dtype, device: torch.device, maths: torch.dtype) -> torch.dtype:
    """Return the dtype of the unscaled gradient of a head of dtype `weight`.

    On a GPU it is that of the maths. On a CPU, writing and scaling so many more bytes would take as
    long as the passes over the logits, and a gradient of 16 bits has its rounding error anyway.
    """
    return dhidden_dtype(weight) if device.type == "cpu" else maths


@dataclass(frozen=True, slots=True)
class RowStats:
    """The softmax statistics of each row."""

    logp: Tensor  # [n], log p(y)
    # [2, n]: max_v z and log sum_v exp(z - max_v z), whose sum is log Z. They are kept separately,
    # because the sum of a large maximum and the second would lose digits of the second.
    log_z: Tensor
    mean_logp: Tensor | None = None  # [n], mean_v log p(v), if requested


@dataclass(frozen=True, slots=True)
class Call:
    """Values that all chunks of one call share."""

    log_prior: Tensor  # [B, K]
    example_weight: Tensor  # [B]
    active: Tensor  # [B] bool, whether any label of the example counts
    bad: Tensor  # [B*T + 1] bool, whether the label of a position is outside the vocabulary
    smoothing: float
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TokenSums:
    """Results of RAG-Token by position; padding writes to the last entry."""

    log_marginal: Tensor  # [B*T + 1]
    occupancy: Tensor  # [B*T + 1, K], sum over v of the target distribution
    log_post: Tensor  # [B*T + 1, K]
    token_logp: Tensor  # [B*T + 1, K]


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weights of ChunkLogits.gradient (only hit) or of mixture_gradient (all three)."""

    hit: Tensor  # [G, K]
    target: Tensor | None = None  # [G, K]
    spread: Tensor | None = None  # [G]


@dataclass(frozen=True, slots=True)
class SequenceSums:
    """Results of RAG-Sequence."""

    token_logp: Tensor  # [B*K*T + 1], by row of hidden; padding writes to the last entry
    nll: Tensor  # [B]
    log_post: Tensor  # [B, K]
    dscores: Tensor  # [B, K]


class GroupPass(ABC):
    """Compute marginal, posterior and row weights from the log-probabilities of a chunk's rows.

        token     w_kt = softmax_k(a_k + l_kt)             a group is the K rows of a position
        sequence  w_k = softmax_k(a_k + sum_t l_kt)        a group is the K*T rows of an example

    All tensors are small: [n] and [G, K] for a chunk, and at most [B, K, T] for the call. Every
    method writes its results to `sums`.
    """

    @staticmethod
    @abstractmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        """Return the row weights from logp [n]; mixture: mean_v M_v [G] and mean_v r_kv [G, K]."""

    @staticmethod
    @abstractmethod
    def sequence_rows(call: Call, chunk: Chunk, stats: RowStats, sums: SequenceSums) -> None:
        """Store the smoothed log-probabilities of the rows; 0 where the label does not count."""

    @staticmethod
    @abstractmethod
    def sequence_posterior(call: Call, examples: slice, sums: SequenceSums) -> None:
        """Compute the posterior of examples of which all rows have been stored."""

    @staticmethod
    @abstractmethod
    def sequence_weights(call: Call, chunk: Chunk, sums: SequenceSums) -> Tensor:
        """Return the weights [n] of ChunkLogits.gradient from the posterior of the examples."""


class TorchGroupPass(GroupPass):
    """The group pass in plain torch, for every device and dtype."""

    @staticmethod
    def token(
        call: Call,
        chunk: Chunk,
        logp: Tensor,
        mixture: tuple[Tensor, Tensor] | None,
        sums: TokenSums,
    ) -> TokenWeights:
        counted = chunk.counted.unsqueeze(1)
        prior = call.log_prior[chunk.example]
        logp = logp.view(prior.shape).masked_fill(call.bad[chunk.position].unsqueeze(1), torch.nan)
        joint = torch.where(counted, prior + logp, 0.0)
        log_marginal = joint.logsumexp(1)
        # joint - log_marginal would be less accurate: both may be large, and w gets their rounding.
        log_post = joint.log_softmax(1)
        target = posterior = log_post.exp()
        if mixture is not None:
            log_marginal = torch.lerp(log_marginal, mixture[0], call.smoothing)
            target = torch.lerp(posterior, mixture[1], call.smoothing)
        sums.log_marginal[chunk.position] = torch.where(chunk.counted, log_marginal, 0.0)
        sums.occupancy[chunk.position] = torch.where(counted, target, 0.0)
        sums.log_post[chunk.position] = log_post
        sums.token_logp[chunk.position] = torch.where(counted, logp, 0.0)
        upstream = torch.where(chunk.counted, call.example_weight[chunk.example], 0.0)
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
        logp = logp.view(len(chunk.counted), -1)
        logp = logp.masked_fill(call.bad[chunk.position].unsqueeze(1), torch.nan)
        logp = torch.where(chunk.counted.unsqueeze(1), logp, 0.0)
        sums.token_logp[chunk.chunk_rows] = logp.view(-1)

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
        return torch.where(chunk.counted.unsqueeze(1), weight[chunk.example], 0.0).view(-1)


class ChunkLogits(ABC):
    """The logits [n, V] of rows x [n, H] with labels gold [n]; n = G * K, position-major.

    Call the statistics of one kind first, then, at most once, the gradient of the same kind. The
    gradient overwrites the logits and is valid as long as this object.

    For a slice of the vocabulary (`LinearHead.vocab_slice`), labels are relative to its first token
    id and -1 outside it; `resume` replaces `statistics`, and there are no mixtures.

    Attributes:
        group_pass: the group pass of the backend.
    """

    group_pass: ClassVar[type[GroupPass]] = TorchGroupPass

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        self.head, self.x, self.gold = head, x, gold

    @staticmethod
    def operand_dtype(dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the operands of products for hidden states of `dtype`."""
        return workspace.accumulate_dtype(dtype)

    @staticmethod
    @abstractmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        """Return the bytes of workspace per row, averaged over the K rows of a position."""

    @classmethod
    def forward(
        cls, head: LinearHead, x: Tensor, gold: Tensor, *, with_mean: bool = False
    ) -> RowStats:
        """Return the `statistics` of logits whose gradient is not needed."""
        return cls(head, x, gold).statistics(with_mean=with_mean)

    @classmethod
    def forward_bytes(cls, head: LinearHead, n_passages: int, *, with_mean: bool) -> float:
        """Return the bytes of workspace per row of `forward`."""
        return cls.row_bytes(head, n_passages, mixture=False)

    @abstractmethod
    def statistics(self, *, with_mean: bool = False) -> RowStats:
        """Return log p(y) and log Z of each row, and mean_v log p(v) with `with_mean`."""

    @abstractmethod
    def resume(self, log_z: Tensor) -> None:
        """Use log_z [2, n] from earlier `statistics` of the whole vocabulary."""

    @abstractmethod
    def gradient(self, weight: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the gradient [n, V] of -sum_i weight_i log p~_i(y_i) by x W^T + bias, weight [n].

        log p~(y) = (1 - smoothing) log p(y) + smoothing * mean_v log p(v), hence
        d/dz = weight * (p - smoothing / V - (1 - smoothing) 1[v = y]).
        """

    @abstractmethod
    def mixture_statistics(self, log_prior: Tensor) -> tuple[RowStats, Tensor, Tensor]:
        """Return the statistics of each row, mean_v M_v [G] and mean_v r_kv [G, K]."""

    @abstractmethod
    def mixture_gradient(
        self, log_prior: Tensor, hit: Tensor, target: Tensor, spread: Tensor
    ) -> Tensor:
        """Return the gradient [n, V] of the smoothed marginal distribution by x W^T + bias.

        d/dz_kv = target_k p_kv - spread r_kv - hit_k 1[v = y], where hit and target [G, K] and
        spread [G] include the weight of the example.
        """


class TorchChunkLogits(ChunkLogits):
    """The logits in plain torch, for every device and dtype."""

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        super().__init__(head, x, gold)
        z = x.new_empty(x.shape[0], head.n_ids)
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
        # The chain rule needs a buffer for tanh. The mixture needs V numbers for each position, and
        # so does the share of one passage in it.
        buffers = (1 if head.softcap is None else 2) + (2 / n_passages if mixture else 0)
        return buffers * head.n_ids * head.dtype.itemsize

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
        # z becomes log softmax(z), which never underflows, unlike exp(z - max z).
        z, (peak, picked) = self._z, self._center()
        log_sum = torch.empty_like(picked)
        for k in range(n_passages):
            log_sum[k::n_passages] = z[k::n_passages].exp().sum(1).log_()
        z.sub_(log_sum.unsqueeze(1))
        logp = z.view(-1, n_passages, z.shape[1])
        mixture = logp[:, 0] + log_prior[:, :1]
        for k in range(1, n_passages):
            # The sum with the prior is the only temporary.
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
        """Centre z -= max_v z in place; return the maximum and the centred logit of the label, [n].

        Centring before any sum keeps log p exact for logits around 1e4.
        """
        z = self._z
        peak = z.amax(1, keepdim=True)
        z.sub_(peak)
        return peak.squeeze(1), z.gather(1, self.gold.unsqueeze(1)).squeeze(1)

    def _share(self, log_prior: Tensor, k: int) -> Tensor:
        """Return r_k [G, V]; z holds log p."""
        logp = self._z.view(-1, log_prior.shape[1], self._z.shape[1])
        return (logp[:, k] + log_prior[:, k : k + 1]).sub_(self._mixture).exp_()

    def _chain(self, dz: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of x W^T + bias, in place."""
        if self._tanh is not None:
            dz.mul_(self._tanh.square_().neg_().add_(1.0))
        if self.head.logit_scale != 1.0:
            dz.mul_(self.head.logit_scale)
        return dz
