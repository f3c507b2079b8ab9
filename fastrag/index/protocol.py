"""What `RagModel` and the trainer need of an index: any object that has it will do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from fastrag.index.inputs import Vectors


@runtime_checkable
class Index(Protocol):
    """Vectors of passages by row; `FlatIndex` and `FaissIndex` are two.

    Rows are numbered as they are added and never shift. Missing hits have row -1 and score -inf.
    Methods are described at `FlatIndex`.
    """

    dim: int

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where `index_emb` is, or else where it is searched; what `to` sets."""

    @property
    def version(self) -> int:
        """Goes up with each change."""

    @property
    def source(self) -> Path | None:
        """The folder that holds exactly this content."""

    @property
    def index_emb(self) -> Tensor | None:
        """The matrix `[N, D]` to gather from, or `None` where only `vectors` knows them."""

    @property
    def scale(self) -> Tensor | None:
        """`[D]` where `index_emb` holds int8 codes."""

    @property
    def offset(self) -> Tensor | None:
        """`[D]` where `index_emb` holds int8 codes."""

    def add(self, vectors: Vectors | Iterable[Vectors]) -> range: ...

    def update(self, rows: Tensor, vectors: Vectors) -> None: ...

    def remove(self, rows: Tensor) -> None: ...

    def replace(self, vectors: Vectors | Iterable[Vectors]) -> None: ...

    def search(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def vectors(self, rows: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str) -> Self: ...

    def checksum(self) -> str: ...

    def save(self, dir: str | os.PathLike[str]) -> None: ...

    @classmethod
    def load(
        cls,
        dir: str | os.PathLike[str],
        mmap: bool = True,
        verify: bool = False,
        device: torch.device | str = "cpu",
    ) -> Any: ...
