"""SentenceEncoder: a live SentenceTransformer as an encoder that trains.

Its own modules run (pooling, normalise, dense layers, or any other), with gradients to all of them.
`TextEncoder` reads the folder of a plain one without sentence-transformers being installed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from fastrag import manifests
from fastrag.manifests import integer, one_of, record, text
from fastrag.nn.encoders import Role, check_inputs, prompt_of_role
from fastrag.nn.hub import model_folder
from fastrag.nn.quiet import without_bars

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CONFIG_NAME = "fastrag_sentence_encoder.json"
_FORMAT = "fastrag-sentence-encoder"
_VERSION = 1
_SETTINGS = record(
    {"format": one_of(_FORMAT), "version": integer(_VERSION, _VERSION), "prefix": text()},
    closed=True,
)


class SentenceEncoder(nn.Module):
    """Encode tokenised text to one vector as a SentenceTransformer does, in fp32 or fp64.

    `RagModel` and `Retriever` wrap a `SentenceTransformer` themselves, with the prompt of its role.
    One model under two prompts is two of these around it.

    Args:
        model: a `sentence_transformers.SentenceTransformer`.
        role: "query" or "passage": which of the model's prompts is `prefix`.
        prefix: text put before each question or passage; None: the prompt of the role.

    Raises:
        ValueError: another kind of model, or an unknown role.

    Example:
        >>> from sentence_transformers import SentenceTransformer           # doctest: +SKIP
        >>> encoder = SentenceEncoder(SentenceTransformer("intfloat/e5-small-v2"), "query")
        ...                                                                 # doctest: +SKIP
        >>> encoder(input_ids, attention_mask).shape                        # doctest: +SKIP
        torch.Size([8, 384])
    """

    def __init__(
        self, model: SentenceTransformer, role: Role | None = None, *, prefix: str | None = None
    ) -> None:
        super().__init__()
        if not is_sentence_transformer(model):
            raise ValueError(f"model: expected a SentenceTransformer, got {type(model).__name__}")
        self.model = model
        if prefix is None:
            prefix = prompt_of_role(model.prompts, model.default_prompt_name, role)
        self.prefix = prefix
        self._prompt_length = self._count_prompt() if prefix else 0

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        dim = self.model.get_embedding_dimension()
        if dim is None:
            raise ValueError(
                "model: expected a SentenceTransformer whose last module states its width, got "
                f"{type(self.model[-1]).__name__}"
            )
        return int(dim)

    @property
    def normalize(self) -> bool:
        """Whether the vectors have length 1."""
        return type(self.model[-1]).__name__ == "Normalize" and self.model.truncate_dim is None

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens; None: no limit is known."""
        return self.model.max_seq_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of a batch.

        Args:
            input_ids: `[B, S]` int64, in the vocabulary of `model.tokenizer`, special tokens
                included.
            attention_mask: `[B, S]`, 1 at tokens; None: no padding.

        Returns:
            embeddings `[B, D]`, fp32 or fp64, differentiable.

        Raises:
            ValueError: as `TextEncoder.forward`.
        """
        mask = check_inputs(self.model.transformers_model, input_ids, attention_mask)
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if self._prompt_length:
            features["prompt_length"] = self._prompt_length
        vectors = self.model(features)["sentence_embedding"]
        if self.model.truncate_dim is not None:  # left to `encode` by sentence-transformers
            vectors = vectors[:, : self.model.truncate_dim]
        return vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors

    def serves_as(self, other: SentenceEncoder) -> bool:
        """Whether `other` would give the same vectors: the same model under the same prompt."""
        return self.model is other.model and self.prefix == other.prefix

    def _count_prompt(self) -> int:
        """Return how many tokens the prompt adds in front, which a pooling may leave out."""
        ids = self.model.preprocess([self.prefix])["input_ids"][0].tolist()
        closes = ids[-1] in self.model.tokenizer.all_special_ids
        return len(ids) - int(closes)

    @without_bars()
    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the SentenceTransformer's folder, with `fastrag_sentence_encoder.json` in it."""
        self.model.save_pretrained(os.fspath(path), create_model_card=False)
        self.save_settings(path)

    def save_settings(self, path: str | os.PathLike[str]) -> None:
        """Write only `fastrag_sentence_encoder.json` into a folder; see `with_settings`."""
        settings = {"format": _FORMAT, "version": _VERSION, "prefix": self.prefix}
        manifests.write(Path(path, CONFIG_NAME), settings)

    def with_settings(self, path: str | os.PathLike[str]) -> SentenceEncoder:
        """Return another encoder around the same model, with the settings of a folder."""
        prefix = manifests.read(Path(path, CONFIG_NAME), _SETTINGS)["prefix"]
        return SentenceEncoder(self.model, prefix=prefix)

    @classmethod
    @without_bars()
    def from_pretrained(
        cls, path: str | os.PathLike[str], role: Role | None = None
    ) -> SentenceEncoder:
        """Read a folder of sentence-transformers, with any modules that the library knows.

        Args:
            path: the folder, or a Hub id.
            role: "query" or "passage": which prompt is `prefix`, unless `save_pretrained` wrote it.

        Returns:
            A SentenceEncoder in eval mode.

        Raises:
            ValueError: the folder cannot be read, or sentence-transformers is not installed.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"path: expected sentence-transformers to be installed to read {path}: {error}"
            ) from error
        folder = model_folder("path", path, holding=" with modules.json")
        config, prefix = folder / CONFIG_NAME, None
        if config.is_file():
            prefix = manifests.read(config, _SETTINGS)["prefix"]
        try:
            model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        except Exception as error:  # each module of the folder has its own reader
            raise ValueError(
                f"path: expected a readable folder of sentence-transformers {folder}: {error}"
            ) from error
        return cls(model, role, prefix=prefix).eval()

    def extra_repr(self) -> str:
        return f"prefix={self.prefix!r}"


def is_sentence_transformer(model: object) -> TypeGuard[SentenceTransformer]:
    """Whether `model` is a SentenceTransformer, without importing the library for the answer."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)
