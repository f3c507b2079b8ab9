"""Between search and generator: tokens of passages, and contexts made of them.

`gather`: the tokens of K passages for each of B questions, padded. `contexts`: passage and question
laid out as the generator's input. fastrag tokenised the passages when the store was built; Hugging
Face's `postprocess_docs` joins texts and tokenises them. Its texts are at hand: fetching them from
a data set and decoding the questions is not timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness.registry import Call, Op, Outputs, Provider, Shape, needs
from benchmarks.ops import rag_step_corpus as texts
from benchmarks.ops.rag_step_corpus import TEMPLATE

GATHER, CONTEXTS = "gather", "contexts"
ANSWER_WIDTH = 3  # of labels, which are not used here
STRIDE = 7919  # from one passage to the next; a prime, so that none is repeated
HF_PACKAGES = ("transformers", "datasets", "faiss")
SWEEP = ((16, 4, 280, 4000),)  # 64 passages of about 256 tokens


@dataclass(frozen=True)
class Problem:
    shape: Shape  # B, K, L, N
    device: torch.device

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same: ids have no other dtype."""
        return self

    @property
    def rows(self) -> Tensor:
        """[B, K]"""
        n_questions, n_docs, _, n_passages = self.shape
        rows = STRIDE * torch.arange(n_questions * n_docs) % n_passages
        return rows.view(n_questions, n_docs).to(self.device)

    def corpus(self) -> texts.Corpus:
        n_questions, _, context_width, n_passages = self.shape
        return texts.corpus(n_passages, n_questions, context_width, ANSWER_WIDTH, ragged=False)


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    return Problem(shape, device)


def oracle(mode: str, problem: Problem) -> Outputs:
    """Return ids and mask [B*K, L] of whole texts; or ids [B, K, L] and lengths [B, K]."""
    corpus, rows = problem.corpus(), problem.rows
    if mode == CONTEXTS:
        return corpus.contexts(rows)
    rendered = [TEMPLATE.render_passage(corpus.passages[row]) for row in rows.flatten().tolist()]
    encoded = texts.tokenizer()(rendered, add_special_tokens=False)["input_ids"]
    alone = [torch.tensor(ids, device=rows.device) for ids in encoded]
    lengths = torch.tensor([len(ids) for ids in alone], device=rows.device)
    return pad_sequence(alone, batch_first=True).view(*rows.shape, -1), lengths.view_as(rows)


def check(provider: Provider, mode: str, problem: Problem, found: Outputs) -> str:
    for name, got, right in zip(OP.outputs, found, oracle(mode, problem), strict=True):
        if not torch.equal(got, right):
            return f"{name}: {list(got.shape)}, not the {list(right.shape)} of the texts"
    return ""


def with_fastrag(mode: str, problem: Problem) -> Call:
    corpus, rows = problem.corpus(), problem.rows
    processor = texts.processor(problem.shape[2])
    store = corpus.store().to(problem.device)
    if mode == GATHER:
        return lambda: store.gather(rows, "generator")
    batch = processor.collate(corpus.questions)
    prompt = [batch[name].to(problem.device) for name in ("prompt_ids", "prompt_mask")]
    return lambda: processor.contexts(store, rows, *prompt)[:2]


def with_hugging_face(mode: str, problem: Problem) -> Call:
    from transformers import BartConfig, DPRConfig, RagRetriever

    _, n_docs, context_width, _ = problem.shape
    config = texts.rag_config(DPRConfig(), BartConfig(), n_docs, context_width)
    corpus, tokenizer = problem.corpus(), texts.tokenizer()
    nothing: Any = object()  # an index that no search reaches
    retriever = RagRetriever(config, tokenizer, tokenizer, index=nothing, init_retrieval=False)
    found = [[corpus.passages[row] for row in rows] for rows in problem.rows.tolist()]
    docs = [{"title": [p.title for p in of], "text": [p.text for p in of]} for of in found]
    questions = [question.question for question in corpus.questions]

    def postprocess() -> Outputs:
        made = retriever.postprocess_docs(docs, questions, "", n_docs, return_tensors="pt")
        return tuple(x.to(problem.device) for x in made)

    return postprocess


def with_pad_sequence(mode: str, problem: Problem) -> Call:
    ids, lengths = oracle(GATHER, problem)
    flat = zip(ids.flatten(0, 1).cpu(), lengths.flatten().tolist(), strict=True)
    tokenised = [row[:n].clone() for row, n in flat]

    def pad() -> Outputs:
        padded = pad_sequence(tokenised, batch_first=True).view(*lengths.shape, -1)
        widths = torch.tensor([len(row) for row in tokenised]).view_as(lengths)
        return padded.to(problem.device), widths.to(problem.device)

    return pad


def n_outputs(mode: str) -> int:
    """Return how many outputs have B * K * L numbers."""
    return 2 if mode == CONTEXTS else 1


def with_copy(mode: str, problem: Problem) -> Call:
    n_questions, n_docs, width, _ = problem.shape
    shape = n_outputs(mode), n_questions * n_docs, width
    # Into memory that exists, one tensor at a time: fetching new pages, or waking a thread for
    # 300 kB, would cost more than the copy, and a provider could be faster.
    source, kept = (
        torch.ones(shape, dtype=torch.int64, device=problem.device).unbind() for _ in range(2)
    )
    return lambda: tuple(to.copy_(x) for to, x in zip(kept, source, strict=True))


def least_bytes(mode: str, shape: Shape, itemsize: int) -> float:
    """Count tokens of four bytes that are read, and of eight that are written, mask included."""
    n_questions, n_docs, width, _ = shape
    return float(n_questions * n_docs * width * (4 + 8 * n_outputs(mode)))


OP = Op(
    name="contexts",
    about="tokens of retrieved passages, and the generator's inputs made of them",
    dims=("B", "K", "L", "N"),
    modes=(GATHER, CONTEXTS),
    outputs=("ids", "lengths"),
    make=make,
    make_checked=make,
    oracle=oracle,
    providers=(
        Provider("copy", with_copy, "ceiling"),
        Provider("fastrag", with_fastrag, "ours"),
        Provider("pad-sequence", with_pad_sequence, modes=(GATHER,)),
        # transformers asks for the other two before it makes a RagRetriever
        Provider("hf", with_hugging_face, modes=(CONTEXTS,), missing=needs(*HF_PACKAGES)),
    ),
    ceiling="copy",
    checked=((3, 4, 41, 50),),
    shapes={"cpu": SWEEP, "cuda": SWEEP},
    small=(4, 4, 64, 500),
    flops=lambda mode, shape: 0.0,
    bytes=least_bytes,
    check=check,
)
