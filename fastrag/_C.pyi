"""Compiled parts of fastrag, from csrc/. Arrays are float32 (labels, rows: int64) and checked."""

from typing import Any

# Anything with the buffer protocol; in practice tensor.numpy(), which copies nothing.
_Array = Any

SOURCES: str  # the hash of csrc/ that fastrag.ops.sources makes

class RowPass:
    """The passes over one buffer z0 [V, n] = W X^T; csrc/loss/row_pass.h defines each one."""

    def __init__(
        self,
        z0: _Array,
        gold: _Array,
        *,
        bias: _Array | None = None,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        threads: int = 1,
        isa: str = "",
    ) -> None: ...
    def statistics(self, logp: _Array, log_z: _Array, mean_logp: _Array | None = None) -> None: ...
    def gradient(
        self,
        log_z: _Array,
        weight: _Array,
        smoothing: float = 0.0,
        vocab_size: int | None = None,
    ) -> None: ...
    def mixture_statistics(
        self, log_z: _Array, log_prior: _Array, mean_mixture: _Array, mean_share: _Array
    ) -> None: ...
    def mixture_gradient(
        self, log_z: _Array, log_prior: _Array, hit: _Array, target: _Array, spread: _Array
    ) -> None: ...

def instruction_sets(*, emulated: bool = False) -> list[str]:
    """Those that run here, the best one first; emulated: also the one for tests."""

def missing_instruction_sets() -> dict[str, str]:
    """Why this machine or this build cannot run the others of this kind of processor."""

def apply(name: str, x: _Array, y: _Array, isa: str = "") -> None: ...
def advise_huge_pages(buffer: _Array) -> None: ...
def mips_topk(
    query_emb: _Array,
    index_emb: _Array,
    scores: _Array,
    rows: _Array,
    *,
    removed: _Array | None = None,
    exclude: _Array | None = None,
    scale: _Array | None = None,
    offset: _Array | None = None,
    threads: int = 1,
    isa: str = "",
) -> None:
    """The k best rows of each query, k being the width of scores and rows; csrc/mips/mips.h.

    index_emb: float32, float16, bfloat16 as uint16, or int8 with its scale and offset [D].
    """

def widen(
    index_emb: _Array,
    out: _Array,
    *,
    scale: _Array | None = None,
    offset: _Array | None = None,
    threads: int = 1,
    isa: str = "",
) -> None:
    """The float32 numbers that a stored matrix is searched as."""

def measure_codes(
    index_emb: _Array,
    codes: _Array,
    scale: _Array,
    offset: _Array,
    code_norm: _Array,
    rest_norm: _Array,
    code_sum: _Array,
    *,
    threads: int = 1,
) -> None:
    """What mips_topk_by_codes has to know of the rows, [N] each; code_sum is int32."""

def make_lead_codes(
    index_emb: _Array,
    offset: _Array,
    rotation: _Array,
    lead_codes: _Array,
    lead_norm: _Array,
    tail_norm: _Array,
    lead_sum: _Array,
    lead_constants: _Array,
    *,
    threads: int = 1,
) -> None:
    """Write int8 codes of the coordinates of rows along directions, and bounds of their errors.

    rotation [n_lead, D] has the directions. lead_constants are the step of the codes, the share of
    a usual rest in the norm of the codes, and a bound of |rotation rotation^T - 1|.
    """

def mips_topk_by_codes(
    query_emb: _Array,
    index_emb: _Array,
    codes: _Array,
    scale: _Array,
    offset: _Array,
    code_norm: _Array,
    rest_norm: _Array,
    code_sum: _Array,
    scores: _Array,
    rows: _Array,
    *,
    rotation: _Array | None = None,
    lead_codes: _Array | None = None,
    lead_norm: _Array | None = None,
    tail_norm: _Array | None = None,
    lead_sum: _Array | None = None,
    lead_constants: _Array | None = None,
    removed: _Array | None = None,
    exclude: _Array | None = None,
    threads: int = 1,
    isa: str = "",
) -> tuple[int, int]:
    """mips_topk of float32 rows, most of which only their int8 codes are read of.

    With a rotation and its lead codes, most codes are not read either. Returns how many rows and
    how many rows of codes were read, summed over the queries.
    """

def merge_topk(part_scores: _Array, part_rows: _Array, scores: _Array, rows: _Array) -> None:
    """Answers [parts, B, k] of several searches as one."""

def doc_scores(
    query_emb: _Array,
    index_emb: _Array,
    rows: _Array,
    tau: float,
    scale: _Array | None,
    offset: _Array | None,
    threads: int,
    isa: str,
    scores: _Array,
    log_prior: _Array,
) -> None:
    """Products of each query with rows [B, K] of a matrix as for mips_topk.

    csrc/retrieval/doc_scores.h. Here an array may also be a capsule of DLPack.
    """

def doc_scores_backward(
    query_emb: _Array,
    index_emb: _Array,
    rows: _Array,
    tau: float,
    scale: _Array | None,
    offset: _Array | None,
    threads: int,
    isa: str,
    log_prior: _Array,
    dscores: _Array | None,
    dlog_prior: _Array | None,
    dquery: _Array | None,
    dpassage: _Array | None,
) -> None:
    """Gradients into dquery [B, D] and dpassage [B, K, D], each where it is given."""

def passage_lengths(
    tokens: _Array, offsets: _Array, rows: _Array, lengths: _Array, max_length: int
) -> int:
    """Tokens of passages, at most max_length, and the most of them; csrc/retrieval/gather.h.

    tokens: int32, all passages one after another; offsets: [N + 1].
    """

def gather_tokens(tokens: _Array, offsets: _Array, rows: _Array, token_ids: _Array) -> None:
    """Passages, cut at the width of token_ids [n, width] and padded with 0."""

def fma_loop(n_fmas: int, *, threads: int = 1, isa: str = "") -> None:
    """n_fmas multiplications and additions of float32 on registers: a ceiling for benchmarks."""

def read_loop(bytes: _Array, *, threads: int = 1, isa: str = "") -> int:
    """The exclusive or of all int8 [n], read as fast as memory is: a ceiling for benchmarks."""

def head_products(
    hidden: _Array,
    weight: _Array,
    z0: _Array,
    log_z: _Array,
    *,
    bias: _Array | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    threads: int = 1,
    isa: str = "",
) -> None:
    """z0 [n, V] without bias, scale and softcap; log_z [n] with them. csrc/loss/decoding.h."""

def mixture_logp(
    z0: _Array,
    log_z: _Array,
    log_prior: _Array,
    mixture: _Array,
    *,
    bias: _Array | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    threads: int = 1,
    isa: str = "",
) -> None:
    """The log-probabilities of the next token under the mixture, [G, V]."""
