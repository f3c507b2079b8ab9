"""A retriever over a table of vectors that a test moves as it likes: no encoder is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrag.index import FlatIndex
from fastrag.index.base import Hits
from fastrag.nn.retrieved import Retrieved
from fastrag.nn.retriever import Retriever


class Numbers:
    """Passages whose only token is their row."""

    device = torch.device("cpu")

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def lengths(self, stream: str, rows: Tensor | None = None) -> Tensor:
        return torch.ones(self.n if rows is None else len(rows), dtype=torch.int64)

    def gather(self, rows: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        return rows[..., None], torch.ones_like(rows)


class Table(nn.Module):
    """Encode a row as its normalised vector in a table."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return nn.functional.normalize(self.vectors[input_ids[:, 0]], dim=-1)

    def all(self) -> Tensor:
        return nn.functional.normalize(self.vectors.detach(), dim=-1)


def retriever(vectors: Tensor, dtype: str = "float32") -> Retriever:
    """A retriever whose index holds the normalised vectors `[N, D]`."""
    index = FlatIndex(vectors.shape[1], dtype)
    table = Table(vectors)
    index.add(table.all())
    passages: object = Numbers(len(vectors))
    made = Retriever(nn.Identity(), table, index, passages, train_passage_encoder=True)  # type: ignore[arg-type]
    return made.train()


def step_of(made: Retriever, rows: Tensor, questions: Tensor) -> Retrieved:
    """Return the result of a training step that scores the given rows `[B, K]`."""
    fresh = made.passage_encoder(rows.reshape(-1, 1), None).unflatten(0, rows.shape)  # type: ignore[misc]
    stored = made.vectors(rows)
    scores = torch.einsum("bd,bkd->bk", questions, fresh)
    hits = Hits(scores.detach(), rows, stored, made.index.version)
    return Retrieved(questions, hits, scores, scores.log_softmax(1), fresh)
