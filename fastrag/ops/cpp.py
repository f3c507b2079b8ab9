"""The backend of a CPU: C++ of `fastrag._C` on the memory of the tensors, nothing copied.

CppChunkLogits    logits of one chunk: GEMMs of torch, and passes in C++ between them
doc_scores_fwd    scores of given rows and their log-softmax; doc_scores_bwd
mips_topk         exact maximum inner product search
CodedIndex        the same search, through int8 codes of float32 rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from fastrag import _C
from fastrag.ops import workspace
from fastrag.ops.backends import forced_isa
from fastrag.ops.chunks import ChunkLogits, LinearHead, RowStats
from fastrag.profiling import stage


class CppChunkLogits(ChunkLogits):
    """float32 on the CPU, in the buffer that the thread keeps between chunks.

    The buffer is [V, n] = W X^T, the orientation in which the GEMM is fastest; the two GEMMs that
    follow read it as it is. It holds x W^T throughout: each pass recomputes bias, logit_scale and
    softcap, so the gradient needs no second buffer. csrc/loss/row_pass.h has the equations.

        statistics   one read of the buffer          gradient   one read and write of it
        (the statistics of a mixture: one more read)
    """

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        self.head, self.x, self.gold = head, x, gold
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
            isa=forced_isa(),
        )

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)  # None if __init__ raised before it was taken
        if buffer is not None:
            workspace.give_back(buffer)

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        return head.n_words * head.dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        logp, log_z = self.x.new_empty(len(self.x)), self.x.new_empty(2, len(self.x))
        mean = torch.empty_like(logp) if with_mean else None
        self._log_z = log_z.numpy()
        self._pass.statistics(logp.numpy(), self._log_z, None if mean is None else mean.numpy())
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


def doc_scores_fwd(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D]; passage_emb [B, K, D], or [N, D] with rows -> s, log_prior, float32.

    Fresh passages are rows b * K + k of a matrix [B * K, D]. Arrays go as DLPack capsules: most of
    the time of a small call would be the making of numpy arrays.
    """
    shape = passage_emb.shape[:2] if rows is None else rows.shape
    scores = torch.empty(shape, dtype=torch.float32, device="cpu")
    log_prior = torch.empty_like(scores)
    _C.doc_scores(
        *_scored(query_emb, passage_emb, rows, tau, scale, offset),
        to_dlpack(scores),
        to_dlpack(log_prior),
    )
    return scores, log_prior


def doc_scores_bwd(
    dscores: Tensor | None,
    dlog_prior: Tensor | None,
    log_prior: Tensor,
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    need_dq: bool,
    need_dp: bool,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of query_emb and of fresh passage_emb; None where not needed."""
    dquery = dpassage = None
    if need_dq:
        dquery = torch.empty(query_emb.shape, dtype=torch.float32, device="cpu")
    if need_dp:
        dpassage = torch.empty(passage_emb.shape, dtype=torch.float32, device="cpu")
    _C.doc_scores_backward(
        *_scored(query_emb, passage_emb, rows, tau, scale, offset),
        *_capsules(
            log_prior,
            None if dscores is None else dscores.to(torch.float32),
            None if dlog_prior is None else dlog_prior.to(torch.float32),
            dquery,
            dpassage,
        ),
    )
    return (
        None if dquery is None else dquery.to(query_emb.dtype),
        None if dpassage is None else dpassage.to(passage_emb.dtype),
    )


def _scored(
    query_emb: Tensor,
    passage_emb: Tensor,
    rows: Tensor | None,
    tau: float,
    scale: Tensor | None,
    offset: Tensor | None,
) -> tuple[Any, Any, Any, float, Any, Any, int, str]:
    """Return the arguments that forward and backward of the scores share."""
    index_emb = passage_emb
    if passage_emb.dim() == 3:
        shape = passage_emb.shape[:2]
        place = torch.arange(shape.numel(), device="cpu").view(shape)
        rows = place if rows is None else place.masked_fill(rows < 0, -1)
        index_emb = passage_emb.contiguous().view(shape.numel(), passage_emb.shape[2])
    if scale is not None and offset is None:
        offset = torch.zeros_like(scale)
    given = (query_emb.to(torch.float32), rows, scale, offset)
    query, rows_at, scale_of, offset_of = _capsules(*given)
    # Not made contiguous: the kernels read an index in place, whatever its strides.
    index = to_dlpack(index_emb)
    threads = torch.get_num_threads()
    return query, index, rows_at, tau, scale_of, offset_of, threads, forced_isa()


def mips_topk(
    query_emb: Tensor,
    index_emb: Tensor,
    k: int,
    exclude: Tensor | None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_emb [B, D] float32, index_emb [N, D] not float64 -> scores [B, k], rows [B, k]."""
    stored = index_emb.detach()
    if stored.dtype == torch.bfloat16:  # which numpy does not know: its bits
        stored = stored.view(torch.uint16)
    factors = {}
    if scale is not None:
        factors["scale"] = _array(scale)
        factors["offset"] = _array(torch.zeros_like(scale) if offset is None else offset)
    shape = (query_emb.shape[0], k)
    scores, rows = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.int64)
    with stage("mips_topk/scan"):
        _C.mips_topk(
            query_emb.detach().contiguous().numpy(),
            stored.numpy(),
            scores=scores.numpy(),
            rows=rows.numpy(),
            **factors,
            **_excluding(exclude),
            threads=torch.get_num_threads(),
            isa=forced_isa(),
        )
    return scores, rows


class CodedIndex:
    """float32 rows with int8 codes of them: the answers of the rows, mostly at the cost of codes.

        score[b,n] is in  q_b . offset + t_b (digits_b . codes_n)  +-  a bound of the pair

    Rows that the bounds leave are scored as `mips_topk` scores them, so the answer has its bits. A
    search of few queries reads a quarter of the bytes; one of many multiplies whole numbers.

    Args:
        index_emb: `[N, D]` float32, read in place.
        codes: `[N, D]` int8, of offset + scale * code ~ index_emb; better codes leave fewer rows.
        scale: `[D]` float32.
        offset: `[D]` float32; the mean of the rows makes better codes than zero.

    Raises:
        ValueError: shapes or dtypes disagree, or a row is not finite.
    """

    def __init__(self, index_emb: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> None:
        self._parts = {
            "index_emb": index_emb.detach(),
            "codes": codes,
            "scale": scale,
            "offset": offset,
            **_measured(index_emb.detach(), codes, scale, offset),
        }

    def arrays(self) -> dict[str, Any]:
        """Return the arguments of a search besides queries; a copy has arrays of its own memory."""
        return {name: x.numpy() for name, x in self._parts.items()}

    def update(self, rows: Tensor) -> None:
        """Measure rows `[n]` again whose numbers and codes have changed; no search may run."""
        part = {name: self._parts[name][rows] for name in ("index_emb", "codes")}
        found = _measured(**part, scale=self._parts["scale"], offset=self._parts["offset"])
        for name, values in found.items():
            self._parts[name][rows] = values

    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query_emb [B, D] float32 -> scores [B, k], rows [B, k]."""
        scores, rows, _ = self._search(query_emb, k, exclude)
        return scores, rows

    def n_rows_read(self, query_emb: Tensor, k: int) -> int:
        """Return how many rows of index_emb a search reads, over all queries."""
        return self._search(query_emb, k, None)[2]

    def _search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        shape = (query_emb.shape[0], k)
        scores = torch.empty(shape, dtype=torch.float32)
        rows = torch.empty(shape, dtype=torch.int64)
        with stage("mips_topk/by_codes"):
            n_read = _C.mips_topk_by_codes(
                query_emb.detach().contiguous().numpy(),
                scores=scores.numpy(),
                rows=rows.numpy(),
                **self.arrays(),
                **_excluding(exclude),
                threads=torch.get_num_threads(),
                isa=forced_isa(),
            )
        return scores, rows, n_read


def _measured(index_emb: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Return what a search through codes needs to know of each row."""
    n = len(index_emb)
    found = {
        "code_norm": torch.empty(n, dtype=torch.float32),
        "rest_norm": torch.empty(n, dtype=torch.float32),
        "code_sum": torch.empty(n, dtype=torch.int32),
    }
    parts = {"index_emb": index_emb, "codes": codes, "scale": scale, "offset": offset, **found}
    arrays = {name: x.numpy() for name, x in parts.items()}
    _C.measure_codes(**arrays, threads=torch.get_num_threads())
    return found


def _excluding(exclude: Tensor | None) -> dict[str, Any]:
    """Return the argument for `exclude`, which is a mask [N] or rows [B, E]."""
    if exclude is None:
        return {}
    name = "removed" if exclude.dtype == torch.bool else "exclude"
    return {name: exclude.contiguous().numpy()}


def _array(x: Tensor) -> Any:
    return x.detach().to(torch.float32).contiguous().numpy()


def _capsules(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else to_dlpack(x.contiguous()) for x in tensors]
