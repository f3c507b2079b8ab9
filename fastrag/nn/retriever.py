"""Retriever: question encoder, passage encoder and index as one module with gradients.

    retrieved = retriever(input_ids, attention_mask)
    retrieved.doc_scores[b, k] = q_b . d_bk / tau

A step sees one version of the index. The vectors of the K passages are read together with the
search that found them, so a later change of the index, from any thread, moves neither the scores
nor their gradient.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrag import functional
from fastrag.freshness.maps import FoldedVectors, VectorMap
from fastrag.index.base import Hits, Index
from fastrag.index.encoding import (
    EncodedBlocks,
    PassageEncoder,
    encode_passages,
    encoder_inputs,
)
from fastrag.nn.arguments import check_count, check_numbers, explain_failure, require_finite
from fastrag.nn.generators import evaluating
from fastrag.nn.index_reference import IndexReference
from fastrag.nn.retrieved import (
    FLAT_PRIOR,
    Retrieved,
    explore,
    included,
    is_flat,
    joined,
    with_null,
)
from fastrag.nn.sentence_encoder import SentenceEncoder, is_sentence_transformer
from fastrag.ops import checks
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index import PassageStore

NORMALIZED_TAU = 0.05  # cosines lie in [-1, 1]; without it the prior over K stays near uniform
RESCORE_BATCH = 64  # candidates per pass of the encoder, which bounds the memory of a rescoring


class Retriever(nn.Module):
    """Find the K passages of each question and score them with gradients.

        q = question_encoder(x);  z_1..z_K = the K passages of largest inner product with q
        p(z_k|x) = softmax_k(q . d_k / tau)                    (Lewis et al. 2020, sec. 2.2)

    Args:
        question_encoder: module of `(input_ids [B, S], attention_mask) -> [B, D]`, for example a
            `TextEncoder`; or a `SentenceTransformer`, which becomes a `SentenceEncoder`.
        passage_encoder: the same for passages; may be the very same module; None if the index is
            never rebuilt.
        index: vectors of the passages, in the order of `passages`; may still be empty, see
            `refresh_index`.
        passages: the passages as token ids.
        n_docs: K, passages per question.
        tau: temperature of the prior; None: 0.05 if both encoders normalise, else 1.
        learn_tau: train log tau too, starting from `tau`.
        train_passage_encoder: encode the K passages of a training step again, with gradient.
            Without it, the parameters of the passage encoder are set to `requires_grad=False`,
            except those that the question encoder also has.
        explore: in training, m of the K passages are drawn without replacement from the softened
            prior softmax(s / explore_tau) over the candidates after the first K - m.
        explore_pool: number of candidates; None: all passages.
        explore_tau: softening of that prior; larger is more uniform.
        rescore: L, at least K: the L nearest stored vectors of each question are encoded again,
            without gradient, before the best K are chosen by their fresh scores; None: the K
            nearest stored vectors are chosen.
        passage_batch: passages per forward pass when those of a training step are encoded with
            gradient. The activations of each pass are computed once more in backward, so memory
            does not grow with K; None: all at once, and no recomputation.
        null_passage: add to the K passages of each question one without text, so that an answer
            need not be attributed to a passage that does not contain it. Its score is the mean of
            the K scores plus a learned number.
        null_score: start of that number.
        posterior_encoder: encoder of question and answer together, whose softmax over the passages
            is q(z|x,y), the proposals of the objective jsa. It trains with the rest; in training,
            its K nearest passages are found as well.
        move_index: move index and passages along when the module moves to another device.

    Attributes:
        vector_map: map from stored vectors to present ones through which the index is searched;
            None: stored vectors are searched as they are. `IndexRefresher` fits it.

    Raises:
        ValueError: index and passages of different length or width, numbers out of range.

    Example:
        >>> retriever = Retriever(encoder, None, index, passages)      # doctest: +SKIP
        >>> retriever(input_ids, attention_mask).hits.rows.shape       # doctest: +SKIP
        torch.Size([8, 5])
    """

    log_tau: nn.Parameter | None
    null_score: nn.Parameter | None

    def __init__(
        self,
        question_encoder: nn.Module,
        passage_encoder: nn.Module | None,
        index: Index,
        passages: PassageStore,
        *,
        n_docs: int = 5,
        tau: float | None = None,
        learn_tau: bool = False,
        train_passage_encoder: bool = False,
        explore: int = 0,
        explore_pool: int | None = 256,
        explore_tau: float = 1.0,
        rescore: int | None = None,
        passage_batch: int | None = None,
        null_passage: bool = False,
        null_score: float = 0.0,
        posterior_encoder: nn.Module | None = None,
        move_index: bool = True,
    ) -> None:
        super().__init__()
        self.question_encoder = question_encoder
        self.passage_encoder = passage_encoder
        self.posterior_encoder = posterior_encoder
        self.index = index
        self.passages = passages
        if tau is None:
            both = (self.question_encoder, self.passage_encoder or self.question_encoder)
            normalized = all(getattr(encoder, "normalize", False) for encoder in both)
            tau = NORMALIZED_TAU if normalized else 1.0
        check_numbers(n_docs, tau, explore, explore_pool, explore_tau)
        for name, value in (("rescore", rescore), ("passage_batch", passage_batch)):
            if value is not None:
                check_count(name, value)
        if train_passage_encoder and passage_encoder is None:
            raise ValueError("passage_encoder: expected a module to train, got None")
        self.n_docs = n_docs
        self._tau = float(tau)
        log_tau = nn.Parameter(torch.tensor(math.log(tau))) if learn_tau else None
        self.register_parameter("log_tau", log_tau)
        learned = nn.Parameter(torch.tensor(float(null_score))) if null_passage else None
        self.register_parameter("null_score", learned)
        self.train_passage_encoder = train_passage_encoder
        self.explore = explore
        self.explore_pool = explore_pool
        self.explore_tau = explore_tau
        self.rescore = rescore
        self.passage_batch = passage_batch
        self.move_index = move_index
        self.vector_map: VectorMap | None = None
        self.search_seconds = 0.0  # wall time of the last search on the host
        self._prior_seen = False
        if self.passage_encoder is not None and not train_passage_encoder:
            _freeze_unshared(self.passage_encoder, self.question_encoder)
        if len(index):
            self._check_index()
        if len(passages) == 0:
            raise ValueError("passages: expected at least one passage, got an empty store")
        self.register_load_state_dict_pre_hook(_allow_no_reference)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("question_encoder", "passage_encoder", "posterior_encoder"):
            value = self._as_encoder(name, value)
        elif name == "index":
            _require("index", value, "search", "an Index, such as FlatIndex or Index.load gives")
            self._check_width(value)
            if value is not self.__dict__.get("index"):
                self.vector_map = None  # it was fitted to the index before
        elif name == "passages":
            _require("passages", value, "gather", "a PassageStore")
        super().__setattr__(name, value)

    @property
    def tau(self) -> float | Tensor:
        """Temperature of the prior; a tensor with gradient if it is learned."""
        return self._tau if self.log_tau is None else self.log_tau.exp()

    @property
    def tau_value(self) -> float:
        """The temperature of the prior as a number."""
        return self._tau if self.log_tau is None else math.exp(self.log_tau.item())

    @property
    def null_passage(self) -> bool:
        """Whether each question also has a passage without text."""
        return self.null_score is not None

    def set_tau(self, tau: float) -> None:
        """Set the temperature of the prior.

        Raises:
            ValueError: it is learned, or `tau` is not a finite number > 0.
        """
        if self.log_tau is not None:
            raise ValueError(f"tau: expected a temperature that is not learned, got {tau}")
        check_numbers(self.n_docs, tau, self.explore, self.explore_pool, self.explore_tau)
        self._tau = float(tau)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        n_docs: int | None = None,
        *,
        include: Tensor | None = None,
        exclude: Tensor | None = None,
        posterior_ids: Tensor | None = None,
        posterior_mask: Tensor | None = None,
    ) -> Retrieved:
        """Find K passages per question and score them.

        Args:
            input_ids: questions in the question encoder's vocabulary, `[B, S]` int64.
            attention_mask: `[B, S]`, 1 at tokens.
            rows: use these passages instead of searching, `[B, K]` int64, -1 = missing.
            n_docs: K of this call; None: the retriever's.
            include: rows that have to be among the K, `[B, E]` int64, -1 for none. They come first
                and take the places of the last ones found.
            exclude: rows that must not be found, `[B, E']` int64, -1 for none.
            posterior_ids: questions with answers for the posterior encoder, `[B, S']` int64. Its K
                nearest passages are found, and K others of the question.
            posterior_mask: `[B, S']`, 1 at tokens.

        Returns:
            `Retrieved`. With a null passage, it is one column more, the last, with row -1.

        Raises:
            ValueError: shapes disagree, a question or passage without a finite vector (named; on a
                GPU, where looking would cost a wait, its scores are NaN instead), an empty index.
        """
        query_emb = self.encode_questions(input_ids, attention_mask)
        hits: Hits | None = None
        candidates: Hits | None = None
        posterior_emb: Tensor | None = None
        if rows is None:
            k = self.n_docs if n_docs is None else n_docs
            if posterior_ids is not None or (self.posterior_encoder is not None and self.training):
                posterior_emb = self._encode_answered(posterior_ids, posterior_mask)
                nearest = self.nearest(posterior_emb.detach(), k, exclude).rows
                include, k = joined(include, nearest), 2 * k
            hits, candidates = self._find(query_emb.detach(), k, include, exclude)
            rows, stored, version = hits.rows, cast(Tensor, hits.vectors), hits.version
        else:
            if not (include is exclude is posterior_ids is None):
                raise ValueError(
                    "include, exclude, posterior_ids: expected None with rows, which are all chosen"
                )
            stored, version = self._take(rows, query_emb)
        fresh = self.train_passage_encoder and self.training
        passage_emb = self.encode_rows(rows) if fresh else stored
        with stage("score"):
            doc_scores, log_prior = functional.doc_scores(
                query_emb, passage_emb, rows=rows, tau=self.tau, return_log_prior=True
            )
        if hits is None:
            hits = Hits((doc_scores * self.tau).detach(), rows, stored, version)
        if self.training and not self._prior_seen:
            self._warn_if_flat(doc_scores.detach())
        again = passage_emb if fresh else None
        found = Retrieved(query_emb, hits, doc_scores, log_prior, again, candidates)
        if posterior_emb is not None:
            posterior = functional.doc_scores(posterior_emb, passage_emb, rows=rows, tau=self.tau)
            found = found._replace(posterior_scores=posterior)
        return found if self.null_score is None else with_null(found, self.null_score)

    @torch.no_grad()
    def search(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, k: int | None = None
    ) -> Hits:
        """Return the k nearest passages of each question, in eval mode and without exploring.

        Args:
            input_ids: `[B, S]` int64.
            attention_mask: `[B, S]`, 1 at tokens.
            k: passages per question; None: `n_docs`.

        Returns:
            `Hits`; its scores are inner products, not divided by tau.

        Raises:
            ValueError: shapes or dtypes disagree, k below 1, a question without a finite vector, an
                empty index.
        """
        k = self.n_docs if k is None else k
        check_count("k", k)
        with evaluating(self.question_encoder):
            query_emb = self.encode_questions(input_ids, attention_mask)
        if self.rescore is None:
            return self.nearest(query_emb, k)
        hits = self.rescored(query_emb, max(k, self.rescore))
        return Hits(hits.scores[:, :k], hits.rows[:, :k], None, hits.version)

    @torch.no_grad()
    def rescored(self, query_emb: Tensor, n: int, exclude: Tensor | None = None) -> Hits:
        """Return the n nearest passages by stored vectors, in the order of their fresh scores.

            s_bl = q_b . d_bl,  d = passage encoder in eval mode, each passage once

        Memory: the passages of one batch of the encoder, and B n D numbers.

        Args:
            query_emb: `[B, D]`.
            n: passages per question.
            exclude: as for `nearest`.

        Returns:
            `Hits` with fresh vectors and scores.

        Raises:
            ValueError: there is no passage encoder, or as `nearest`.
        """
        encoder = self._passage_encoder()
        hits = self.nearest(query_emb, n, exclude)
        there = hits.rows >= 0
        unique, where = hits.rows.clamp(min=0).unique(return_inverse=True)
        with stage("encode_passages"):
            made = encode_passages(
                encoder, self.passages, RESCORE_BATCH, rows=unique, dim=self.index.dim
            )
        fresh = made.to(query_emb.device)[where].masked_fill(~there[..., None], 0.0)
        scores = torch.einsum("bd,bnd->bn", query_emb.float(), fresh)
        scores = scores.masked_fill(~there, -math.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return Hits(scores, hits.rows, fresh, hits.version).columns(order)

    def nearest(
        self, query_emb: Tensor, k: int, exclude: Tensor | None = None, *, vectors: bool = False
    ) -> Hits:
        """Return the k nearest passages of question vectors, without gradient.

        Args:
            query_emb: `[B, D]`.
            k: passages per question.
            exclude: rows that must not be found, `[B, E]` int64, -1 for none.
            vectors: also return the vectors of the hits.

        Returns:
            `Hits`. If a `vector_map` is set, scores and vectors are those of mapped passages.

        Raises:
            ValueError: as `Index.search`, or an empty index.
        """
        self._check_index()
        with stage("search"):
            if self.vector_map is None:
                return self.index.search(query_emb, k, exclude, vectors=vectors)
            query, shift = self.vector_map.questions(query_emb)
            hits = self.index.search(query, k, exclude, vectors=vectors)
            stored = hits.vectors
            mapped = None if stored is None else self._mapped(stored, hits.rows)
            return Hits(hits.scores + shift[:, None], hits.rows, mapped, hits.version)

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors of rows `[...]` as `nearest` sees them, `[..., D]` float32."""
        return self._mapped(self.index.vectors(rows), rows)

    def encode_questions(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode questions `[B, S]` with gradient: `[B, D]`."""
        checks.check_tensor("input_ids", input_ids)
        if input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected at least one question, got {checks.show(input_ids)}"
            )
        with stage("encode_questions"):
            try:
                query_emb = self.question_encoder(input_ids, attention_mask)
            except RuntimeError as error:
                explain_failure("question_encoder", self.question_encoder, input_ids, error)
                raise
        require_finite(
            query_emb, "question_encoder: expected finite vectors, got NaN or inf for example"
        )
        return query_emb

    def _encode_answered(self, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """Encode questions with their answers `[B, S']` with gradient: `[B, D]`."""
        if self.posterior_encoder is None:
            raise ValueError(
                "posterior_ids: expected None without a posterior_encoder to read them"
            )
        if ids is None:
            raise ValueError(
                "posterior_ids: expected questions with answers for the posterior encoder, as "
                "RagCollator(posterior=True) makes them, got None"
            )
        with stage("encode_posterior"):
            posterior_emb: Tensor = self.posterior_encoder(ids, mask)
        return posterior_emb

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Encode the passages of `rows` `[B, K]` with gradient, each once: `[B, K, D]`."""
        encoder = self._passage_encoder()
        unique, where = rows.clamp(min=0).unique(return_inverse=True)
        with stage("encode_passages"):
            ids, mask = encoder_inputs(self.passages, unique, rows.device)
            try:
                vectors = self._encoded(encoder, ids, mask)
            except RuntimeError as error:
                explain_failure("passage_encoder", encoder, ids, error)
                raise
        require_finite(
            vectors, "passage_encoder: expected finite vectors, got NaN or inf for row", unique
        )
        # Unlike that of vectors[where], its backward adds in the same order with any threads.
        return nn.functional.embedding(where, vectors)

    def _encoded(self, encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        n = self.passage_batch
        if n is None or len(ids) <= n or not torch.is_grad_enabled():
            return encoder(ids, mask)
        passes = zip(ids.split(n), mask.split(n), strict=True)
        return torch.cat([checkpoint(encoder, *each, use_reentrant=False) for each in passes])

    def refresh_index(
        self,
        batch_size: int = 256,
        *,
        rows: Tensor | None = None,
        encoder: PassageEncoder | None = None,
        progress: bool = False,
    ) -> None:
        """Encode passages with the present passage encoder and swap the vectors in.

        All passages are encoded block by block into a new version of the index, which replaces the
        old one when it is complete; searches meanwhile see the old one. An index that is mapped
        from a folder gets its new version on that disk (see `FlatIndex.replace`), so the memory is
        that of one block.

        Args:
            batch_size: passages per forward pass.
            rows: rows to encode `[n]`, each once; None: all, also into an empty index.
            encoder: encodes the passages; None: the passage encoder.
            progress: show a progress bar.

        Raises:
            ValueError: there is no passage encoder, it gives vectors of another width than those of
                the index or one that is not finite, or unknown or repeated rows. The index is then
                unchanged.
        """
        encoder = self._passage_encoder() if encoder is None else encoder
        dim = self.index.dim
        if rows is None:
            self.write_all(
                EncodedBlocks(encoder, self.passages, batch_size, dim=dim, progress=progress)
            )
            return
        fresh = encode_passages(
            encoder, self.passages, batch_size, progress=progress, rows=rows, dim=dim
        )
        self.write(fresh, rows)

    def write(self, vectors: Tensor, rows: Tensor) -> None:
        """Write vectors of the present passage encoder into the index.

        If a `vector_map` is set, they are stored so that the map returns them.

        Args:
            vectors: `[n, D]`.
            rows: their rows `[n]`, each once.

        Raises:
            ValueError: another width, a vector that is not finite, or unknown or repeated rows. The
                index is then unchanged.
        """
        self.index.update(
            rows, vectors if self.vector_map is None else self.vector_map.stored(vectors)
        )

    def write_all(self, vectors: Tensor | EncodedBlocks) -> None:
        """Write the vectors of all passages, also into an empty index, and drop the `vector_map`.

        Args:
            vectors: `[N, D]`, or blocks of them.

        Raises:
            ValueError: as `write`, or another number of vectors than there are passages.
        """
        if len(self.index):
            self.index.replace(vectors)
        else:
            self.index.add(vectors)
        self.vector_map = None

    def fold_map(self) -> None:
        """Replace all stored vectors by those that the `vector_map` makes of them, and drop it."""
        if self.vector_map is not None:
            self.index.replace(FoldedVectors(self.index, self.vector_map))
            self.vector_map = None

    def get_extra_state(self) -> Tensor:
        """Return the index's reference for `state_dict`; see `IndexReference`."""
        return IndexReference.of(self.index).pack()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Compare the reference in a state dict, if it has one, with the present index.

        Raises:
            ValueError: the present index has vectors of another width. Other content is a warning.
        """
        if state is not None:
            IndexReference.unpack(state).check(self.index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Retriever:
        super()._apply(fn, recurse)
        if self.move_index:
            device = fn(torch.empty(0, device=self.index.device)).device
            if device not in (self.index.device, torch.device("meta")):
                self.index.to(device)
                self.passages.to(device)
        return self

    def _passage_encoder(self) -> Any:
        if self.passage_encoder is None:
            raise ValueError("passage_encoder: expected a module to encode passages, got None")
        return self.passage_encoder

    def _find(
        self, query_emb: Tensor, k: int, include: Tensor | None, exclude: Tensor | None
    ) -> tuple[Hits, Hits | None]:
        """Choose the K passages of each question: the nearest, or some of them drawn or given.

        Returns:
            The passages, and all candidates if they were encoded again.
        """
        start = time.perf_counter()
        left_out = exclude
        if include is not None:
            left_out = include if exclude is None else torch.cat([include, exclude], 1)
        n_drawn = min(self.explore, k) if self.training else 0
        candidates: Hits | None = None
        if self.rescore is not None:
            if self.rescore < k:
                raise ValueError(
                    f"rescore: expected at least {k} candidates for {k} passages, or None, got "
                    f"{self.rescore}"
                )
            hits = candidates = self.rescored(query_emb, self.rescore, left_out)
        else:
            n_candidates = max(self.explore_pool or len(self.index), k) if n_drawn else k
            hits = self.nearest(query_emb, n_candidates, left_out, vectors=True)
        if n_drawn:
            columns = explore(hits.scores, k, n_drawn, self.tau * self.explore_tau)
            if include is not None:  # which takes the places of the last columns
                columns = columns.roll(n_drawn, 1)
            hits = hits.columns(columns)
        elif candidates is not None:
            hits = hits.columns(torch.arange(k, device=hits.rows.device).expand(len(hits.rows), k))
        if include is not None:
            given, version = self._take(include, query_emb)
            scores = functional.doc_scores(query_emb, given, rows=include)
            hits = included(Hits(scores, include, given, version), hits, k)
        self.search_seconds = time.perf_counter() - start
        return hits, candidates

    def _take(self, rows: Tensor, query_emb: Tensor) -> tuple[Tensor, int]:
        """Read the vectors of the rows that the caller chose, and their version."""
        checks.check_integer("rows", rows)
        if rows.dim() != 2 or rows.shape[0] != query_emb.shape[0]:
            raise ValueError(
                f"rows: expected [B, K] with B = {query_emb.shape[0]}, got {list(rows.shape)}"
            )
        self._check_index()
        self.search_seconds = 0.0
        vectors, version = self.index.gather(rows)
        return self._mapped(vectors.to(query_emb.device), rows), version

    def _mapped(self, stored: Tensor, rows: Tensor) -> Tensor:
        """Return stored vectors as the map sees them; vectors of missing rows stay zero."""
        if self.vector_map is None:
            return stored
        return self.vector_map.passages(stored).masked_fill((rows < 0)[..., None], 0.0)

    def _check_index(self) -> None:
        """Raise ValueError unless there is a vector of the right width for each passage."""
        index, passages = self.index, self.passages
        n_vectors = len(index)
        if n_vectors == 0:
            raise ValueError("index: expected vectors, got an empty index; call refresh_index()")
        if n_vectors != len(passages):
            raise ValueError(
                f"index: expected one vector per passage, got {n_vectors} vectors and "
                f"{len(passages)} passages"
            )
        self._check_width(index)

    def _check_width(self, index: Index) -> None:
        dim = getattr(self.question_encoder, "dim", index.dim)
        if dim != index.dim:
            raise ValueError(
                f"index: expected vectors of width {dim} as the question encoder gives, got "
                f"{index.dim}"
            )

    def _as_encoder(self, name: str, encoder: Any) -> Any:
        """Return `encoder` as a module of token ids; a SentenceTransformer is wrapped."""
        if is_sentence_transformer(encoder):
            encoder = SentenceEncoder(encoder, "query" if name == "question_encoder" else "passage")
            other = getattr(self, "question_encoder", None)
            if isinstance(other, SentenceEncoder) and other.serves_as(encoder):
                return other
        if encoder is None and name != "question_encoder":
            return None
        if not isinstance(encoder, nn.Module):
            raise ValueError(
                f"{name}: expected a module, such as TextEncoder.from_pretrained reads from a "
                f"folder, got {type(encoder).__name__}"
            )
        return encoder

    def _warn_if_flat(self, doc_scores: Tensor) -> None:
        """Warn once if the first training batch's prior is nearly uniform."""
        self._prior_seen = True
        if is_flat(doc_scores):
            warnings.warn(
                f"the prior over passages is nearly uniform in the first batch (entropy above "
                f"{FLAT_PRIOR} of its maximum, tau = {self.tau_value:g}): the retriever will "
                f"learn slowly; use a smaller tau",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        return (
            f"n_docs={self.n_docs}, tau={self.tau_value:g}, learn_tau={self.log_tau is not None}, "
            f"train_passage_encoder={self.train_passage_encoder}, explore={self.explore}"
        )


def _freeze_unshared(module: nn.Module, other: nn.Module) -> None:
    """Freeze the parameters of `module` that `other` does not also have."""
    shared = {id(parameter) for parameter in other.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)


def _require(name: str, value: object, method: str, expected: str) -> None:
    if not hasattr(value, method):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")


def _allow_no_reference(
    _module: nn.Module, state_dict: dict[str, Any], prefix: str, *_report: Any
) -> None:
    """Let `strict=True` accept a state dict without the index's reference."""
    state_dict.setdefault(prefix + "_extra_state", None)
