"""Exact maximum inner product search: the k rows of a matrix with the largest products.

The modes are how the matrix is stored: `float32`, `bfloat16`, `float16`, `int8`, each searched for
the best of the stored vectors; and `int8-float32`, the best of the float32 vectors by way of codes.

The checked problems are of whole numbers, of which every sum is exact in float32: scores must be
equal to the last bit, and ours must order ties, which abound, by lowest row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import shared
from benchmarks.harness.registry import DTYPES, Goal, Op, Provider, Shape, needs, ours
from benchmarks.harness.shared import Spec
from benchmarks.ops import search_peers as peers
from benchmarks.ops.search_peers import Answer, Ask, Make

FLOATS = tuple(DTYPES)
STORAGES = (*FLOATS, "int8")
CODED = "int8-float32"
MODES = (*STORAGES, CODED)
# What each mode is made of; factors are scale and offset of the codes.
PARTS = {
    **{name: (name,) for name in FLOATS},
    "int8": ("factors", "int8"),
    CODED: ("float32", "factors", "int8"),
}
PLAIN = "cpp-float32"  # what the other storages are compared with
BLOCK_ROWS = 65536
MATRIX_SEED = 1  # not that of the queries


@dataclass
class Problem:
    query_emb: Tensor  # [B, D]
    n_rows: int
    k: int
    whole: bool  # whole numbers, with rows that repeat

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, query_emb=self.query_emb.to(dtype))

    def part(self, name: str) -> Tensor:
        """The matrix in one storage, or the factors [2, D]: what all share, or made here."""
        width, device = self.query_emb.shape[1], self.query_emb.device
        if self.whole and name == "factors":  # codes that stand for other vectors, exactly
            return torch.tensor([[1.0], [0.25]], device=device).repeat(1, width)
        found = None if self.whole else shared.find(_key(name, self.n_rows, width))
        if found is None:
            shape, dtype = _shape_of(name, self.n_rows, width)
            found = torch.empty(shape, dtype=dtype, device=device)
            _fill(name, found, partial(_blocks, self.n_rows, width, device, self.whole), self.part)
        return found

    def stored(self, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The matrix to be searched, with the scale and offset that int8 has."""
        *_, last = PARTS[mode]
        scale_offset = self.part("factors") if last == "int8" else ()
        return self.part(last), dict(zip(("scale", "offset"), scale_offset, strict=False))


def _key(name: str, n_rows: int, width: int) -> str:
    return f"mips {name} {n_rows},{width}"


def _shape_of(name: str, n_rows: int, width: int) -> tuple[tuple[int, int], torch.dtype]:
    if name == "factors":
        return (2, width), torch.float32
    return (n_rows, width), torch.int8 if name == "int8" else DTYPES[name]


def _blocks(n_rows: int, width: int, device: torch.device, whole: bool) -> Iterator[Tensor]:
    """The float32 vectors, a block of rows at a time."""
    generator = torch.Generator(device).manual_seed(MATRIX_SEED)
    if whole:
        values = torch.randint(-4, 5, (n_rows, width), generator=generator, device=device)
        half = n_rows // 2
        values[half:] = values[: n_rows - half].clone()  # every row has its like
        yield values.float()
        return
    for first in range(0, n_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows - first)
        yield torch.randn((n, width), generator=generator, device=device)


def _fill(
    name: str,
    out: Tensor,
    blocks: Callable[[], Iterator[Tensor]],
    part: Callable[[str], Tensor],
) -> None:
    from fastrag.index.codec import Codec, fit_int8

    if name == "factors":
        codec = fit_int8(blocks())
        assert codec.scale is not None and codec.offset is not None
        out[0], out[1] = codec.scale, codec.offset
        return
    codec = Codec(name, *part("factors")) if name == "int8" else Codec(name)
    first = 0
    for block in blocks():
        out[first : first + len(block)] = codec.encode(block)[0]
        first += len(block)


def share(mode: str, shape: Shape) -> Mapping[str, Spec]:
    """Float32 too: the other modes are compared with it."""
    n_rows, width, *_ = shape
    blocks = partial(_blocks, n_rows, width, torch.device("cpu"), False)

    def held(name: str) -> Tensor:
        found = shared.find(_key(name, n_rows, width))
        assert found is not None
        return found

    return {
        _key(name, n_rows, width): Spec(
            *_shape_of(name, n_rows, width), partial(_fill, name, blocks=blocks, part=held)
        )
        for name in dict.fromkeys(("float32", *PARTS[mode]))
    }


def make(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    n_rows, width, k, n_queries = shape
    generator = torch.Generator(device).manual_seed(seed)
    query = torch.randn((n_queries, width), generator=generator, device=device)
    return Problem(query.to(dtype), n_rows, k, whole=False)


def make_checked(shape: Shape, dtype: torch.dtype, seed: int, device: torch.device) -> Problem:
    """Queries of more bits than half precision has."""
    n_rows, width, k, n_queries = shape
    generator = torch.Generator(device).manual_seed(seed)
    query = torch.randint(-512, 513, (n_queries, width), generator=generator, device=device)
    return Problem(query.to(dtype), n_rows, k, whole=True)


# --------------------------------------------------------------------------------- oracle, check


def all_scores(mode: str, p: Problem) -> Tensor:
    """[B, N] in float64."""
    if mode == CODED:
        mode = "float32"
    data, factors = p.stored(mode)
    values = data.double()
    if factors:  # the search has them in float32
        values = (values * factors["scale"].double() + factors["offset"].double()).float().double()
    return p.query_emb.double() @ values.t()


def oracle(mode: str, p: Problem) -> tuple[Tensor, ...]:
    scores, rows = all_scores(mode, p).sort(dim=1, descending=True, stable=True)
    return scores[:, : p.k].to(p.query_emb.dtype), rows[:, : p.k]


def check(provider: Provider, mode: str, p: Problem, found: tuple[Tensor, ...]) -> str:
    """Recall of 1: the scores are the k largest, to the bit, and those of distinct rows."""
    every = all_scores("float32" if provider.name == PLAIN else mode, p)
    best, first_rows = every.sort(dim=1, descending=True, stable=True)
    best, first_rows = best[:, : p.k], first_rows[:, : p.k]
    scores, rows = found
    if scores.shape != best.shape or rows.shape != best.shape:
        return f"scores {list(scores.shape)}, rows {list(rows.shape)}, expected {list(best.shape)}"
    if not torch.equal(scores.double(), best):
        wrong = int((scores.double() != best).sum())
        return f"scores: {wrong} of {best.numel()} are not those of the best rows"
    if bool((rows.sort(dim=1).values.diff(dim=1) == 0).any()):
        return "rows: a query has a row twice"
    if not torch.equal(every.gather(1, rows.long()), best):
        return "rows: not those that have the scores"
    if provider.kind == "ours" and not torch.equal(rows, first_rows):
        return "rows: ties are not in the order of the rows"
    return ""


# -------------------------------------------------------------------------------------- providers


def answer(mode: str, ask: Ask) -> Answer:
    return ask()


def fastrag_search(mode: str, p: Problem) -> Ask:
    import fastrag.functional as F

    if mode == CODED:
        from fastrag.ops.cpp import CodedIndex

        codes = CodedIndex(p.part("float32"), p.part("int8"), *p.part("factors"))
        return lambda: codes.search(p.query_emb, p.k)
    data, factors = p.stored(mode)
    return lambda: F.mips_topk(p.query_emb, data, p.k, **factors)


def fastrag_on_float32(mode: str, p: Problem) -> Ask:
    return fastrag_search("float32", p)


def peer(make_ask: Make) -> Callable[[str, Problem], Ask]:
    return lambda mode, p: make_ask(p.query_emb, p.stored(mode)[0], p.k)


def read(mode: str, p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """Every byte once; on a GPU as a sum of float32, whatever the bits are."""
    stored = p.stored(mode)[0].flatten()
    if not no_extension() and stored.device.type == "cpu":
        from fastrag import _C

        numbers = stored.view(torch.int8).numpy()
        return lambda: (torch.tensor(_C.read_loop(numbers, threads=torch.get_num_threads())),)
    words = stored[: len(stored) - len(stored) % (4 // stored.itemsize)].view(torch.float32)
    return lambda: (words.sum(),)


def multiply_add(mode: str, p: Problem) -> Callable[[], tuple[Tensor, ...]]:
    from fastrag import _C
    from fastrag.ops import backends

    n_fmas, isa = p.n_rows * p.query_emb.numel(), os.environ.get(backends.ISA_VARIABLE, "")

    def run() -> tuple[Tensor, ...]:
        _C.fma_loop(n_fmas, threads=torch.get_num_threads(), isa=isa)
        return ()

    return run


def no_extension() -> str:
    from fastrag.ops import backends

    return backends.why_not("cpp")


def own_memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """The matrix itself on a GPU, where no process shares it."""
    n_rows, width, *_ = shape
    kept = 12 * n_rows if mode == CODED else 0
    if device.type == "cuda":
        kept += sum(_bytes(name, n_rows, width) for name in PARTS[mode])
    return kept, EXTRA_MEMORY


def _bytes(name: str, n_rows: int, width: int) -> int:
    shape, dtype = _shape_of(name, n_rows, width)
    return shape[0] * shape[1] * dtype.itemsize


def on_cpu(name: str, make_ask: Make, about: str, **limits: object) -> Provider:
    limits = {"modes": ("float32",), **limits}
    return Provider(
        name,
        answer,
        about,
        devices=("cpu",),
        dtypes=("float32",),
        setup=peer(make_ask),
        **limits,  # type: ignore[arg-type]
    )


def on_gpu(name: str, make_ask: Make, about: str, missing: Callable[[], str]) -> Provider:
    return Provider(
        name,
        answer,
        about,
        devices=("cuda",),
        modes=FLOATS,
        missing=missing,
        setup=peer(make_ask),
        memory=own_memory,
    )


EXTRA_MEMORY = 32 << 20
OURS = {"setup": fastrag_search, "memory": own_memory}

PROVIDERS = (
    Provider(
        "read",
        answer,
        "every byte of the matrix, once",
        kind="ceiling",
        setup=read,
        memory=own_memory,
    ),
    Provider(
        "fma",
        answer,
        "as many multiplications and additions, on registers",
        kind="ceiling",
        devices=("cpu",),
        missing=no_extension,
        setup=multiply_add,
    ),
    ours("cpp", answer, "fastrag in C++", devices=("cpu",), **OURS),
    ours("triton", answer, "fastrag in Triton", devices=("cuda",), modes=STORAGES, **OURS),
    ours("torch", answer, "fastrag in torch", modes=STORAGES, **OURS),
    replace(
        ours("cpp", answer, "fastrag in C++ on the float32 matrix", devices=("cpu",)),
        name=PLAIN,
        modes=MODES[1:],
        setup=fastrag_on_float32,
    ),
    on_cpu(
        "faiss",
        peers.faiss_flat(None),
        "faiss.IndexFlatIP",
        missing=needs("faiss"),
        memory=peers.keeps_a_copy,
    ),
    on_cpu(
        "faiss-tuned",
        peers.faiss_flat(peers.TUNED_THRESHOLD),
        "the same, matrix products for any batch",
        missing=needs("faiss"),
        memory=peers.keeps_a_copy,
    ),
    on_cpu(
        "faiss-sq",
        peers.faiss_quantizer,
        "faiss.IndexScalarQuantizer",
        modes=("bfloat16", "float16"),
        missing=needs("faiss"),
        memory=peers.keeps_a_copy,
    ),
    on_cpu(
        "mm-xq",
        peers.whole(peers.by_columns),
        "torch: (X @ q.T).topk(dim=0)",
        memory=peers.takes_all_scores(2),
    ),
    on_cpu(
        "mm-qx",
        peers.whole(peers.by_rows),
        "torch: (q @ X.T).topk(dim=1)",
        memory=peers.takes_all_scores(2),
    ),
    on_cpu(
        "mm-xq-chunked",
        peers.chunked(peers.by_columns, lambda n_queries: peers.CHUNK_ROWS),
        "mm-xq, 65536 rows at a time",
    ),
    on_cpu(
        "mm-qx-chunked",
        peers.chunked(peers.by_rows, lambda n_queries: peers.CHUNK_ROWS),
        "mm-qx, 65536 rows at a time",
    ),
    on_cpu(
        "usearch",
        peers.by_usearch,
        "usearch, exact search",
        missing=needs("usearch"),
        memory=peers.takes_all_scores(4),
    ),
    on_cpu(
        "numpy",
        peers.by_numpy,
        "numpy: q @ X.T, argpartition",
        memory=peers.takes_all_scores(4),
    ),
    on_gpu(
        "mm-tiled",
        peers.chunked(peers.by_rows_wide, lambda n_queries: peers.TILE_SCORES // n_queries),
        "torch: mm with float32 scores and topk, a gigabyte of scores at a time",
        lambda: "",
    ),
    on_gpu("faiss-gpu", peers.faiss_gpu, "faiss.knn_gpu", peers.no_faiss_gpu),
    on_gpu("flashlib", peers.whole(peers.by_rows), "flashlib's flash_knn", peers.no_flashlib),
)


def flops(mode: str, shape: Shape) -> float:
    n_rows, width, _, n_queries = shape
    return 2.0 * n_rows * width * n_queries


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """The matrix as it is stored, or its codes; queries; scores and rows."""
    n_rows, width, k, n_queries = shape
    *_, last = PARTS[mode]
    return float(_bytes(last, n_rows, width) + n_queries * (width * itemsize + 12 * k))


# ------------------------------------------------------------------------------------------ goals


def at(*modes: str, least: int = 1, most: int | None = None) -> Callable[[str, Shape], bool]:
    """For batches of least to most queries."""

    def where(mode: str, shape: Shape) -> bool:
        return mode in modes and least <= shape[3] and (most is None or shape[3] <= most)

    return where


# queries from, to -> times as fast as the best peer
AGAINST_PEERS = {(1, 1): 1.7, (2, 4): 1.35, (8, 8): 2.0, (16, 16): 1.7, (32, 32): 1.45}
AGAINST_PEERS |= {(64, 64): 1.25, (128, 128): 1.08, (256, 256): 1.02}

GOALS = (
    *(
        Goal("best peer", at_least=times, where=at("float32", least=least, most=most))
        for (least, most), times in AGAINST_PEERS.items()
    ),
    Goal("read", at_least=0.85, where=at("float32", most=4)),
    Goal("fma", at_least=0.9, where=at("float32", least=64)),
    Goal(PLAIN, at_least=1.8, where=at("bfloat16", "float16", most=1)),
    Goal(PLAIN, at_least=3.0, where=at("int8", most=1)),
    Goal("fma", at_least=2.0, where=at(CODED, least=64)),
)

OP = Op(
    name="mips",
    about="the k rows of an index with the largest inner products, exactly",
    dims=("N", "D", "k", "B"),
    modes=MODES,
    outputs=("scores", "rows"),
    make=make,
    make_checked=make_checked,
    oracle=oracle,
    providers=PROVIDERS,
    ceiling="read",
    checked=(
        (50, 17, 3, 5),  # nothing divides anything
        (3000, 128, 10, 1),  # a single query has a way of its own
        (3000, 768, 100, 64),  # DPR's width, many queries
    ),
    shapes={
        "cpu": (
            # DPR's vectors, 200,000 passages: from one question to a large training batch
            *((200_000, 768, 10, n_queries) for n_queries in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
            (200_000, 384, 1, 8),  # MiniLM's width, the nearest passage alone
            (200_000, 128, 100, 8),  # a small encoder, a list to rerank
            (1_000_000, 768, 10, 1),  # a million DPR passages
            (1_000_000, 768, 10, 64),
        ),
        # all of Wikipedia in DPR's passages
        "cuda": tuple((21_000_000, 768, 10, n) for n in (1, 16, 64, 128, 256, 1024)),
    },
    mode_shapes={
        **{("cpu", mode): ((200_000, 768, 10, 1),) for mode in MODES[1:]},
        ("cpu", CODED): tuple((200_000, 768, 10, n) for n in (1, 4, 16, 64)),
        **{("cuda", mode): () for mode in MODES if mode != "bfloat16"},
    },
    small=(20_000, 256, 10, 8),
    flops=flops,
    bytes=least_bytes,
    goals=GOALS,
    extra_memory=EXTRA_MEMORY,
    check=check,
    share=share,
    patience=3.0,
    headlines=(
        ("float32", (200_000, 768, 10, 64)),
        ("float32", (200_000, 768, 10, 1)),
        (CODED, (200_000, 768, 10, 64)),
        ("float32", (200_000, 768, 10, 8)),
        ("int8", (200_000, 768, 10, 1)),
        ("bfloat16", (200_000, 768, 10, 1)),
    ),
    curves={
        # DPR's vectors, one question and a batch: a straight line is what exact search can have
        "N": tuple(
            (n_rows, 768, 10, n_queries)
            for n_rows in (50_000, 100_000, 200_000, 400_000, 1_000_000)
            for n_queries in (1, 64)
        ),
        "B": tuple((200_000, 768, 10, n) for n in (1, 4, 16, 64, 256)),
    },
    curve_providers=(
        *("read", "fma", "cpp", "triton", "faiss-tuned", "mm-xq", "mm-tiled", "faiss-gpu"),
        "numpy",
    ),
)
