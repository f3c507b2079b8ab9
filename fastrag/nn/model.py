"""RagModel: question encoder, passage index and generator as one module that trains end to end."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrag import functional
from fastrag.nn.activation_checkpointing import ActivationCheckpointing
from fastrag.nn.arguments import (
    bind_template,
    check_answers,
    check_count,
    check_encoder,
    check_ids,
    check_numbers,
    context_limit,
    require_finite,
)
from fastrag.nn.builder import BuiltContext, ContextBuilder
from fastrag.nn.generators import adapt_generator, evaluating
from fastrag.nn.loss import RagLoss
from fastrag.nn.outputs import RagGeneration, RagOutput
from fastrag.nn.retrieval import FLAT_PRIOR, check_index, encode_rows, explore, is_flat
from fastrag.nn.state import keep_one_name_per_tensor
from fastrag.ops import checks
from fastrag.profiling import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.data.templates import BoundTemplate, Template
    from fastrag.index import Index, PassageStore

NORMALIZED_TAU = 0.05  # cosines lie in [-1, 1]; without it the prior over K stays near uniform


class _Retrieved(NamedTuple):
    rows: Tensor  # [B, K] int64, -1 where missing
    seconds: float  # wall time on the host


class RagModel(ActivationCheckpointing, nn.Module):
    """Retrieval-augmented generation, trained on the marginal likelihood (Lewis et al. 2020).

        q = question_encoder(x);  z_1..z_K = the K passages of largest inner product with q
        p(z_k|x) = softmax_k(q . d_k / tau);  loss = RagLoss of the answers under the generator

    Gradients reach the question encoder, the generator and, if asked for, the passage encoder and
    tau. It is a plain module: it works in a loop of your own, under `transformers.Trainer`, and
    with PEFT adapters on the generator.

    Args:
        question_encoder: module of `(input_ids [B, S], attention_mask) -> [B, D]`, for example a
            `TextEncoder`.
        passage_encoder: the same for passages; may be the very same module; None if the index
            never has to be made anew.
        generator: any seq2seq or causal language model of transformers, plain or with PEFT.
        index: vectors of the passages, in the order of `passages`; may still be empty, see
            `refresh_index`.
        passages: the passages as token ids.
        n_docs: K, passages per question.
        marginal: "token" or "sequence".
        tau: temperature of the prior; None: 0.05 if both encoders normalise, else 1.
        learn_tau: train log tau along, from `tau` on.
        template: a `Template`, or one already bound to the generator's tokenizer; None: the default
            of the generator's kind.
        question_tokenizer: kept for `save_pretrained`.
        generator_tokenizer: needed unless `template` is bound; kept for `save_pretrained`.
        max_context: longest generator input in tokens; passages are cut to fit; None: 512 or what
            the generator's positions allow.
        train_passage_encoder: encode the K passages of a training step anew, with gradient. If
            not, its parameters are set to `requires_grad=False`, but for those that the question
            encoder has too (one encoder for both, or one model under two prefixes).
        explore: in training, m of the K passages are drawn without replacement from the softened
            prior softmax(s / explore_tau) over the candidates behind the first K - m.
        explore_pool: number of candidates; None: all passages.
        explore_tau: softening of that prior; larger is more uniform.
        label_smoothing, objective, tau_lm: see `RagLoss`. With an objective that leaves the
            generator alone ("replug") its parameters are set to `requires_grad=False`.

    Raises:
        ValueError: index and passages of different length or width, numbers out of range, passages
            tokenised for another generator, a generator that `adapt_generator` refuses.

    Example:
        >>> model = RagModel(question_encoder, passage_encoder, generator, index, passages,
        ...                  question_tokenizer=qt, generator_tokenizer=gt)     # doctest: +SKIP
        >>> model(**collator(questions)).loss.backward()                        # doctest: +SKIP
    """

    log_tau: nn.Parameter | None

    accepts_loss_kwargs = True  # transformers.Trainer: pass num_items_in_batch to forward
    main_input_name = "input_ids"
    _keys_to_ignore_on_save = None  # transformers.Trainer reads it when a checkpoint lacks keys

    def __init__(
        self,
        question_encoder: nn.Module,
        passage_encoder: nn.Module | None,
        generator: nn.Module,
        index: Index,
        passages: PassageStore,
        *,
        n_docs: int = 5,
        marginal: str = "token",
        tau: float | None = None,
        learn_tau: bool = False,
        template: Template | BoundTemplate | None = None,
        question_tokenizer: PreTrainedTokenizerBase | None = None,
        generator_tokenizer: PreTrainedTokenizerBase | None = None,
        max_context: int | None = None,
        train_passage_encoder: bool = False,
        explore: int = 0,
        explore_pool: int | None = 256,
        explore_tau: float = 1.0,
        label_smoothing: float = 0.0,
        objective: str = "marginal",
        tau_lm: float = 1.0,
    ) -> None:
        super().__init__()
        check_encoder("question_encoder", question_encoder)
        if passage_encoder is not None:
            check_encoder("passage_encoder", passage_encoder)
        if tau is None:
            both = (question_encoder, passage_encoder or question_encoder)
            normalized = all(getattr(encoder, "normalize", False) for encoder in both)
            tau = NORMALIZED_TAU if normalized else 1.0
        if not hasattr(index, "search") or not hasattr(passages, "gather"):
            raise ValueError(
                f"index, passages: expected a FlatIndex and a PassageStore, got "
                f"{type(index).__name__} and {type(passages).__name__}"
            )
        check_numbers(n_docs, tau, explore, explore_pool, explore_tau)
        if train_passage_encoder and passage_encoder is None:
            raise ValueError("passage_encoder: expected a module to train, got None")
        self.question_encoder = question_encoder
        self.passage_encoder = passage_encoder
        self.generator = generator
        self.adapter = adapt_generator(generator)
        self.index = index
        self.passages = passages
        self.n_docs = n_docs
        self._tau = float(tau)
        log_tau = nn.Parameter(torch.tensor(math.log(tau))) if learn_tau else None
        self.register_parameter("log_tau", log_tau)
        self.loss_fn = RagLoss(marginal, objective, tau_lm=tau_lm, label_smoothing=label_smoothing)
        if self.loss_fn.generator_loss == "none":
            generator.requires_grad_(False)
        self.question_tokenizer = question_tokenizer
        self.generator_tokenizer = generator_tokenizer
        self.builder = ContextBuilder(
            bind_template(template, generator_tokenizer, self.adapter.kind),
            context_limit(generator, self.adapter.kind, max_context),
        )
        self.train_passage_encoder = train_passage_encoder
        self.explore = explore
        self.explore_pool = explore_pool
        self.explore_tau = explore_tau
        self._prior_seen = False
        if passage_encoder is not None and not train_passage_encoder:
            _freeze_unshared(passage_encoder, question_encoder)
        if len(index):
            check_index(index, passages, question_encoder)
        if len(passages) == 0:
            raise ValueError("passages: expected at least one passage, got an empty store")
        if generator_tokenizer is not None:
            bound = self.builder.template.template
            passages.check_tokenizer("generator", generator_tokenizer, bound)
        if question_tokenizer is not None:
            passages.check_tokenizer("encoder", question_tokenizer)
        keep_one_name_per_tensor(self)

    @property
    def tau(self) -> float | Tensor:
        """Temperature of the prior; a tensor with gradient when it is learned."""
        return self._tau if self.log_tau is None else self.log_tau.exp()

    @property
    def _tau_value(self) -> float:
        """The temperature of the prior as it is now, a number."""
        return self._tau if self.log_tau is None else math.exp(self.log_tau.item())

    @property
    def marginal(self) -> str:
        """Which marginal likelihood is trained, "token" or "sequence"."""
        return self.loss_fn.marginal

    @property
    def max_context(self) -> int:
        """Longest generator input, in tokens."""
        return self.builder.max_context

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        valid_rows: Tensor | None = None,
        rows: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        example_weight: Tensor | None = None,
        **kwargs: Any,
    ) -> RagOutput:
        """Retrieve K passages per question and return the marginal loss of the labels.

        Args:
            input_ids: questions in the question encoder's vocabulary, `[B, S]` int64.
            attention_mask: `[B, S]`, 1 at tokens.
            prompt_ids: questions in the generator's vocabulary, `[B, S']` int64, right-padded.
            prompt_mask: `[B, S']`, 1 at tokens.
            labels: answers, `[B, T]` int64, padded with -100; None: retrieval only.
            valid_rows: positions of counted labels, `[R]` int32, from the collator.
            rows: take these passages instead of searching, `[B, K]` int64, -1 = missing.
            num_items_in_batch: what the loss is divided by; default this batch's label tokens.
            example_weight: `[B]` factors of the examples in the loss.
            kwargs: other keys of a batch; not read.

        Returns:
            `RagOutput`.

        Raises:
            ValueError: shapes disagree, a question or passage without a finite vector (named; on
                a GPU, where looking would cost a wait, the loss is NaN instead), an empty index.
        """
        if labels is not None:
            check_answers(labels, len(input_ids))
        query_emb = self._encode_questions(input_ids, attention_mask)
        retrieved = self._retrieve(query_emb, rows)
        doc_scores = self._score(query_emb, retrieved.rows)
        output = RagOutput(
            doc_scores=doc_scores, rows=retrieved.rows, retrieval_seconds=retrieved.seconds
        )
        if labels is None:
            return output
        context = self._context(retrieved.rows, prompt_ids, prompt_mask)
        with stage("generator"):
            hidden = self.adapter.hidden(context.ids, context.mask, labels)  # [B, K, T, H]
        output["loss"], output["log_posterior"] = self.loss_fn(
            hidden,
            self.adapter.head(),
            labels,
            doc_scores,
            normalizer=num_items_in_batch,
            example_weight=example_weight,
            valid_rows=valid_rows,
        )
        output["n_cut"] = context.n_cut
        return output

    @torch.no_grad()
    def retrieve(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, k: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the K nearest passages of each question, without exploring.

        Args:
            input_ids: `[B, S]` int64.
            attention_mask: `[B, S]`, 1 at tokens.
            k: passages per question; None: `n_docs`.

        Returns:
            scores `[B, k]` fp32 (inner products, not divided by tau; -inf where missing), rows
            `[B, k]` int64 (-1 where missing), best first.

        Raises:
            ValueError: shapes or dtypes disagree, k below 1, a question without a finite vector, an
                empty index.
        """
        k = self.n_docs if k is None else k
        check_count("k", k)
        with evaluating(self.question_encoder):
            query_emb = self._encode_questions(input_ids, attention_mask)
        return self._search(query_emb, k)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        n_docs: int | None = None,
        rows: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> RagGeneration:
        """Answer questions by RAG-Sequence decoding (`fastrag.generation.sequence`), in eval mode.

        Args:
            input_ids: `[B, S]` int64, question encoder's vocabulary.
            attention_mask: `[B, S]`.
            prompt_ids: `[B, S']` int64, generator's vocabulary.
            prompt_mask: `[B, S']`.
            max_new_tokens: longest answer.
            n_docs: passages per question; None: the model's.
            rows: take these passages instead of searching, `[B, K]` int64, -1 = missing.
            generate_kwargs: passed on to the generator's `generate`.

        Returns:
            `RagGeneration`.

        Raises:
            ValueError: as `forward`; n_docs or max_new_tokens below 1; settings of a search that
                is not greedy.
        """
        from fastrag.generation.sequence import own_end_ids, rag_sequence_generate

        n_docs = self.n_docs if n_docs is None else n_docs
        check_count("n_docs", n_docs)
        # Training taught the template's end, which a chat template may set apart from the model's.
        end_ids = sorted({*own_end_ids(self.adapter), self.builder.template.eos_id})
        with evaluating(self):
            query_emb = self._encode_questions(input_ids, attention_mask)
            if rows is None:
                rows = self._search(query_emb, n_docs)[1]
            doc_scores = self._score(query_emb, rows)
            context = self._context(rows, prompt_ids, prompt_mask)
            return rag_sequence_generate(
                self.adapter,
                context.ids,
                context.mask,
                doc_scores,
                rows,
                max_new_tokens=max_new_tokens,
                pad_id=self.builder.template.pad_id,
                **{"eos_token_id": end_ids, **generate_kwargs},
            )

    def refresh_index(self, batch_size: int = 256, *, progress: bool = False) -> None:
        """Encode all passages with the passage encoder as it is now and swap the vectors in.

        Args:
            batch_size: passages per forward pass.
            progress: show a progress bar.

        Raises:
            ValueError: there is no passage encoder, or it gives a vector that is not finite.
        """
        from fastrag.index.refresh import encode_passages

        if self.passage_encoder is None:
            raise ValueError("passage_encoder: expected a module to encode passages, got None")
        vectors = encode_passages(
            self.passage_encoder, self.passages, batch_size, progress=progress
        )
        if len(self.index):
            self.index.replace(vectors)
        else:
            self.index.add(vectors)

    def _encode_questions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        checks.check_tensor("input_ids", input_ids)
        if input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected at least one question, got {checks.show(input_ids)}"
            )
        with stage("encode_questions"):
            query_emb = self.question_encoder(input_ids, attention_mask)
        require_finite(
            query_emb, "question_encoder: expected finite vectors, got NaN or inf for example"
        )
        return query_emb

    def _retrieve(self, query_emb: Tensor, rows: Tensor | None) -> _Retrieved:
        """Choose the K rows of each question: forced, nearest, or nearest and explored."""
        if rows is not None:
            checks.check_integer("rows", rows)
            if rows.dim() != 2 or rows.shape[0] != query_emb.shape[0]:
                raise ValueError(
                    f"rows: expected [B, K] with B = {query_emb.shape[0]}, got {list(rows.shape)}"
                )
            return _Retrieved(rows, 0.0)
        start = time.perf_counter()
        query_emb = query_emb.detach()
        if self.training and self.explore:
            n_candidates = max(self.explore_pool or len(self.index), self.n_docs)
            scores, candidates = self._search(query_emb, n_candidates)
            softness = self.tau * self.explore_tau
            rows = explore(scores, candidates, self.n_docs, self.explore, softness)
        else:
            rows = self._search(query_emb, self.n_docs)[1]
        return _Retrieved(rows, time.perf_counter() - start)

    def _search(self, query_emb: Tensor, k: int) -> tuple[Tensor, Tensor]:
        check_index(self.index, self.passages, self.question_encoder)
        with stage("search"):
            return self.index.search(query_emb, k)

    def _score(self, query_emb: Tensor, rows: Tensor) -> Tensor:
        """Scores q . d / tau `[B, K]`; d from the index, or fresh if the passage encoder trains."""
        scale = offset = None
        if self.passage_encoder is not None and self.train_passage_encoder and self.training:
            passage_emb = encode_rows(self.passage_encoder, self.passages, rows)
        elif self.index.device == query_emb.device and self.index.index_emb is not None:
            passage_emb = self.index.index_emb  # gathered inside the operation
            scale, offset = self.index.scale, self.index.offset
        else:
            passage_emb = self.index.vectors(rows).to(query_emb.device)
        with stage("score"):
            doc_scores = functional.doc_scores(
                query_emb, passage_emb, rows=rows, tau=self.tau, scale=scale, offset=offset
            )
        if self.training and not self._prior_seen:
            self._warn_if_flat(doc_scores.detach())
        return doc_scores

    def _context(
        self, rows: Tensor, prompt_ids: Tensor | None, prompt_mask: Tensor | None
    ) -> BuiltContext:
        if prompt_ids is None:
            raise ValueError("prompt_ids: expected the questions in the generator's vocabulary")
        if prompt_mask is None:
            prompt_mask = torch.ones_like(prompt_ids)
        check_ids("prompt_ids", prompt_ids, self.adapter.n_vocab)
        with stage("contexts"):
            ids, lengths = self.passages.gather(rows, "generator", max_length=self.max_context)
            return self.builder.build(ids, lengths, prompt_ids, prompt_mask)

    def _warn_if_flat(self, doc_scores: Tensor) -> None:
        """Say once when the first training batch's prior is as good as uniform."""
        self._prior_seen = True
        if is_flat(doc_scores):
            warnings.warn(
                f"the prior over passages is nearly uniform in the first batch (entropy above "
                f"{FLAT_PRIOR} of its maximum, tau = {self._tau_value:g}): the retriever will "
                f"learn slowly; use a smaller tau",
                stacklevel=4,
            )

    def _checkpointed_parts(self) -> list[Any]:
        """The transformers models inside that train."""
        encoders: list[Any] = [self.question_encoder]
        if self.train_passage_encoder and self.passage_encoder is not self.question_encoder:
            encoders.append(self.passage_encoder)
        parts = [getattr(encoder, "model", encoder) for encoder in encoders] + [self.generator]
        return [part for part in parts if hasattr(part, "gradient_checkpointing_enable")]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters; see `torch.nn.Module.load_state_dict`.

        Raises:
            ValueError: names or shapes are those of another configuration.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise ValueError(f"state_dict: checkpoint of another configuration: {error}") from error

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        merge_adapter: bool = False,
        include_index: bool = False,
    ) -> None:
        """Write encoders, generator, tokenizers, template and settings as one folder.

        The folder appears whole or not at all; one that stood there before stays until then.

        Args:
            path: the folder; replaced if it is one of this kind.
            merge_adapter: merge a PEFT adapter into a copy of the generator instead of writing it
                as an adapter.
            include_index: write index and passages into it too; otherwise the index is named by
                checksum and given to `from_pretrained`.
        """
        from fastrag.nn.checkpoint import save_model

        save_model(self, path, merge_adapter=merge_adapter, include_index=include_index)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        index: Index | None = None,
        passages: PassageStore | None = None,
        *,
        base_generator: nn.Module | None = None,
        generator_class: type | None = None,
        **overrides: Any,
    ) -> RagModel:
        """Read a folder that `save_pretrained` wrote, in eval mode; nothing is downloaded.

        Args:
            path: the folder.
            index: the index; None: the one in the folder.
            passages: the passages; None: those in the folder.
            base_generator: the model that a PEFT adapter belongs on, if not found by its name.
            generator_class: class with `from_pretrained`, where the automatic class is not it.
            overrides: settings of the constructor that replace the stored ones.

        Returns:
            A RagModel.

        Raises:
            ValueError: a file is missing or of another configuration, or no index is to be had.
        """
        from fastrag.nn.checkpoint import load_model

        return load_model(
            cls,
            path,
            index,
            passages,
            base_generator=base_generator,
            generator_class=generator_class,
            overrides=overrides,
        )

    def extra_repr(self) -> str:
        return (
            f"n_docs={self.n_docs}, marginal={self.marginal!r}, tau={self._tau_value:g}, "
            f"learn_tau={self.log_tau is not None}, max_context={self.max_context}, "
            f"train_passage_encoder={self.train_passage_encoder}, explore={self.explore}"
        )


def _freeze_unshared(module: nn.Module, other: nn.Module) -> None:
    """Freeze the parameters of `module` that `other` does not have too."""
    shared = {id(parameter) for parameter in other.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
