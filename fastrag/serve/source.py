"""The folders that are served, their content, and whether they have been replaced since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fastrag import folders
from fastrag.data.readers import Passage, Question
from fastrag.data.tokenization import QuestionBatch
from fastrag.nn.prefix_cache import keep_prefixes
from fastrag.train.checkpoints import STATE
from fastrag.train.indexing import PASSAGES_FOLDER, load_index
from fastrag.train.models import find_model, load_retriever, load_run, open_retriever
from fastrag.train.record import INDEX_FOLDER

if TYPE_CHECKING:
    from fastrag.index import Index, PassageStore
    from fastrag.nn import RagModel
    from fastrag.nn.retriever import Retriever

# Questions that are encoded in one forward pass, of like length: padding costs as much as text.
_ENCODED_TOGETHER = 64


class Found(NamedTuple):
    """Result of a search for one query.

    Attributes:
        passages: the passages, best first.
        scores: their inner products with the query.
        cut: whether the query was longer than the encoder's window, so that its end was left out.
    """

    passages: list[Passage]
    scores: list[float]
    cut: bool


@dataclass(frozen=True, eq=False)
class Served:
    """An index with its passages, and the models that go with it; it never changes.

    Attributes:
        index: the vectors.
        passages: the passages, in the order of the index.
        retriever: its question encoder encodes queries; None: queries are vectors.
        question_batch: tokenises questions for that encoder.
        model: answers questions; None: there is no generator.
        folder: the folder that the models were read from; None: no model folder.
    """

    index: Index
    passages: PassageStore
    retriever: Retriever | None = None
    question_batch: QuestionBatch | None = None
    model: RagModel | None = None
    folder: Path | None = None

    @torch.no_grad()
    def search(self, queries: Sequence[Any], k: int) -> list[Found]:
        """Return the k nearest passages of each query.

        Args:
            queries: questions, or lists of D floats if there is no encoder.
            k: passages per query.

        Returns:
            One `Found` per query.
        """
        vectors, cut = self._vectors(queries)
        search = self.index.search
        if self.retriever is not None and self.retriever.index is self.index:
            search = self.retriever.nearest  # through the map of a run that still trains
        scores, rows = search(vectors, k)
        found = zip(scores.tolist(), rows.tolist(), cut, strict=True)
        return [
            Found(
                [self.passages.passage(row) for row in each_rows if row >= 0],
                [score for score, row in zip(each_scores, each_rows, strict=True) if row >= 0],
                each_cut,
            )
            for each_scores, each_rows, each_cut in found
        ]

    def is_cut(self, question: str) -> bool:
        """Whether a question is longer than the encoder's window."""
        return self.question_batch is not None and self.question_batch.is_cut(question)

    def _vectors(self, queries: Sequence[Any]) -> tuple[Tensor, list[bool]]:
        if self.retriever is None or self.question_batch is None:
            vectors = torch.from_numpy(np.asarray(queries, dtype=np.float32))
            return vectors, [False] * len(queries)
        longest = self.question_batch.max_question
        order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        cut = [False] * len(queries)
        parts = []
        device = next(self.retriever.parameters()).device
        for start in range(0, len(order), _ENCODED_TOGETHER):
            chosen = order[start : start + _ENCODED_TOGETHER]
            batch = self.question_batch([Question("", queries[i]) for i in chosen])
            for i, n_tokens in zip(chosen, batch["attention_mask"].sum(dim=1), strict=True):
                cut[i] = n_tokens == longest and self.question_batch.is_cut(queries[i])
            batch = {name: ids.to(device) for name, ids in batch.items()}
            parts.append(self.retriever.encode_questions(**batch))
        place = torch.tensor(order).argsort()
        return torch.cat(parts)[place.to(device)], cut


@dataclass(frozen=True)
class Source:
    """The folders to serve; `fastrag serve` has an option for each field.

    Attributes:
        model: model folder, run folder or checkpoint.
        encoder: folder of a question encoder, in place of a model.
        index: folder from `fastrag index build`; None: the model's own.
        retrieval_only: leave the model's generator out.
        device: where the models and the index go.
        prefix_cache_mib: memory for what the generator has read of passages; None: nothing is kept.

    Raises:
        ValueError: a model together with an encoder, neither a model nor an index, or a prefix
            cache without a generator.
    """

    model: str | None = None
    encoder: str | None = None
    index: str | None = None
    retrieval_only: bool = False
    device: str = "cpu"
    prefix_cache_mib: int | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.encoder is not None:
            raise ValueError("encoder: expected none with a model, which has its own, got both")
        if self.model is None and self.index is None:
            raise ValueError(
                "index: expected a folder from `fastrag index build` where no model is given, "
                "got none"
            )
        if self.model is None and self.retrieval_only:
            raise ValueError("retrieval_only: expected a model to leave the generator out of")
        if self.prefix_cache_mib is not None and (self.model is None or self.retrieval_only):
            raise ValueError("prefix_cache_mib: expected a model with its generator, got none")

    def load(self) -> Served:
        """Read everything.

        Raises:
            ValueError: a folder cannot be read, or its parts do not belong together.
        """
        if self.model is None and self.encoder is None:
            index, passages = load_index(str(self.index))
            return Served(index.to(self.device), passages)
        folder = None if self.model is None else find_model(self.model).absolute()
        if folder is not None and not self.retrieval_only:
            model = load_run(folder, self.index)
            keep_prefixes(model, self.prefix_cache_mib)
            model.to(self.device)
            model.index.to(self.device)
            model.passages.to(self.device)
            batch = model.processor.question_batch
            batch.warns = False  # each answer says so itself
            return Served(model.index, model.passages, model.retriever, batch, model, folder)
        if folder is not None:
            dense = load_retriever(folder, self.index)
        else:
            dense = open_retriever(str(self.encoder), str(self.index))
        retriever = dense.retriever.to(self.device)
        retriever.index.to(self.device)
        batch = dense.question_batch
        batch.warns = False
        return Served(retriever.index, retriever.passages, retriever, batch, folder=folder)

    def reload(self, served: Served, changed: set[str]) -> Served:
        """Read the folders that were replaced.

        Args:
            served: the present content.
            changed: names of the folders that changed, of those in `identities`.

        Returns:
            The new content. If only the index changed, it has the same models.

        Raises:
            ValueError: a folder cannot be read, or the index does not fit the models.
        """
        if "model" in changed:
            fresh = self.load()
        else:
            index, passages = load_index(cast(Path, _index_root(served)))
            index.to(self.device)
            fresh = replace(served, index=index, passages=passages)
            if served.model is not None:
                served.model.processor.check(passages)
            elif served.question_batch is not None:
                passages.check_tokenizer("encoder", served.question_batch.tokenizer)
        if fresh.index.dim != served.index.dim:
            raise ValueError(
                f"index: expected vectors of width {served.index.dim} as before, got "
                f"{fresh.index.dim}"
            )
        # The first search reads the pages of the index and may compute codes: no client waits.
        fresh.index.search(torch.ones(8, fresh.index.dim, device=self.device), 1)
        return fresh

    def identities(self, served: Served) -> dict[str, Any]:
        """Return the identity of what is served from each folder that may be replaced, by name.

        The identity of a folder that is missing, as it is between the two renames of a replacement,
        is None.
        """
        found: dict[str, Any] = {} if self.model is None else {"model": self._model(served)}
        root = _index_root(served)
        if root is not None and root != served.folder:
            parts = {"index": INDEX_FOLDER, "passages": PASSAGES_FOLDER}
            found |= {name: folders.identity(root / part) for name, part in parts.items()}
        return found

    def _model(self, served: Served) -> Any:
        """Return the identity of the model folder, which for a run may be another one by now."""
        folder = served.folder
        if Path(str(self.model)).is_dir():  # else an id of the Hub, which is not asked again
            try:
                folder = find_model(str(self.model)).absolute()
            except ValueError:
                return None
        if folder is None or (folder / STATE).is_file():
            return folder  # a checkpoint never changes
        identity = folders.identity(folder)
        return None if identity is None else (folder, identity)


def _index_root(served: Served) -> Path | None:
    """Return the folder that holds index and passages; None if no folder holds this index."""
    return None if served.index.source is None else served.index.source.parent
