"""IndexReference: the identity of an index, kept in a state dict in place of its vectors.

    state = model.state_dict()
    state["retriever._extra_state"]     # JSON as [n] uint8: a few hundred bytes for any index

It is a tensor because safetensors, which Trainer and accelerate write, holds nothing else.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrag import manifests
from fastrag.index.base import Index
from fastrag.manifests import integer, optional, record, text

FIELDS = record(
    {
        "dim": integer(1),
        "n_passages": integer(),
        "checksum": optional(text()),
        "source": optional(text()),
    },
    {"version": integer()},  # folders from before state dicts had a reference state none
    closed=True,
)


class IndexReference(NamedTuple):
    """The identity of an index.

    Attributes:
        dim: width D of its vectors.
        n_passages: number of rows.
        version: its version.
        checksum: digits that equal content shares; None for an empty index and for a kind without
            checksums.
        source: folder that holds this content; None if none does.

    Example:
        >>> from fastrag import FlatIndex
        >>> from fastrag.nn.index_reference import IndexReference
        >>> reference = IndexReference.of(FlatIndex(4))
        >>> IndexReference.unpack(reference.pack()) == reference
        True
    """

    dim: int
    n_passages: int
    version: int
    checksum: str | None
    source: str | None

    @classmethod
    def of(cls, index: Index) -> IndexReference:
        """Return the reference of an index."""
        named = len(index) > 0 and type(index).checksum is not Index.checksum
        return cls(
            index.dim,
            len(index),
            int(index.version),
            index.checksum() if named else None,
            None if index.source is None else str(index.source),
        )

    def pack(self) -> Tensor:
        """Return the reference as `[n]` uint8."""
        return torch.tensor(list(json.dumps(self._asdict()).encode()), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: Tensor) -> IndexReference:
        """Read what `pack` returned.

        Raises:
            ValueError: it is something else.
        """
        try:
            fields = json.loads(bytes(packed.tolist()))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"index reference: expected JSON as [n] uint8: {error}") from error
        manifests.verify(Path("index reference"), fields, FIELDS)
        return cls.of_record(fields)

    @classmethod
    def of_record(cls, fields: dict[str, Any]) -> IndexReference:
        """Return the reference that a record of `FIELDS` holds."""
        return cls(**{"version": 0, **fields})

    def check(self, index: Index, holder: str = "the state dict") -> None:
        """Compare a saved reference with the index that the saved weights will search.

        Vectors of another width are an error. Other content gets a warning, because the caller may
        be about to encode the passages again, or mean to use the weights with other passages.

        Args:
            index: the present index.
            holder: what holds the reference, for messages.

        Raises:
            ValueError: the index has vectors of another width.
        """
        if index.dim != self.dim:
            raise ValueError(
                f"index: expected vectors of width {self.dim}, as the index of {holder} has, got "
                f"{index.dim}"
            )
        present = IndexReference.of(index)
        if self.n_passages and present.n_passages and self.checksum != present.checksum:
            warnings.warn(
                f"index: {holder} was saved with {self}, the model has {present}: load that "
                "index, or encode the passages again with refresh_index()",
                stacklevel=2,
            )

    def __str__(self) -> str:
        content = "no checksum" if self.checksum is None else f"checksum {self.checksum}"
        return (
            f"{self.n_passages} passages in version {self.version} ({content}, "
            f"{'in no folder' if self.source is None else self.source})"
        )
