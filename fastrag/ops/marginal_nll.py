"""RAG-Token and RAG-Sequence negative log-likelihood, with gradients computed in the forward.

    token     nll_b = -sum_t m_bt log sum_k exp(a_bk + l_bkt)
    sequence  nll_b = -log sum_k exp(a_bk + sum_t m_bt l_bkt)
    (a = log_softmax_k(doc_scores), l = token_logp, m = label counts; Lewis et al. 2020, sec. 2.1)

With the posterior w (softmax_k of the same exponents):

    d logits = e_b w m (softmax_v - 1[v = y])        a cross-entropy with one weight per row
    d doc_scores_bk = e_b (p_bk sum_t m_bt - sum_t m_bt w_bkt)     token      (p = exp a)
                      e_b (p_bk - w_bk)                            sequence

**Group-resident chunks.** All rows of one group are in one chunk: the K rows of a position (token)
or the K*T rows of an example (sequence). So w is known while the chunk's logits exist, and the
gradients of sum_b e_b nll_b (e = example_weight) cost three GEMMs. No tensor of size [B, K, T, V]
ever exists.

**Vocabulary-major.** If an example of RAG-Sequence is larger than the workspace, or if chunks would
have so few rows that reading and writing dW for each of them costs more than a GEMM, the statistics
of all rows are computed first, then all weights, then the gradients slice by slice of the
vocabulary (`vocab_major`).

**Late scale.** Gradients are saved without the upstream gradient and the normalizer, and backward
multiplies them by both, in place if the graph is freed afterwards, so that dW is not copied
(`autograd.scaled`). If the upstream gradient is a vector (reduction "none", `deferred=True`), only
dX and the gradient of doc_scores can be scaled in this way, example by example; this suffices if
the head is frozen. If the head is trained, backward computes the gradients of hidden and head:
d nll / d token_logp = -w, from which token_logp_backward continues. Smoothed RAG-Token is not a
function of token_logp, so backward runs the op again with example_weight = upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrag.ops import backends, vocab_major, workspace
from fastrag.ops.autograd import once_differentiable, scaled
from fastrag.ops.chunks import (
    Call,
    ChunkLogits,
    HeadGradients,
    LinearHead,
    RowStats,
    SequenceSums,
    TokenSums,
)
from fastrag.ops.positions import Chunk, Positions, check_values
from fastrag.ops.token_logp import fake_head_gradients, token_logp_backward
from fastrag.profiling import stage

backends.register(
    "marginal_nll",
    cpp="fastrag.ops.cpp:CppChunkLogits",
    triton="fastrag.ops.triton_chunks:TritonChunkLogits",
    torch="fastrag.ops.chunks:TorchChunkLogits",
)

# One Triton program holds the values of all passages of a group; with smoothing, for several token
# ids at once.
TRITON_MAX_PASSAGES = 1024
TRITON_MAX_MIXED = 256

_N_INPUTS = 17
_NEEDS = (0, 1, 2, 4)  # hidden, weight, bias, doc_scores: the inputs with a saved gradient


@torch.library.custom_op(
    "fastrag::marginal_nll",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor doc_scores, "
    "Tensor? example_weight, Tensor? valid_rows, str marginal, float? softcap, "
    "float logit_scale, float label_smoothing, int ignore_index, bool deferred, bool need_dx, "
    "bool need_dw, bool need_db, bool need_ds) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def marginal_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    doc_scores: Tensor,
    example_weight: Tensor | None,
    valid_rows: Tensor | None,
    marginal: str,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    ignore_index: int,
    deferred: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_ds: bool,
) -> tuple[Tensor, ...]:
    """Return total, nll, log_posterior, token_logp, dhidden, dweight, dbias, ddoc_scores, log_z.

    total [] = sum_b example_weight_b nll_b and nll [B] are the loss: total is differentiable unless
    `deferred`, nll is if `deferred`. The gradients are those of total; gradients that are not
    needed, or are computed in backward, are empty. token_logp [B, K, T] are the log-probabilities
    in the marginal, without gradient, and 0 where the label does not count. log_z [2, B, K, T] are
    the two parts of log Z (RowStats) if backward needs them, else empty.
    """
    n_passages = hidden.shape[1]
    limit = TRITON_MAX_MIXED if marginal == "token" and label_smoothing else TRITON_MAX_PASSAGES
    unfit = {}
    if n_passages > limit:
        unfit["triton"] = lambda: f"its kernels take K of at most {limit} here, got {n_passages}"
    backend = backends.choose("marginal_nll", hidden.device, hidden.dtype, unfit)
    open_chunk: type[ChunkLogits] = backends.load("marginal_nll", backend)
    late, keep_log_z = _late(marginal, label_smoothing, deferred, need_dw, need_db)
    if late:
        need_dx = need_dw = need_db = False
    with stage("marginal_nll"), workspace.without_autocast(hidden.device):
        dtype = workspace.accumulate_dtype(hidden.dtype)
        operand = open_chunk.operand_dtype(hidden.dtype)
        head = LinearHead(weight, bias, softcap, logit_scale, dtype, operand)
        sums = HeadGradients(head, hidden, need_dx=need_dx, need_dw=need_dw, need_db=need_db)
        run = (_Token if marginal == "token" else _Sequence)(
            open_chunk,
            head,
            sums,
            hidden,
            labels,
            doc_scores,
            example_weight,
            valid_rows,
            label_smoothing,
            ignore_index,
            keep_log_z,
        )
        run.run()
        nll, log_posterior, token_logp, ddoc_scores = run.results()
        if run.unlisted is not None:
            nll = nll.masked_fill(run.unlisted, torch.nan)
        weighted = nll if example_weight is None else nll * run.example_weight
        dscores = ddoc_scores if need_ds else ddoc_scores.new_empty(0)
        log_z = nll.new_empty(0)
        if keep_log_z:
            log_z = run.log_z[:, :-1].contiguous().view(2, *hidden.shape[:3])
        return (weighted.sum(), nll, log_posterior, token_logp, *sums.results(), dscores, log_z)


def _late(
    marginal: str, smoothing: float, deferred: bool, need_dw: bool, need_db: bool
) -> tuple[bool, bool]:
    """Return whether backward computes the gradients of hidden and head, and whether from log Z.

    It does for a vector upstream gradient: rows of dX can be scaled later, dW cannot. It cannot
    start from log Z for smoothed RAG-Token, which is not a function of token_logp.
    """
    late = deferred and (need_dw or need_db)
    return late, late and not (marginal == "token" and smoothing > 0.0)


@marginal_nll.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    marginal, smoothing, (deferred, *need) = rest[5], rest[8], rest[10:]
    late, keep_log_z = _late(marginal, smoothing, deferred, *need[1:3])
    if late:
        need[:3] = [False] * 3
    n_examples, n_passages, n_tokens, _ = hidden.shape
    dtype = workspace.accumulate_dtype(hidden.dtype)
    post = (n_examples, n_passages, n_tokens) if marginal == "token" else (n_examples, n_passages)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(n_examples, dtype=dtype),
        hidden.new_empty(post, dtype=dtype),
        hidden.new_empty((n_examples, n_passages, n_tokens), dtype=dtype),
        *fake_head_gradients(hidden, weight, *need[:3]),
        hidden.new_empty((n_examples, n_passages) if need[3] else (0,), dtype=dtype),
        hidden.new_empty((2, *hidden.shape[:3]) if keep_log_z else (0,), dtype=dtype),
    )


class _Marginal:
    """One call of the op: the prior, the masks and the iteration over chunks."""

    # Whether smoothing needs the marginal distribution at every token id, not only at the label.
    mixes: ClassVar[bool]

    def __init__(
        self,
        open_chunk: type[ChunkLogits],
        head: LinearHead,
        sums: HeadGradients,
        hidden: Tensor,
        labels: Tensor,
        doc_scores: Tensor,
        example_weight: Tensor | None,
        valid_rows: Tensor | None,
        smoothing: float,
        ignore_index: int,
        keep_log_z: bool,
    ) -> None:
        self.open_chunk, self.group, self.head = open_chunk, open_chunk.group_pass, head
        self.sums, self.smoothing = sums, smoothing
        self.n_examples, self.n_passages, self.n_tokens, _ = hidden.shape
        scores = doc_scores.to(head.dtype)
        counted = labels != ignore_index
        bad, self.unlisted = check_values(labels, counted, head.vocab_size, scores, valid_rows)
        present = scores != -torch.inf
        live = present.any(1)  # [B]: an example without passages has no likelihood
        self.log_prior = torch.where(present, scores.log_softmax(1), -torch.inf)
        labels = torch.where(bad, 0, labels)
        counted = counted & live.unsqueeze(1)
        self.counted = counted
        self.example_weight = (
            torch.ones_like(scores[:, 0])
            if example_weight is None
            else example_weight.to(head.dtype)
        )
        if self.unlisted is not None:
            # Incomplete gradients must not look valid.
            self.example_weight = self.example_weight.masked_fill(self.unlisted, torch.nan)
        self.positions = Positions(hidden, labels, counted, present, valid_rows, head.operand_dtype)
        self.call = Call(
            self.log_prior,
            self.example_weight,
            counted.any(1),
            torch.nn.functional.pad(bad.reshape(-1), (0, 1)),
            smoothing,
            head.vocab_size,
        )
        mixture = self.mixes and bool(smoothing)
        row_bytes = open_chunk.row_bytes(head, self.n_passages, mixture=mixture)
        # positions per chunk
        self.limit = workspace.rows_per_chunk(self.n_passages * row_bytes, hidden.device)
        # If so, the gradients, if any, are computed slice by slice of the vocabulary.
        self.statistics_first = not mixture and (not sums.wanted or self.prefers_vocab_slices())
        keep_log_z = keep_log_z or (sums.wanted and self.statistics_first)
        self.log_z = scores.new_zeros(2, hidden.shape[:3].numel() + 1 if keep_log_z else 0)

    def prefers_vocab_slices(self) -> bool:
        if not self.sums.need_dw or self.positions.n_visited <= self.limit:
            return False  # A single chunk writes dW once.
        n_rows, per_chunk = (n * self.n_passages for n in (self.positions.n_visited, self.limit))
        return vocab_major.is_better(n_rows, per_chunk, self.positions.hidden.device)

    def forward(self, *, with_mean: bool = False) -> Iterator[tuple[Chunk, RowStats]]:
        """Yield all chunks with their statistics, without computing gradients."""
        row_bytes = self.open_chunk.forward_bytes(self.head, self.n_passages, with_mean=with_mean)
        device = self.positions.hidden.device
        limit = workspace.rows_per_chunk(self.n_passages * row_bytes, device)
        for part in workspace.even_slices(self.positions.n_visited, limit):
            with stage("marginal_nll/gather"):
                chunk = self.positions.gather(part)
            with stage("marginal_nll/statistics"):
                stats = self.open_chunk.forward(self.head, chunk.x, chunk.gold, with_mean=with_mean)
            if self.log_z.numel():
                self.log_z[:, chunk.chunk_rows] = stats.log_z
            yield chunk, stats

    def add_gradients(self, chunk: Chunk, weight: Tensor, smoothing: float = 0.0) -> None:
        """Add all gradients from the chunk of all positions."""
        log_z = self.log_z[:, chunk.chunk_rows]
        vocab_major.add_gradients(self.sums, self.open_chunk, chunk, log_z, weight, smoothing)


class _Token(_Marginal):
    """nll_b = -sum_t m_bt log sum_k exp(a_bk + l_bkt); a group is one position."""

    mixes = True

    def run(self) -> None:
        # One entry per position, and one for the padding of valid_rows.
        n, zeros = self.n_examples * self.n_tokens + 1, self.log_prior.new_zeros
        k = self.n_passages
        self.found = TokenSums(zeros(n), zeros(n, k), zeros(n, k), zeros(n, k))
        if not self.statistics_first:
            for part in workspace.even_slices(self.positions.n_visited, self.limit):
                self._chunk(part)
            return
        hits = []
        for chunk, stats in self.forward():
            with stage("marginal_nll/group_pass"):
                weights = self.group.token(self.call, chunk, stats.logp, None, self.found)
            hits.append(weights.hit.view(-1))
        if self.sums.wanted and hits:
            self.add_gradients(self.positions.everything(), torch.cat(hits))

    # A method of its own, so that the logits of a chunk are freed before the next chunk's exist.
    def _chunk(self, part: slice) -> None:
        """Compute loss and gradients of the positions `part`; smoothing is of the marginal.

        With G_kv = (1 - s) w_k 1[v = y] + (s / V) r_kv, whose sum over v is `target`, the gradient
        of the logits is upstream * (target_k p_kv - G_kv).
        """
        with stage("marginal_nll/gather"):
            chunk = self.positions.gather(part)
        with stage("marginal_nll/logits"):
            logits = self.open_chunk(self.head, chunk.x, chunk.gold)
        mixture = None
        with stage("marginal_nll/statistics"):
            if self.smoothing:
                counted = chunk.counted.unsqueeze(1)
                prior = torch.where(counted, self.log_prior[chunk.example], 0.0)
                stats, smooth, share = logits.mixture_statistics(prior)
                mixture = (smooth, share)
            else:
                stats = logits.statistics()
        with stage("marginal_nll/group_pass"):
            weights = self.group.token(self.call, chunk, stats.logp, mixture, self.found)
        if not self.sums.wanted:
            return
        with stage("marginal_nll/gradient"):
            if weights.target is not None and weights.spread is not None:
                draw = logits.mixture_gradient(prior, weights.hit, weights.target, weights.spread)
            else:
                draw = logits.gradient(weights.hit.view(-1))
        with stage("marginal_nll/products"):
            only = len(chunk.position) == self.positions.n_visited
            self.sums.add(draw, chunk.x, chunk.chunk_rows, only=only)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found, shape = self.found, (self.n_examples, self.n_tokens, self.n_passages)
        nll = -found.log_marginal[:-1].view(shape[:2]).sum(1)
        prior = self.log_prior.unsqueeze(2)
        log_post = torch.where(
            self.counted.unsqueeze(1), found.log_post[:-1].view(shape).transpose(1, 2), prior
        )
        tokens = self.counted.sum(1, keepdim=True)
        dscores = tokens * self.log_prior.exp() - found.occupancy[:-1].view(shape).sum(1)
        dscores = dscores * self.example_weight.unsqueeze(1)
        token_logp = found.token_logp[:-1].view(shape).transpose(1, 2)
        return nll, log_post.contiguous(), token_logp.contiguous(), dscores


class _Sequence(_Marginal):
    """nll_b = -log sum_k exp(a_bk + sum_t m_bt l_bkt); a group is one example."""

    mixes = False

    def run(self) -> None:
        # token_logp is stored by row of hidden, so that the sum over t has the same order for each
        # k: passages with equal log-probabilities get the same posterior, bit for bit.
        n_rows = self.n_examples * self.n_passages * self.n_tokens
        self.found = SequenceSums(
            self.log_prior.new_zeros(n_rows + 1),
            self.log_prior.new_zeros(self.n_examples),
            self.log_prior.clone(),
            torch.zeros_like(self.log_prior),
        )
        if not self.positions.n_visited:
            return  # the posterior is the prior
        if not self.statistics_first:
            for part, examples in self._chunks():
                self._resident(part, examples)
            return
        for chunk, stats in self.forward(with_mean=bool(self.smoothing)):
            with stage("marginal_nll/group_pass"):
                self.group.sequence_rows(self.call, chunk, stats, self.found)
        with stage("marginal_nll/group_pass"):
            self.group.sequence_posterior(self.call, slice(0, self.n_examples), self.found)
        if self.sums.wanted:
            chunk = self.positions.everything()
            weight = self.group.sequence_weights(self.call, chunk, self.found)
            self.add_gradients(chunk, weight, self.smoothing)

    def prefers_vocab_slices(self) -> bool:
        per_example = self.positions.per_example
        # If the host does not know where an example ends, all positions are one chunk.
        everything = self.positions.n_visited
        largest = everything if per_example is None else max(per_example, default=0)
        return largest > self.limit or super().prefers_vocab_slices()

    def _chunks(self) -> list[tuple[slice, slice]]:
        """Return slices of positions that contain whole examples, with the slices of examples."""
        if self.positions.per_example is None:
            return [(slice(0, self.positions.n_visited), slice(0, self.n_examples))]
        chunks: list[tuple[slice, slice]] = []
        start = stop = first = 0
        for example, count in enumerate(self.positions.per_example):
            if stop > start and stop + count - start > self.limit:
                chunks.append((slice(start, stop), slice(first, example)))
                start, first = stop, example
            stop += count
        if stop > start:
            chunks.append((slice(start, stop), slice(first, self.n_examples)))
        return chunks

    # A method of its own, so that the logits of a chunk are freed before the next chunk's exist.
    def _resident(self, part: slice, examples: slice) -> None:
        with stage("marginal_nll/gather"):
            chunk = self.positions.gather(part)
        with stage("marginal_nll/logits"):
            logits = self.open_chunk(self.head, chunk.x, chunk.gold)
        with stage("marginal_nll/statistics"):
            stats = logits.statistics(with_mean=bool(self.smoothing))
        with stage("marginal_nll/group_pass"):
            self.group.sequence_rows(self.call, chunk, stats, self.found)
            self.group.sequence_posterior(self.call, examples, self.found)
            weight = self.group.sequence_weights(self.call, chunk, self.found)
        with stage("marginal_nll/gradient"):
            draw = logits.gradient(weight, self.smoothing)
        with stage("marginal_nll/products"):
            only = len(chunk.position) == self.positions.n_visited
            self.sums.add(draw, chunk.x, chunk.chunk_rows, only=only)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (self.n_examples, self.n_passages, self.n_tokens)
        found = self.found
        return found.nll, found.log_post, found.token_logp[:-1].view(shape), found.dscores


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, scores, example_weight, valid_rows, *settings = inputs
    total, nll, log_posterior, *rest = output
    ctx.settings = settings
    ctx.deferred = settings[5]
    ctx.needed = dict(zip(_NEEDS, settings[6:], strict=True))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total if ctx.deferred else nll, log_posterior, *rest)
    # The inputs are saved to reject double backward, and for gradients computed in backward.
    _, *grads = rest
    ctx.save_for_backward(
        hidden, weight, bias, labels, scores, example_weight, valid_rows, nll, log_posterior, *grads
    )


@once_differentiable("marginal_nll")
def _backward(ctx: Any, dtotal: Tensor | None, dnll: Tensor | None, *_: Any) -> Any:
    result: list[Tensor | None] = [None] * _N_INPUTS
    hidden, weight, bias, labels, scores, example_weight, valid_rows, nll, log_posterior, *grads = (
        ctx.saved_tensors
    )
    upstream = dnll if ctx.deferred else dtotal
    if upstream is None:
        return tuple(result)
    for place, needed in ctx.needed.items():
        if ctx.needs_input_grad[place] and not needed:
            raise RuntimeError(f"fastrag::marginal_nll was told not to differentiate input {place}")
    *grads, log_z = grads
    inputs = (hidden, weight, bias, labels, scores)
    found = dict(zip(_NEEDS, grads, strict=True))
    if ctx.deferred and (ctx.needed[1] or ctx.needed[2]):
        made = _head_gradients(ctx, inputs, valid_rows, upstream, nll, log_posterior, log_z)
        for place, grad in zip(_NEEDS, made, strict=False):
            if ctx.needs_input_grad[place]:
                result[place] = grad.to(inputs[place].dtype)
            del found[place]
    for place, grad in found.items():
        if ctx.needs_input_grad[place]:
            # One factor for each example, or one for all.
            scale = upstream.view(-1, *[1] * (grad.dim() - 1)) if ctx.deferred else upstream
            result[place] = scaled(grad, scale, inputs[place].dtype)
    if example_weight is not None and ctx.needs_input_grad[5]:
        result[5] = (nll * upstream).to(example_weight.dtype)
    return tuple(result)


def _head_gradients(
    ctx: Any,
    inputs: tuple[Tensor, ...],
    valid_rows: Tensor | None,
    upstream: Tensor,
    nll: Tensor,
    log_posterior: Tensor,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias for the upstream gradient [B]."""
    hidden, weight, bias, labels, scores = inputs
    marginal, softcap, logit_scale, smoothing, ignore_index, *_ = ctx.settings
    need = [ctx.needed[place] for place in _NEEDS[:3]]
    if not _late(marginal, smoothing, True, *need[1:])[1]:
        again = marginal_nll(*inputs, upstream, valid_rows, *ctx.settings[:5], False, *need, False)
        return again[4], again[5], again[6]
    posterior = log_posterior.exp()  # [B, K, T], or [B, K] for RAG-Sequence
    if posterior.dim() == 2:
        posterior = posterior.unsqueeze(2)
    # The gradient of a NaN loss is NaN.
    scale = torch.where(nll.isnan(), torch.nan, upstream)
    grad = (scale.view(-1, 1, 1) * -posterior).expand(hidden.shape[:3])
    present = scores != -torch.inf
    labels = torch.where(present.any(1, keepdim=True), labels, ignore_index)
    return token_logp_backward(
        grad,
        log_z,
        hidden,
        weight,
        bias,
        labels,
        present,
        valid_rows,
        softcap,
        logit_scale,
        smoothing,
        ignore_index,
        *need,
    )


marginal_nll.register_autograd(_backward, setup_context=_setup_context)


def reduce_examples(
    values: Tensor,
    reduction: str,
    *,
    normalizer: float | Tensor,
    example_weight: Tensor | None = None,
) -> Tensor:
    """Reduce values [B] times example_weight: "none", "sum", or "mean", which is sum / normalizer.

    The normalizer is the number of labels that count and not B, unless the caller gives another.
    """
    weighted = values if example_weight is None else values * example_weight.to(values.dtype)
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total if reduction == "sum" else divide(total, normalizer)


def divide(total: Tensor, normalizer: float | Tensor) -> Tensor:
    """Return total / normalizer; 0 with gradient 0 if the normalizer is 0."""
    if not isinstance(normalizer, Tensor):
        # A float, because torch takes no integer of more than 64 bits.
        return total / float(normalizer) if normalizer > 0 else total * 0.0
    # A copy to a GPU need not wait. In a copy from a GPU the host has to.
    normalizer = normalizer.to(total.device, total.dtype, non_blocking=total.is_cuda).reshape(())
    empty = normalizer == 0
    return torch.where(empty, 0.0, total) / torch.where(empty, 1.0, normalizer)
