"""LikelihoodCache: log p(y|x,z) of a generator that does not train, read once for each passage.

    with LikelihoodCache("runs/logp", model.reader) as cache:
        model.reader.likelihoods = cache
        ...                             # a training step costs the encoders alone once it is warm

Objectives that train the retriever alone (replug, or pdist and emdr2 with a frozen generator) need
log p(y_t|x,z,y_<t) of each retrieved passage and no gradient to the generator. It is a constant of
the generator, the context and the answer.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from fastrag.messages import clipped
from fastrag.nn.loss import Pairs, RagLoss
from fastrag.nn.pair_store import KEY_BYTES, PairStore
from fastrag.nn.weights import weights_checksum, weights_identity

if TYPE_CHECKING:
    from fastrag.data.processor import Contexts
    from fastrag.nn.reader import Reader


class LikelihoodCache:
    """Keep the log-probability of each answer token in each context that was read.

    A key is made of the token ids of context and answer, so questions, template and passages may
    change: what is found is right. Contexts are read in eval mode. A folder belongs to one
    generator, with its adapters and under one autocast dtype, whose weights it is checked against
    when it is opened and whenever they may have changed.

    Args:
        dir: the folder, see `PairStore`.
        reader: reads contexts that are not there.
        max_bytes: limit of the files.
        rebuild: delete what another generator has made, instead of refusing it.

    Attributes:
        store: the `PairStore`.
        hits: contexts that were found.
        misses: contexts that were read.
        seconds: time that reading took.

    Raises:
        ValueError: as `PairStore`.

    Example:
        >>> model.reader.likelihoods = LikelihoodCache("runs/logp", model.reader)  # doctest: +SKIP
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        reader: Reader,
        max_bytes: int = 1 << 30,
        *,
        rebuild: bool = False,
    ) -> None:
        self.hits = self.misses = 0
        self.seconds = 0.0
        self._reader = reader
        device = next(reader.parameters()).device
        self._made_by = weights_checksum(reader.generator, device)
        self._identity = weights_identity(reader.generator, device)
        self._warned = False
        self.store = PairStore(dir, self._made_by, max_bytes, rebuild=rebuild)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder, so that another process may open it."""
        self.store.close()

    @property
    def saved_seconds(self) -> float:
        """Time that reading the contexts that were found would have taken, from the others'."""
        return self.hits * self.seconds / self.misses if self.misses else 0.0

    def pairs(self, loss_fn: RagLoss, contexts: Contexts, labels: Tensor, n_docs: int) -> Pairs:
        """Return what `Reader.score` returns, reading only contexts that are not there.

        Args:
            loss_fn: the loss that takes them; not smoothed.
            contexts: `[B*K, L]`.
            labels: `[B, T]` int64, padded with -100.
            n_docs: K.

        Raises:
            ValueError: a loss with label smoothing; the generator trains, or its weights are no
                longer those that the folder belongs to.
        """
        if loss_fn.label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 with a generator that does not train, got "
                f"{loss_fn.label_smoothing}"
            )
        self._check_generator(contexts.ids.device)
        counted = (labels != loss_fn.ignore_index).repeat_interleave(n_docs, dim=0)
        keys = _keys(contexts, labels, loss_fn.ignore_index, n_docs)
        found = {key: self.store.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:
            found |= self._read(loss_fn, contexts, labels, counted, n_docs, new)
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        logp = torch.zeros(counted.shape)
        logp[counted.cpu()] = torch.from_numpy(np.concatenate([found[key] for key in keys]))
        logp = logp.to(labels.device).unflatten(0, (-1, n_docs))
        evidence = logp if loss_fn.marginal == "token" else logp.sum(2, keepdim=True)
        return Pairs(evidence, logp)

    def _check_generator(self, device: torch.device) -> None:
        generator = self._reader.generator
        if any(each.requires_grad for each in generator.parameters()):
            raise ValueError(
                "likelihoods: expected a generator that does not train, got parameters with "
                "requires_grad"
            )
        identity = weights_identity(generator, device)
        if identity == self._identity:
            return
        made_by = weights_checksum(generator, device)
        if made_by != self._made_by:
            raise ValueError(
                f"likelihoods: expected the generator {self._made_by} of {self.store.dir}, got "
                f"{made_by}: its weights, adapters or autocast dtype have changed"
            )
        self._identity = identity

    def _read(
        self,
        loss_fn: RagLoss,
        contexts: Contexts,
        labels: Tensor,
        counted: Tensor,
        n_docs: int,
        new: dict[bytes, int],
    ) -> dict[bytes, Any]:
        """Read the contexts `new` and store them."""
        began = time.perf_counter()
        rows = torch.tensor(list(new.values()), device=labels.device)
        answers = labels[rows // n_docs]
        known = self._reader.score(loss_fn, contexts.ids[rows], contexts.mask[rows], answers)
        logp, there = known.token_logp.squeeze(1).float().cpu(), counted[rows].cpu()
        read = {key: logp[i, there[i]].numpy() for i, key in enumerate(new)}
        self.seconds += time.perf_counter() - began
        try:
            self.store.put(list(read), list(read.values()))
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"likelihoods: {self.store.dir} takes no more, so what is not there is read "
                    f"each time: {clipped(error.strerror or error)}",
                    stacklevel=5,
                )
            self._warned = True
        return read


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
