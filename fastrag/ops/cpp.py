"""The backend for CPUs: kernels of `fastrag._C`, which read and write torch's memory in place.

CppChunkLogits    logits of one chunk: torch's GEMMs with C++ passes between them
doc_scores_fwd    scores of given rows and their log-softmax; doc_scores_bwd
mips_topk         exact maximum inner product search
head_products     logits of a few states, and the logarithms of their sums over the vocabulary
mixture_logp      the marginal distribution of the next token
CodedIndex        the same search, through int8 codes of float32 rows
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from fastrag import _C
from fastrag.ops import workspace
from fastrag.ops.backends import forced_isa
from fastrag.ops.chunks import ChunkLogits, LinearHead, RowStats
from fastrag.profiling import stage


class CppChunkLogits(ChunkLogits):
    """Logits on the CPU, in the buffer that the thread keeps between chunks.

    The buffer is [V, n] = W X^T, the orientation in which the GEMM is fastest and which the two
    GEMMs that follow can read. It holds x W^T until the gradient overwrites it: each pass applies
    bias, logit_scale and softcap itself, so no second buffer is needed. csrc/loss/row_pass.h has
    the equations.

    The buffer is float32, and operands are converted, unless hidden states are bfloat16 and the
    processor multiplies it (`workspace.multiplies`). Then the buffer is bfloat16, the only result
    that torch's products of bfloat16 have on a CPU. Statistics are float32 in either case.

        statistics            reads the buffer once
        mixture_statistics    reads it twice
        gradients             read and write it once
    """

    def __init__(self, head: LinearHead, x: Tensor, gold: Tensor) -> None:
        self.head, self.x, self.gold = head, x, gold
        shape = (head.n_ids, x.shape[0])
        numel, dtype = shape[0] * shape[1], head.operand_dtype
        self._buffer = workspace.take(-(-numel * dtype.itemsize // torch.float32.itemsize))
        self._z0 = self._buffer.view(dtype)[:numel].view(shape)
        for part, weight in head.weight_slices():
            torch.mm(weight, x.t(), out=self._z0[part])
        self._pass = _C.RowPass(
            (self._z0.view(torch.uint16) if dtype == torch.bfloat16 else self._z0).numpy(),
            gold.contiguous().numpy(),
            bias=None if head.bias is None else _array(head.bias),
            logit_scale=head.logit_scale,
            softcap=head.softcap or 0.0,
            threads=torch.get_num_threads(),
            isa=forced_isa(),
        )

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)  # None if __init__ raised early
        if buffer is not None:
            workspace.give_back(buffer)

    @staticmethod
    def operand_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype if workspace.multiplies(dtype) else torch.float32

    @staticmethod
    def row_bytes(head: LinearHead, n_passages: int, *, mixture: bool) -> float:
        return head.n_ids * head.operand_dtype.itemsize

    def statistics(self, *, with_mean: bool = False) -> RowStats:
        logp = self.x.new_empty(len(self.x), dtype=torch.float32)
        log_z = logp.new_empty(2, len(logp))
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

    Passages [B, K, D] are passed as rows b * K + k of a matrix [B * K, D]. Tensors are passed as
    DLPack capsules, because making numpy arrays would take most of the time of a small call.
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
    """Return the gradients of query_emb and of passage_emb [B, K, D]; None if not needed."""
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
    """Return the arguments that doc_scores and doc_scores_backward of fastrag._C share."""
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
    # The kernels read an index in place and handle its strides, so it need not be contiguous.
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
    if stored.dtype == torch.bfloat16:  # numpy has no bfloat16: pass the bits
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


def head_products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """hidden [n, H], weight [V, H], both float32 -> x W^T [n, V], log_z [n]."""
    z0 = torch.empty(len(hidden), len(weight), dtype=torch.float32)
    return z0, _products_into(z0, hidden, weight, _head(bias, softcap, logit_scale))


def mixture_logp(
    hidden: Tensor,
    weight: Tensor,
    log_prior: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """hidden [n, K, H], weight [V, H], log_prior [n, K] -> log p(v) [n, V], log_z [n, K]."""
    head = _head(bias, softcap, logit_scale)
    shape, n_ids = hidden.shape[:2], len(weight)
    buffer = workspace.take(shape.numel() * n_ids)
    try:
        z0 = buffer[: shape.numel() * n_ids].view(-1, n_ids)
        log_z = _products_into(z0, hidden.flatten(0, 1), weight, head)
        mixture = torch.empty(shape[0], n_ids, dtype=torch.float32)
        prior = log_prior.to(torch.float32)
        _C.mixture_logp(z0.numpy(), log_z.numpy(), _array(prior), mixture.numpy(), **head)
    finally:
        workspace.give_back(buffer)
    return mixture, log_z.view(shape)


def _products_into(z0: Tensor, hidden: Tensor, weight: Tensor, head: dict[str, Any]) -> Tensor:
    """Write hidden W^T to z0 and return log_z."""
    log_z = torch.empty(len(hidden), dtype=torch.float32)
    values = np.from_dlpack(weight.detach())  # by rows that need not be next to each other
    _C.head_products(_array(hidden), values, z0.numpy(), log_z.numpy(), **head)
    return log_z


def _head(bias: Tensor | None, softcap: float | None, logit_scale: float) -> dict[str, Any]:
    """Return the keyword arguments that head_products and mixture_logp of fastrag._C share."""
    return {
        "bias": None if bias is None else _array(bias),
        "logit_scale": logit_scale,
        "softcap": softcap or 0.0,
        "threads": torch.get_num_threads(),
        "isa": forced_isa(),
    }


# The tensors of a `CodedIndex` that bound scores by few coordinates.
LEADING = ("rotation", "lead_constants", "lead_codes", "lead_norm", "tail_norm", "lead_sum")


class CodedIndex:
    """Exact search of float32 rows that reads their int8 codes first and only few of the rows.

        score[b,n] is in  q_b . offset + t_b (digits_b . codes_n)  +-  a bound for b and n

    Only rows that can be among the k best by these bounds are read. They are scored as in
    `mips_topk`, so the results have the same bits. With few queries, a search reads a quarter of
    the bytes; with many, its arithmetic is that of integers.

    Args:
        index_emb: `[N, D]` float32, read in place.
        codes: `[N, D]` int8 with offset + scale * code ~ index_emb; the closer, the fewer rows are
            read.
        scale: `[D]` float32.
        offset: `[D]` float32; the mean of the rows gives closer codes than zero.
        more: `rotation` and `lead_constants` of `fastrag.index.rotation.fit`, with which most rows
            are dropped by codes of few coordinates; and the codes, norms and sums of each row that
            an earlier object of the same rows has in `tensors`, computed if they are not given.

    Raises:
        ValueError: shapes or dtypes disagree, or a row is not finite.
    """

    def __init__(
        self, index_emb: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, **more: Tensor
    ) -> None:
        self.tensors = {
            "index_emb": index_emb.detach(),
            "codes": codes,
            "scale": scale,
            "offset": offset,
            **more,
        }
        if "code_norm" not in more:
            self.tensors |= _measured(self.tensors)
        if "rotation" in more and "lead_codes" not in more:
            self.tensors |= _lead_codes(self.tensors)

    def arrays(self) -> dict[str, Any]:
        """Return the array arguments of a search, as views of the current tensors."""
        return {name: x.numpy() for name, x in self.tensors.items()}

    def update(self, rows: Tensor) -> None:
        """Measure rows `[n]` again after a change of index_emb and codes; no search may run."""
        part = self.tensors | {name: self.tensors[name][rows] for name in ("index_emb", "codes")}
        found = _measured(part) | (_lead_codes(part) if "rotation" in part else {})
        for name, values in found.items():
            self.tensors[name][rows] = values

    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None, *, leads: bool = True
    ) -> tuple[Tensor, Tensor]:
        """query_emb [B, D] float32 -> scores [B, k], rows [B, k].

        With `leads`, codes of the leading coordinates are read first, if there are any.
        """
        scores, rows, _ = self._search(query_emb, k, exclude, leads)
        return scores, rows

    def n_rows_read(self, query_emb: Tensor, k: int) -> int:
        """Return how many rows of index_emb a search reads, summed over the queries."""
        return self._search(query_emb, k, None)[2][0]

    def n_codes_read(self, query_emb: Tensor, k: int) -> int:
        """Return how many rows of codes a search reads, summed over the queries.

        Without a rotation this is N for each query. With one, codes of the leading coordinates of
        all rows are read as well, which do not count.
        """
        return self._search(query_emb, k, None)[2][1]

    def _search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None, leads: bool = True
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        arrays = self.arrays()
        if not leads:
            arrays = {name: x for name, x in arrays.items() if name not in LEADING}
        shape = (query_emb.shape[0], k)
        scores = torch.empty(shape, dtype=torch.float32)
        rows = torch.empty(shape, dtype=torch.int64)
        with stage("mips_topk/by_codes"):
            n_read = _C.mips_topk_by_codes(
                query_emb.detach().contiguous().numpy(),
                scores=scores.numpy(),
                rows=rows.numpy(),
                **arrays,
                **_excluding(exclude),
                threads=torch.get_num_threads(),
                isa=forced_isa(),
            )
        return scores, rows, n_read


def _measured(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return norms and sums of each row for the bounds of a search through codes."""
    n = len(tensors["index_emb"])
    found = {
        "code_norm": torch.empty(n, dtype=torch.float32),
        "rest_norm": torch.empty(n, dtype=torch.float32),
        "code_sum": torch.empty(n, dtype=torch.int32),
    }
    given = {name: tensors[name] for name in ("index_emb", "codes", "scale", "offset")}
    arrays = {name: x.numpy() for name, x in (given | found).items()}
    _C.measure_codes(**arrays, threads=torch.get_num_threads())
    return found


def _lead_codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return codes of the leading coordinates of each row, with their norms and sums."""
    n, n_lead = len(tensors["index_emb"]), tensors["rotation"].shape[0]
    found = {
        "lead_codes": torch.empty(n, n_lead, dtype=torch.int8),
        "lead_norm": torch.empty(n, dtype=torch.float32),
        "tail_norm": torch.empty(n, dtype=torch.float32),
        "lead_sum": torch.empty(n, dtype=torch.int32),
    }
    given = {name: tensors[name] for name in ("index_emb", "offset", "rotation", "lead_constants")}
    arrays = {name: x.numpy() for name, x in (given | found).items()}
    _C.make_lead_codes(**arrays, threads=torch.get_num_threads())
    return found


def _excluding(exclude: Tensor | None) -> dict[str, Any]:
    """Return `exclude`, a mask [N] or rows [B, E], as the keyword argument of fastrag._C."""
    if exclude is None:
        return {}
    name = "removed" if exclude.dtype == torch.bool else "exclude"
    return {name: exclude.contiguous().numpy()}


def _array(x: Tensor) -> Any:
    """Return values to read, as float32.

    `Tensor.numpy` would fix the size of the storage for good, also that of a parameter, which
    `fully_shard` has to free.
    """
    return np.from_dlpack(x.detach().to(torch.float32).contiguous())


def _capsules(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else to_dlpack(x.contiguous()) for x in tensors]
