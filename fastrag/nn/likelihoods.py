"""LikelihoodCache: log p(y|x,z) of a generator that does not train, read once for each passage.

    model.generator.requires_grad_(False)
    model.reader.likelihoods = LikelihoodCache("runs/logp")
    model(**batch).loss.backward()  # the encoders alone, once all contexts are there

Objectives that train the retriever alone need log p(y_t|x,z,y_<t) of each retrieved passage and no
gradient to the generator. It is a constant of the generator, the context and the answer.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastrag.messages import clipped
from fastrag.nn.loss import Pairs, RagLoss
from fastrag.nn.pair_store import KEY_BYTES, PairStore
from fastrag.nn.weights import weights_checksum, weights_identity

if TYPE_CHECKING:
    from fastrag.data import Question
    from fastrag.data.processor import Contexts
    from fastrag.nn.model import RagModel
    from fastrag.nn.reader import Reader


class LikelihoodCache:
    """Keep the log-probability of each answer token in each context that was read.

    A key is made of the token ids of context and answer, so questions, template and passages may
    change: what is found is right. Contexts are read in eval mode. A folder belongs to one
    generator, with its adapters and under one autocast dtype, which is compared when the first
    contexts are asked for and whenever weights may have changed.

    Args:
        dir: the folder, opened when the first contexts are asked for; see `PairStore`.
        max_bytes: limit of its files.
        rebuild: delete what another generator has made, instead of refusing it.

    Attributes:
        hits: contexts that were found.
        misses: contexts that were read.
        seconds: time that reading took.

    Example:
        >>> model.reader.likelihoods = LikelihoodCache("runs/logp")        # doctest: +SKIP
    """

    def __init__(
        self, dir: str | os.PathLike[str], max_bytes: int = 1 << 30, *, rebuild: bool = False
    ) -> None:
        self.dir = Path(dir)
        self.max_bytes = max_bytes
        self.rebuild = rebuild
        self.hits = self.misses = 0
        self.seconds = 0.0
        self.store: PairStore | None = None
        self._identity: Any = None  # of the weights that were last found to fit
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copy of a model reads and writes the same folder

    def close(self) -> None:
        """Close the folder, so that another process may open it; the next call opens it again."""
        if self.store is not None:
            self.store.close()
        self.store = self._identity = None

    @property
    def saved_seconds(self) -> float:
        """Time that reading the contexts that were found would have taken, at the others' speed."""
        return self.hits * self.seconds / self.misses if self.misses else 0.0

    def summary(self) -> dict[str, float]:
        """Return `likelihood_hits`, the share of contexts that were found, and the time saved.

        Example:
            >>> LikelihoodCache("runs/logp").summary()
            {}
        """
        n = self.hits + self.misses
        if not n:
            return {}
        return {"likelihood_hits": self.hits / n, "likelihood_saved_s": self.saved_seconds}

    def pairs(
        self, reader: Reader, loss_fn: RagLoss, contexts: Contexts, labels: Tensor, n_docs: int
    ) -> Pairs:
        """Return what `Reader.score` returns, reading only contexts that are not there.

        Args:
            reader: reads contexts.
            loss_fn: the loss that takes them; not smoothed.
            contexts: `[B*K, L]`.
            labels: `[B, T]` int64, padded with -100.
            n_docs: K.

        Raises:
            ValueError: a loss with label smoothing; the generator trains, or is not the one that
                the folder belongs to; or as `PairStore`.
        """
        if loss_fn.label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 with a generator that does not train, got "
                f"{loss_fn.label_smoothing}"
            )
        store = self._opened(reader, contexts.ids.device)
        counted = (labels != loss_fn.ignore_index).repeat_interleave(n_docs, dim=0)
        keys = _keys(contexts, labels, loss_fn.ignore_index, n_docs)
        found = {key: store.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:
            rows = torch.tensor(list(new.values()), device=labels.device)
            began = time.perf_counter()
            ids, mask, answers = contexts.ids[rows], contexts.mask[rows], labels[rows // n_docs]
            known = reader.score(loss_fn, ids, mask, answers)
            read = known.token_logp.squeeze(1).float().cpu()
            self.seconds += time.perf_counter() - began
            there = counted[rows].cpu()
            values = [read[i, there[i]].numpy() for i in range(len(new))]
            found |= dict(zip(new, values, strict=True))
            self._put(store, list(new), values)
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        logp = torch.zeros(counted.shape)
        logp[counted.cpu()] = torch.from_numpy(np.concatenate([found[key] for key in keys]))
        logp = logp.to(labels.device).unflatten(0, (-1, n_docs))
        return Pairs(logp if loss_fn.marginal == "token" else logp.sum(2, keepdim=True), logp)

    def fill(
        self,
        model: RagModel,
        questions: Sequence[Question],
        rows: Tensor,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> None:
        """Read contexts ahead of training, many at a time.

        On a CPU, contexts of like length are read together (`Reader.score`); a kill loses those of
        one batch.

        Args:
            model: its processor makes contexts of its passages, and its reader reads them.
            questions: questions with answers, the first of which is taken.
            rows: the passages of each, `[Q, K]` int64, such as `model.retrieve(...)` finds.
            batch_size: questions per batch.
            progress: show a progress bar.

        Raises:
            ValueError: as `pairs`; a question has no answer, or `rows` belongs to another number of
                questions.

        Example:
            >>> cache.fill(model, questions, rows)                          # doctest: +SKIP
        """
        if rows.dim() != 2 or len(rows) != len(questions):
            raise ValueError(
                f"rows: expected [{len(questions)}, K], one line per question, got "
                f"{list(rows.shape)}"
            )
        with tqdm(total=rows.numel(), desc="read", unit=" contexts", disable=not progress) as bar:
            for start in range(0, len(questions), batch_size):
                part = slice(start, start + batch_size)
                batch = model.processor.collate(questions[part])
                batch = {name: each.to(model.device) for name, each in batch.items()}
                given = batch["prompt_ids"], batch["prompt_mask"]
                contexts = model.contexts(rows[part].to(model.device), *given)
                n_docs = rows.shape[1]
                self.pairs(model.reader, model.loss_fn, contexts, batch["labels"], n_docs)
                bar.update(rows[part].numel())

    def _opened(self, reader: Reader, device: torch.device) -> PairStore:
        """Return the store, after comparing the generator with it."""
        generator = reader.generator
        if any(each.requires_grad for each in generator.parameters()):
            raise ValueError(
                "likelihoods: expected a generator that does not train, got parameters with "
                "requires_grad"
            )
        identity = weights_identity(generator, device)
        if self.store is None or identity != self._identity:
            made_by = weights_checksum(generator, device)
            if self.store is None:
                self.store = PairStore(self.dir, made_by, self.max_bytes, rebuild=self.rebuild)
            elif made_by != self.store.made_by:
                raise ValueError(
                    f"likelihoods: expected the generator {self.store.made_by} of {self.dir}, got "
                    f"{made_by}: its weights, adapters or autocast dtype have changed"
                )
            self._identity = identity
        return self.store

    def _put(self, store: PairStore, keys: list[bytes], values: list[Any]) -> None:
        try:
            store.put(keys, values)
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"likelihoods: {self.dir} takes no more, so what is not there is read each "
                    f"time: {clipped(error.strerror or error)}",
                    stacklevel=5,
                )
            self._warned = True


def _keys(contexts: Contexts, labels: Tensor, ignore_index: int, n_docs: int) -> list[bytes]:
    """Return a digest of the tokens of each context and of its answer."""
    ids, mask = contexts.ids.cpu().numpy(), contexts.mask.cpu().numpy().astype(bool)
    answers = [each[each != ignore_index].tobytes() for each in labels.cpu().numpy()]
    keys = []
    for i, (row, there) in enumerate(zip(ids, mask, strict=True)):
        tokens = row[there].tobytes()
        made = hashlib.blake2b(len(tokens).to_bytes(8, "little"), digest_size=KEY_BYTES)
        made.update(tokens)
        made.update(answers[i // n_docs])
        keys.append(made.digest())
    return keys
