"""Exact maximum inner product search: the k rows of a matrix with the largest products.

A mode is how the matrix is stored: `float32`, `bfloat16`, `float16`, `int8`, each searched for the
best of the stored vectors; and `int8-float32`, the best of the float32 vectors found through codes.
A mode may name a corpus after a slash, such as `float32/embeddings`; `benchmarks.ops.corpora`
describes them.

The checked problems consist of whole numbers, whose sums are exact in float32: scores must be equal
to the last bit, and ours must return the lowest row first of those with equal scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import shared
from benchmarks.harness.registry import (
    DTYPES,
    Call,
    Goal,
    Op,
    Outputs,
    Prepare,
    Provider,
    Shape,
    needs,
    ours,
)
from benchmarks.harness.shared import Spec
from benchmarks.ops import corpora
from benchmarks.ops import search_peers as peers
from benchmarks.ops.search_peers import Make

FLOATS = tuple(DTYPES)
STORAGES = (*FLOATS, "int8")
CODED = "int8-float32"
SEARCHES = (*STORAGES, CODED)
# modes whose answer is that of float32, of both corpora
EXACT = ("float32", CODED)
MODES = (*SEARCHES, *(corpora.join(mode, corpora.EMBEDDINGS) for mode in EXACT))
# The tensors of each mode, the searched one last; factors are scale and offset of the codes.
PARTS = {name: (name,) for name in FLOATS}
PARTS |= {"int8": ("factors", "int8"), CODED: ("float32", "factors", "int8")}
PLAIN = "cpp-float32"  # the other storages are compared with it
EXTRA_MEMORY = 32 << 20
# Largest error of a score of whole numbers after a rotation, over D: products reach 2048.
ROUNDING = 2048 * 1e-5


@dataclass(frozen=True)
class Matrix:
    """The vectors that are searched, in every storage."""

    n_rows: int
    width: int
    device: torch.device
    corpus: str = corpora.RANDN
    whole: bool = False  # whole numbers, each row twice

    def key(self, name: str) -> str:
        return f"mips {name} {self.corpus} {self.n_rows},{self.width}"

    def size(self, name: str) -> tuple[tuple[int, int], torch.dtype]:
        if name == "factors":
            return (2, self.width), torch.float32
        return (self.n_rows, self.width), torch.int8 if name == "int8" else DTYPES[name]

    def nbytes(self, name: str) -> int:
        (n_rows, width), dtype = self.size(name)
        return n_rows * width * dtype.itemsize

    def part(self, name: str) -> Tensor:
        """Return the matrix in one storage, or the factors [2, D]: shared, or made here."""
        if self.whole and name == "factors":  # exact in float32, and of other vectors
            return torch.tensor([[1.0], [0.25]], device=self.device).repeat(1, self.width)
        found = None if self.whole else shared.find(self.key(name))
        if found is None:
            shape, dtype = self.size(name)
            found = torch.empty(shape, dtype=dtype, device=self.device)
            self.fill(name, found)
        return found

    def fill(self, name: str, out: Tensor) -> None:
        from fastrag.index.codec import Codec, fit_int8

        if name == "factors":
            codec = fit_int8(self.blocks())
            assert codec.scale is not None and codec.offset is not None
            out[0], out[1] = codec.scale, codec.offset
            return
        codec = Codec(name, *self.part("factors")) if name == "int8" else Codec(name)
        first = 0
        for block in self.blocks():
            out[first : first + len(block)] = codec.encode(block)[0]
            first += len(block)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the float32 vectors, a block of rows at a time."""
        if not self.whole:
            yield from corpora.blocks(self.corpus, self.n_rows, self.width, self.device)
            return
        generator = torch.Generator(self.device).manual_seed(corpora.MATRIX_SEED)
        size, half = (self.n_rows, self.width), self.n_rows // 2
        values = torch.randint(-4, 5, size, generator=generator, device=self.device)
        values[half:] = values[: self.n_rows - half].clone()
        yield values.float()

    def questions(self, n: int) -> Tensor:
        """Return questions [n, D] near the rows: shared, or made here."""
        found = shared.find(self.key(f"questions {n}"))
        return corpora.near(self.part("float32"), n) if found is None else found


@dataclass
class Problem:
    query_emb: Tensor  # [B, D]
    matrix: Matrix
    k: int

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, query_emb=self.query_emb.to(dtype))

    def on(self, corpus: str) -> Problem:
        """Return the problem with the vectors of another corpus and questions to them."""
        if self.matrix.whole or corpus == corpora.RANDN:
            return self
        matrix = replace(self.matrix, corpus=corpus)
        query_emb = matrix.questions(len(self.query_emb)).to(self.query_emb.dtype)
        return replace(self, query_emb=query_emb, matrix=matrix)

    def stored(self, mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the matrix that is searched, with the scale and offset of int8."""
        *_, last = PARTS[mode]
        factors = self.matrix.part("factors") if last == "int8" else ()
        return self.matrix.part(last), dict(zip(("scale", "offset"), factors, strict=False))


def share(mode: str, shape: Shape) -> Mapping[str, Spec]:
    """Return the tensors of a mode, and float32, with which the other modes are compared."""
    mode, corpus = corpora.split(mode)
    n_rows, width, _, n_queries = shape
    matrix = Matrix(n_rows, width, torch.device("cpu"), corpus)
    specs = {
        matrix.key(name): Spec(*matrix.size(name), partial(matrix.fill, name))
        for name in dict.fromkeys(("float32", *PARTS[mode]))
    }
    if corpus != corpora.RANDN:

        def ask(out: Tensor) -> None:
            out.copy_(corpora.near(matrix.part("float32"), n_queries))

        specs[matrix.key(f"questions {n_queries}")] = Spec((n_queries, width), torch.float32, ask)
    return specs


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    n_rows, width, k, n_queries = shape
    generator = torch.Generator(device).manual_seed(corpora.QUERY_SEED)
    query = torch.randn((n_queries, width), generator=generator, device=device)
    return Problem(query.to(dtype), Matrix(n_rows, width, device), k)


def make_checked(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return a problem whose queries have more bits than half precision."""
    n_rows, width, k, n_queries = shape
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randint(-512, 513, (n_queries, width), generator=generator, device=device)
    return Problem(query.to(dtype), Matrix(n_rows, width, device, whole=True), k)


# --------------------------------------------------------------------------------- oracle, check


def all_scores(mode: str, p: Problem) -> Tensor:
    """Return the scores [B, N] in float64."""
    mode, corpus = corpora.split(mode)
    p = p.on(corpus)
    data, factors = p.stored("float32" if mode == CODED else mode)
    values = data.double()
    if factors:  # the search has the vectors in float32
        values = (values * factors["scale"].double() + factors["offset"].double()).float().double()
    return p.query_emb.double() @ values.t()


def oracle(mode: str, p: Problem) -> Outputs:
    scores, rows = all_scores(mode, p).sort(dim=1, descending=True, stable=True)
    return scores[:, : p.k].to(p.query_emb.dtype), rows[:, : p.k]


def check(provider: Provider, mode: str, p: Problem, found: Outputs) -> str:
    """Require recall 1: the k largest scores to the bit, of distinct rows that have them.

    The scores of a peer that rotates the vectors may be off by the rounding of the rotation.
    """
    mode = "float32" if provider.name == PLAIN else mode
    slack = ROUNDING * p.matrix.width if provider.name in peers.PANORAMA else 0.0
    best, first_rows = oracle(mode, p.to(torch.float64))
    scores, rows = found
    if scores.shape != best.shape or rows.shape != best.shape:
        return f"scores {list(scores.shape)}, rows {list(rows.shape)}, expected {list(best.shape)}"
    if wrong := _n_apart(scores.double(), best, slack):
        return f"scores: {wrong} of {best.numel()} are not those of the best rows"
    if bool((rows.sort(dim=1).values.diff(dim=1) == 0).any()):
        return "rows: a query has a row twice"
    if _n_apart(all_scores(mode, p).gather(1, rows.long()), best, slack):
        return "rows: not those that have the scores"
    if provider.kind == "ours" and not torch.equal(rows, first_rows):
        return "rows: ties are not in the order of the rows"
    return ""


def _n_apart(x: Tensor, y: Tensor, slack: float) -> int:
    return int(((x - y).abs() > slack).logical_or(x.isnan()).sum())


# -------------------------------------------------------------------------------------- providers


def placed(prepare: Prepare) -> Prepare:
    """Return the `prepare` of a mode that may name a corpus."""

    def prepared(mode: str, p: Problem) -> Call:
        mode, corpus = corpora.split(mode)
        return prepare(mode, p.on(corpus))

    return prepared


def fastrag_search(mode: str, p: Problem) -> Call:
    import fastrag.functional as F

    if mode == CODED:
        from fastrag.index import rotation
        from fastrag.ops.cpp import CodedIndex

        part = p.matrix.part
        scale, offset = part("factors")
        leading = rotation.fit(part("float32"), offset)
        codes = CodedIndex(part("float32"), part("int8"), scale, offset, **leading)
        return lambda: codes.search(p.query_emb, p.k)
    data, factors = p.stored(mode)
    return lambda: F.mips_topk(p.query_emb, data, p.k, **factors)


def search_plain(mode: str, p: Problem) -> Call:
    return fastrag_search("float32", p)


def read(mode: str, p: Problem) -> Call:
    """Read every byte once; on a GPU as a sum of float32, whatever the bits are."""
    stored = p.stored(mode)[0].flatten()
    if not no_extension() and stored.device.type == "cpu":
        from fastrag import _C

        numbers = stored.view(torch.int8).numpy()
        return lambda: (torch.tensor(_C.read_loop(numbers, threads=torch.get_num_threads())),)
    words = stored[: len(stored) - len(stored) % (4 // stored.itemsize)].view(torch.float32)
    return lambda: (words.sum(),)


def multiply_add(mode: str, p: Problem) -> Call:
    from fastrag import _C
    from fastrag.ops import backends

    n_fmas, isa = p.matrix.n_rows * p.query_emb.numel(), os.environ.get(backends.ISA_VARIABLE, "")

    def run() -> Outputs:
        _C.fma_loop(n_fmas, threads=torch.get_num_threads(), isa=isa)
        return ()

    return run


def no_extension() -> str:
    from fastrag.ops import backends

    return backends.why_not("cpp")


def own_memory(mode: str, shape: Shape, device: torch.device) -> tuple[int, int]:
    """Count the matrix itself on a GPU, where no process shares it."""
    mode, _ = corpora.split(mode)
    kept = shape[0] * (24 + shape[1] // 3) if mode == CODED else 0  # leading codes and bounds
    if device.type == "cuda":
        kept += sum(Matrix(*shape[:2], device).nbytes(name) for name in PARTS[mode])
    return kept, EXTRA_MEMORY


def peer(make_call: Make) -> Prepare:
    def prepare(mode: str, p: Problem) -> Call:
        stored = p.matrix.part("float32") if mode == CODED else p.stored(mode)[0]
        return make_call(p.query_emb, stored, p.k)

    return placed(prepare)


def on_cpu(name: str, make_call: Make, **limits: Any) -> Provider:
    limits = {"modes": ("float32",), "dtypes": ("float32",), **limits}
    return Provider(name, peer(make_call), devices=("cpu",), **limits)


def on_gpu(name: str, make_call: Make, **limits: Any) -> Provider:
    limits = {"modes": FLOATS, "memory": own_memory, **limits}
    return Provider(name, peer(make_call), devices=("cuda",), **limits)


def fastrag(backend: str, prepare: Prepare = fastrag_search, **limits: Any) -> Provider:
    return ours(backend, placed(prepare), memory=own_memory, **limits)


FAISS: dict[str, Any] = {"missing": needs("faiss"), "memory": peers.keeps_a_copy}
FAISS_PANORAMA = FAISS | {"missing": peers.no_panorama, "modes": EXACT}
scores_twice, scores_four_times = peers.takes_all_scores(2), peers.takes_all_scores(4)
PROVIDERS = (
    Provider("read", placed(read), "ceiling", memory=own_memory),
    Provider("fma", multiply_add, "ceiling", devices=("cpu",), missing=no_extension),
    fastrag("cpp", devices=("cpu",)),
    fastrag("triton", devices=("cuda",), modes=STORAGES),
    fastrag("torch", modes=STORAGES),
    fastrag("cpp", search_plain, name=PLAIN, devices=("cpu",), modes=SEARCHES[1:]),
    on_cpu("faiss", peers.faiss_flat(None), **FAISS),
    on_cpu("faiss-tuned", peers.faiss_flat(peers.TUNED_THRESHOLD), **FAISS, modes=EXACT),
    *(
        on_cpu(name, peers.faiss_panorama(n_levels), **FAISS_PANORAMA)
        for name, n_levels in peers.PANORAMA.items()
    ),
    on_cpu("faiss-sq", peers.faiss_quantizer, modes=("bfloat16", "float16"), **FAISS),
    on_cpu("mm-xq", peers.whole(peers.by_columns), memory=scores_twice, modes=EXACT),
    on_cpu("mm-qx", peers.whole(peers.by_rows), memory=scores_twice, modes=EXACT),
    on_cpu("mm-xq-chunked", peers.chunked(peers.by_columns)),
    on_cpu("mm-qx-chunked", peers.chunked(peers.by_rows)),
    on_cpu("usearch", peers.by_usearch, missing=needs("usearch"), memory=scores_four_times),
    on_cpu("numpy", peers.by_numpy, memory=scores_four_times),
    on_gpu("mm-tiled", peers.by_tiles),
    on_gpu("faiss-gpu", peers.faiss_gpu, missing=peers.no_faiss_gpu),
    on_gpu("flashlib", peers.whole(peers.by_rows), missing=peers.no_flashlib),
)


def flops(mode: str, shape: Shape) -> float:
    n_rows, width, _, n_queries = shape
    return 2.0 * n_rows * width * n_queries


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count the matrix as it is stored, or its codes; queries; scores and rows."""
    n_rows, width, k, n_queries = shape
    *_, last = PARTS[corpora.split(mode)[0]]
    matrix = Matrix(n_rows, width, torch.device("cpu")).nbytes(last)
    return float(matrix + n_queries * (width * itemsize + 12 * k))


# ------------------------------------------------------------------------------------------ goals


def at(*modes: str, least: int = 1, most: float = float("inf")) -> Callable[[str, Shape], bool]:
    """Return a test for these modes and a batch of `least` to `most` queries."""
    return lambda mode, shape: mode in modes and least <= shape[3] <= most


# queries -> times as fast as the best peer
AGAINST_PEERS = {1: 1.7, 2: 1.35, 4: 1.35, 8: 2.0, 16: 1.7, 32: 1.45, 64: 1.25, 128: 1.08}
AGAINST_PEERS[256] = 1.02
# the same against faiss's Panorama, on vectors like embeddings
AGAINST_PANORAMA = {1: 1.5, 4: 4.0, 16: 10.0}
LIKE_EMBEDDINGS = corpora.join(CODED, corpora.EMBEDDINGS)

GOALS = (
    *(
        Goal("best peer", at_least=times, where=at("float32", least=n, most=n))
        for n, times in AGAINST_PEERS.items()
    ),
    Goal("read", at_least=0.85, where=at("float32", most=4)),
    Goal("fma", at_least=0.9, where=at("float32", least=64)),
    Goal(PLAIN, at_least=1.8, where=at("bfloat16", "float16", most=1)),
    Goal(PLAIN, at_least=3.0, where=at("int8", most=1)),
    Goal("fma", at_least=2.0, where=at(CODED, least=64)),
    *(
        Goal("panorama-8", at_least=times, where=at(LIKE_EMBEDDINGS, least=n, most=n))
        for n, times in AGAINST_PANORAMA.items()
    ),
)


def dpr(*n_queries: int, n_rows: int = 200_000) -> tuple[Shape, ...]:
    """Return shapes of DPR's vectors and ten hits for each question."""
    return tuple((n_rows, 768, 10, n) for n in n_queries)


# (mode, queries) that say most
HEADLINES = (("float32", 64), ("float32", 1), (CODED, 64), ("float32", 8), ("int8", 1))
HEADLINES += (("bfloat16", 1),)
CURVE_ROWS = (50_000, 100_000, 200_000, 400_000, 1_000_000)
CURVE_PROVIDERS = ("read", "fma", "cpp", "triton", "faiss-tuned", "mm-xq", "mm-tiled", "faiss-gpu")
CURVE_PROVIDERS += ("numpy",)

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
        (3000, 128, 10, 1),  # a single query is searched in another way
        (3000, 768, 100, 64),  # DPR's width, many queries
    ),
    shapes={
        "cpu": (
            *dpr(1, 2, 4, 8, 16, 32, 64, 128, 256),  # from one question to a large training batch
            (200_000, 384, 1, 8),  # MiniLM's width, only the nearest passage
            (200_000, 128, 100, 8),  # a small encoder, a list to rerank
            *dpr(1, 64, n_rows=1_000_000),
        ),
        "cuda": dpr(1, 16, 64, 128, 256, 1024, n_rows=21_000_000),  # Wikipedia in DPR's passages
    },
    mode_shapes={
        **{("cpu", mode): dpr(1) for mode in MODES[1:]},
        **{("cpu", mode): dpr(1, 4, 16, 64) for mode in (CODED, *MODES[len(SEARCHES) :])},
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
    corpora=corpora.CORPORA,
    on_vectors=((10, 1), (10, 4), (10, 16), (10, 64)),
    headlines=tuple((mode, *dpr(n)) for mode, n in HEADLINES),
    curves={
        # one question and a batch: exact search can at best be a straight line
        "N": tuple(shape for n in CURVE_ROWS for shape in dpr(1, 64, n_rows=n)),
        "B": dpr(1, 4, 16, 64, 256),
    },
    curve_providers=CURVE_PROVIDERS,
)
