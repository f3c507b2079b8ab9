"""RAG-Token and RAG-Sequence negative log-likelihood, with its gradients made in the forward.

    token     nll_b = -sum_t m_bt log sum_k exp(a_bk + l_bkt)
    sequence  nll_b = -log sum_k exp(a_bk + sum_t m_bt l_bkt)
    (a = log_softmax_k(doc_scores), l = token_logp, m = label counts; Lewis et al. 2020, sec. 2.1)

With the posterior w (softmax_k of the same exponents):

    d logits = e_b w m (softmax_v - 1[v = y])        a cross-entropy with one weight per row
    d doc_scores_bk = e_b (p_bk sum_t m_bt - sum_t m_bt w_bkt)     token      (p = exp a)
                      e_b (p_bk - w_bk)                            sequence

**Group-resident chunks.** All rows of one group lie in one chunk: the K rows of a position (token)
or the K*T rows of an example (sequence). So w is known while the chunk's logits are alive, and
the gradients of sum_b e_b nll_b (e = example_weight) cost three GEMMs; nothing of size
[B, K, T, V] ever exists. A Sequence example larger than the workspace is cut: a statistics pass
over its pieces, then a gradient pass that recomputes their logits.

**Late scale.** Gradients are saved without upstream gradient and normalizer, and multiplied by them
in backward, out of place. A vector upstream gradient (reduction "none", `deferred=True`) is an
example weight: backward runs the op once more with example_weight = upstream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrag.ops import backends, workspace
from fastrag.ops.chunk_logits import ChunkLogits, RowStats, chunk_logits
from fastrag.ops.grads import graph_is_freed, once_differentiable
from fastrag.ops.group_pass import Call, GroupPass, SequenceSums, TokenSums, group_pass
from fastrag.ops.linear_head import HeadGradients, LinearHead
from fastrag.ops.positions import (
    Chunk,
    Positions,
    check_labels,
    check_scores,
    check_valid_rows,
)
from fastrag.ops.token_logp import fake_head_gradients

backends.register("marginal_nll", ("cpp", "triton", "torch"))

# One Triton program holds what all the passages of a group say, or, for smoothing, a few words.
TRITON_MAX_PASSAGES = 1024
TRITON_MAX_MIXED = 256

_N_INPUTS = 17
_NEEDS = (0, 1, 2, 4)  # hidden, weight, bias, doc_scores: inputs that backward can reach


@torch.library.custom_op(
    "fastrag::marginal_nll",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor doc_scores, "
    "Tensor? example_weight, Tensor? valid_rows, str marginal, float? softcap, "
    "float logit_scale, float label_smoothing, int ignore_index, bool deferred, bool need_dx, "
    "bool need_dw, bool need_db, bool need_ds) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    """Returns (total, nll, log_posterior, token_logp, dhidden, dweight, dbias, ddoc_scores).

    total [] = sum_b example_weight_b nll_b and nll [B] are the loss; the first is differentiable
    unless `deferred`, the second if `deferred`. The gradients are those of total; what is not
    needed comes back empty, and all of them if `deferred`. token_logp [B, K, T] is what the
    marginal was made of, without gradient, and 0 where the label does not count.
    """
    unfit = {}
    n_passages = hidden.shape[1]
    limit = TRITON_MAX_MIXED if marginal == "token" and label_smoothing else TRITON_MAX_PASSAGES
    if n_passages > limit:
        unfit["triton"] = f"its kernels take K of at most {limit} here, got {n_passages}"
    backend = backends.choose("marginal_nll", hidden.device, hidden.dtype, unfit)
    open_chunk = chunk_logits(backend)
    if deferred:
        need_dx = need_dw = need_db = need_ds = False
    with workspace.without_autocast(hidden.device):
        dtype = workspace.accumulate_dtype(hidden.dtype)
        operand = open_chunk.operand_dtype(hidden.dtype)
        head = LinearHead(weight, bias, softcap, logit_scale, dtype, operand)
        sums = HeadGradients(head, hidden, need_dx=need_dx, need_dw=need_dw, need_db=need_db)
        kind = _Token if marginal == "token" else _Sequence
        run = kind(
            open_chunk,
            group_pass(backend),
            head,
            sums,
            hidden,
            labels,
            doc_scores,
            example_weight,
            valid_rows,
            label_smoothing,
            ignore_index,
        )
        run.run()
        nll, log_posterior, token_logp, ddoc_scores = run.results()
        if run.unlisted is not None:
            nll = nll.masked_fill(run.unlisted, torch.nan)
        weighted = nll if example_weight is None else nll * run.example_weight
        dscores = ddoc_scores if need_ds else ddoc_scores.new_empty(0)
        return (weighted.sum(), nll, log_posterior, token_logp, *sums.results(), dscores)


@marginal_nll.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    marginal, (deferred, *need) = rest[5], rest[10:]
    if deferred:
        need = [False] * 4
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
    )


class _Marginal:
    """One call: the prior, the masks and the walk over groups of chunks."""

    def __init__(
        self,
        open_chunk: type[ChunkLogits],
        group: type[GroupPass],
        head: LinearHead,
        sums: HeadGradients,
        hidden: Tensor,
        labels: Tensor,
        doc_scores: Tensor,
        example_weight: Tensor | None,
        valid_rows: Tensor | None,
        smoothing: float,
        ignore_index: int,
    ) -> None:
        self.open_chunk, self.group, self.head, self.sums = open_chunk, group, head, sums
        self.smoothing = smoothing
        self.n_examples, self.n_passages, self.n_tokens, _ = hidden.shape
        scores = doc_scores.to(head.dtype)
        check_scores(scores)
        present = scores != -torch.inf
        self.live = present.any(1)  # [B]: an example without passages has no likelihood
        self.log_prior = torch.where(present, scores.log_softmax(1), -torch.inf)
        counted = labels != ignore_index
        self.unlisted = None if valid_rows is None else check_valid_rows(valid_rows, counted)
        bad = check_labels(labels, counted, head.vocab_size)
        labels = torch.where(bad, 0, labels)
        counted = counted & self.live.unsqueeze(1)
        self.counted = counted
        self.example_weight = (
            torch.ones_like(scores[:, 0])
            if example_weight is None
            else example_weight.to(head.dtype)
        )
        if self.unlisted is not None:
            # Gradients of which a part is missing must not look like gradients.
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
        self.forward_only = not sums and not smoothing
        row_bytes = (
            open_chunk.token_logp_bytes(head, self.n_passages)
            if self.forward_only
            else open_chunk.row_bytes(head, self.n_passages, mixture=self.needs_mixture())
        )
        self.limit = workspace.rows_per_chunk(self.n_passages * row_bytes, hidden.device)

    def needs_mixture(self) -> bool:
        """Whether the marginal distribution is wanted at every word, and not at the label only."""
        return False

    def dense(self, *shape: int) -> Tensor:
        """Zeros with one entry for each position and one that the padding of valid_rows hits."""
        n = self.n_examples * self.n_tokens + 1
        return self.log_prior.new_zeros(n, *shape)

    def undense(self, values: Tensor) -> Tensor:
        """[B*T + 1, ...] -> [B, T, ...]."""
        return values[:-1].view(self.n_examples, self.n_tokens, *values.shape[1:])


class _Token(_Marginal):
    """nll_b = -sum_t m_bt log sum_k exp(a_bk + l_bkt); a group is one position."""

    def needs_mixture(self) -> bool:
        return bool(self.smoothing)

    def run(self) -> None:
        by_passage = [self.dense(self.n_passages) for _ in range(3)]
        self.found = TokenSums(self.dense(), *by_passage)
        for part in workspace.even_slices(len(self.positions), self.limit):
            self._chunk(self.positions.gather(part))

    # A chunk's logits are local to one call, so that they are gone before the next chunk's exist.

    def _chunk(self, chunk: Chunk) -> None:
        """Smoothed on the marginal distribution, if at all.

        With G_kv = (1 - s) w_k 1[v = y] + (s / V) r_kv, whose sum over v is `target`, the gradient
        of the logits is upstream * (target_k p_kv - G_kv).
        """
        if self.forward_only:
            logp = self.open_chunk.token_logp(self.head, chunk.x, chunk.gold)
            self.group.token(self.call, chunk, logp, None, self.found)
            return
        logits = self.open_chunk(self.head, chunk.x, chunk.gold)
        if not self.smoothing:
            weights = self.group.token(self.call, chunk, logits.statistics().logp, None, self.found)
            if self.sums:
                self.sums.add(logits.gradient(weights.hit.view(-1)), chunk.x, chunk.row)
            return
        prior = torch.where(chunk.counts.unsqueeze(1), self.log_prior[chunk.example], 0.0)
        stats, smooth, share = logits.mixture_statistics(prior)
        weights = self.group.token(self.call, chunk, stats.logp, (smooth, share), self.found)
        if self.sums and weights.target is not None and weights.spread is not None:
            draw = logits.mixture_gradient(prior, weights.hit, weights.target, weights.spread)
            self.sums.add(draw, chunk.x, chunk.row)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nll = -self.undense(self.found.log_marginal).sum(1)
        prior = self.log_prior.unsqueeze(2)
        log_post = torch.where(
            self.counted.unsqueeze(1), self.undense(self.found.log_post).transpose(1, 2), prior
        )
        tokens = self.counted.sum(1, keepdim=True)
        dscores = tokens * self.log_prior.exp() - self.undense(self.found.occupancy).sum(1)
        dscores = dscores * self.example_weight.unsqueeze(1)
        token_logp = self.undense(self.found.token_logp).transpose(1, 2)
        return nll, log_post.contiguous(), token_logp.contiguous(), dscores


class _Sequence(_Marginal):
    """nll_b = -log sum_k exp(a_bk + sum_t m_bt l_bkt); a group is one example."""

    def run(self) -> None:
        # By row, so that the sum over t runs the same way for each k: passages that say the same
        # get the same posterior, to the bit.
        n_rows = self.n_examples * self.n_passages * self.n_tokens
        self.found = SequenceSums(
            self.log_prior.new_zeros(n_rows + 1),
            self.log_prior.new_zeros(self.n_examples),
            self.log_prior.clone(),
            torch.zeros_like(self.log_prior),
        )
        for pieces, examples in self._groups():
            if len(pieces) == 1 and self.sums:
                self._resident(pieces[0], examples)
                continue
            for part in pieces:
                self._statistics(part)
            self.group.sequence_posterior(self.call, examples, self.found)
            if self.sums:
                for part in pieces:
                    self._recompute(part)

    def _groups(self) -> list[tuple[list[slice], slice]]:
        """Slices of positions, and the examples that they complete.

        Whole examples are packed into chunks; one that does not fit is a list of pieces.
        """
        if self.positions.per_example is None:  # only the device knows where an example ends
            pieces = workspace.even_slices(len(self.positions), self.limit)
            return [(pieces, slice(0, self.n_examples))] if pieces else []
        groups: list[tuple[list[slice], slice]] = []
        start = stop = first = 0
        for example, count in enumerate(self.positions.per_example):
            if stop > start and stop + count - start > self.limit:
                groups.append(([slice(start, stop)], slice(first, example)))
                start, first = stop, example
            stop += count
            if stop - start > self.limit:
                parts = workspace.even_slices(stop - start, self.limit)
                pieces = [slice(start + p.start, start + p.stop) for p in parts]
                groups.append((pieces, slice(first, example + 1)))
                start, first = stop, example + 1
        if stop > start:
            groups.append(([slice(start, stop)], slice(first, self.n_examples)))
        return groups

    # A chunk's logits are local to one call, so that they are gone before the next chunk's exist.

    def _resident(self, part: slice, examples: slice) -> None:
        chunk = self.positions.gather(part)
        logits = self.open_chunk(self.head, chunk.x, chunk.gold)
        stats = logits.statistics(with_mean=bool(self.smoothing))
        self.group.sequence_rows(self.call, chunk, stats, self.found)
        self.group.sequence_posterior(self.call, examples, self.found)
        self._gradients(chunk, logits)

    def _statistics(self, part: slice) -> None:
        chunk = self.positions.gather(part)
        if self.smoothing:
            logits = self.open_chunk(self.head, chunk.x, chunk.gold)
            stats = logits.statistics(with_mean=True)
        else:
            stats = RowStats(self.open_chunk.token_logp(self.head, chunk.x, chunk.gold), None)
        self.group.sequence_rows(self.call, chunk, stats, self.found)

    def _recompute(self, part: slice) -> None:
        chunk = self.positions.gather(part)
        logits = self.open_chunk(self.head, chunk.x, chunk.gold)
        logits.statistics()
        self._gradients(chunk, logits)

    def _gradients(self, chunk: Chunk, logits: ChunkLogits) -> None:
        row_weight = self.group.sequence_weights(self.call, chunk, self.found)
        self.sums.add(logits.gradient(row_weight, self.smoothing), chunk.x, chunk.row)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (self.n_examples, self.n_passages, self.n_tokens)
        found = self.found
        return found.nll, found.log_post, found.token_logp[:-1].view(shape), found.dscores


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, scores, example_weight, valid_rows, *settings = inputs
    total, nll, log_posterior, token_logp, *grads = output
    ctx.settings = settings
    ctx.deferred = settings[5]
    ctx.needed = dict(zip(_NEEDS, settings[6:], strict=True))
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total if ctx.deferred else nll, log_posterior, token_logp, *grads)
    # The inputs are kept so that double backward can be refused, and for the deferred pass.
    ctx.save_for_backward(
        hidden, weight, bias, labels, scores, example_weight, valid_rows, nll, *grads
    )


@once_differentiable("marginal_nll")
def _backward(ctx: Any, dtotal: Tensor | None, dnll: Tensor | None, *_: Any) -> Any:
    result: list[Tensor | None] = [None] * _N_INPUTS
    hidden, weight, bias, labels, scores, example_weight, valid_rows, nll, *grads = (
        ctx.saved_tensors
    )
    upstream = dnll if ctx.deferred else dtotal
    if upstream is None:
        return tuple(result)
    for place, needed in ctx.needed.items():
        if ctx.needs_input_grad[place] and not needed:
            raise RuntimeError(f"fastrag::marginal_nll was told not to differentiate input {place}")
    if ctx.deferred:
        *_, dhidden, dweight, dbias, dscores = marginal_nll(
            hidden,
            weight,
            bias,
            labels,
            scores,
            upstream,
            valid_rows,
            *ctx.settings[:5],
            False,
            *ctx.needed.values(),
        )
        scale = None
    else:
        (dhidden, dweight, dbias, dscores), scale = grads, upstream
        if example_weight is not None and ctx.needs_input_grad[5]:
            result[5] = (nll * scale).to(example_weight.dtype)
    inputs = {0: hidden, 1: weight, 2: bias, 4: scores}
    found = {0: dhidden, 1: dweight, 2: dbias, 4: dscores}
    for place, grad in found.items():
        if ctx.needs_input_grad[place]:
            result[place] = _scaled(grad, scale, inputs[place].dtype)
    return tuple(result)


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * scale in `dtype`: the product in the dtype of grad, rounded once, in one pass.

    In place where the graph is freed behind this backward, so that nobody needs grad again: a copy
    of dW would cost more than the passes over the logits.
    """
    if scale is None:
        return grad.to(dtype)
    if grad.dtype == dtype and graph_is_freed(grad):
        return grad.mul_(scale)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))


marginal_nll.register_autograd(_backward, setup_context=_setup_context)
