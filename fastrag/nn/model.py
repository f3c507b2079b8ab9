"""RagModel: question encoder, passage index and generator as one module that trains end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastrag.data.processor import Contexts, RagProcessor
from fastrag.messages import shown
from fastrag.nn.activation_checkpointing import ActivationCheckpointing
from fastrag.nn.arguments import (
    check_answers,
    check_count,
    check_posterior,
    check_processor,
    check_pruning,
    checked_weight,
    explain_failure,
)
from fastrag.nn.contrastive import Contrast
from fastrag.nn.exchange import Exchange
from fastrag.nn.generators import GeneratorAdapter, evaluating
from fastrag.nn.loss import RagLoss
from fastrag.nn.objectives import RetrieverTerm
from fastrag.nn.outputs import RagGeneration, RagOutput
from fastrag.nn.reader import Adapter, Reader
from fastrag.nn.retrieved import given_scores
from fastrag.nn.retriever import Retriever
from fastrag.nn.state import keep_one_name_per_tensor
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index import Hits, Index, PassageStore

# The part that owns each of these attributes of RagModel: they are read and set there.
_OWNERS = {
    "question_encoder": "retriever",
    "passage_encoder": "retriever",
    "index": "retriever",
    "passages": "retriever",
    "n_docs": "retriever",
    "tau": "retriever",
    "log_tau": "retriever",
    "train_passage_encoder": "retriever",
    "explore": "retriever",
    "explore_pool": "retriever",
    "explore_tau": "retriever",
    "rescore": "retriever",
    "passage_batch": "retriever",
    "null_passage": "retriever",
    "null_score": "retriever",
    "posterior_encoder": "retriever",
    "generator": "reader",
    "adapter": "reader",
    "prune": "reader",
    "prune_unbiased": "reader",
    "prefix_cache": "reader",
    "in_batch": "contrast",
    "contrastive": "contrast",
}


class RagModel(ActivationCheckpointing, Exchange, nn.Module):
    """Retrieval-augmented generation, trained on the marginal likelihood (Lewis et al. 2020).

        q = question_encoder(x);  z_1..z_K = the K passages of largest inner product with q
        p(z_k|x) = softmax_k(q . d_k / tau);  loss = RagLoss of the answers under the generator

    Gradients reach the question encoder, the generator and, if asked for, the passage encoder and
    tau. It is a plain module: it works in a loop of your own, under `transformers.Trainer`, and
    with PEFT adapters on the generator.

    Args:
        question_encoder: module of `(input_ids [B, S], attention_mask) -> [B, D]`, for example a
            `TextEncoder`; or a `SentenceTransformer`, which becomes a `SentenceEncoder`.
        passage_encoder: the same for passages; may be the very same module; None if the index
            is never rebuilt.
        generator: any seq2seq or causal language model of transformers, plain or with PEFT.
        index: vectors of the passages, in the order of `passages`; may still be empty, see
            `refresh_index`.
        passages: the passages as token ids.
        processor: tokenizers, template and lengths, those that `passages` was built with.
        n_docs: K, passages per question.
        marginal: "token" or "sequence".
        tau: temperature of the prior; None: 0.05 if both encoders normalise, else 1.
        learn_tau: train log tau too, starting from `tau`.
        train_passage_encoder: encode the K passages of a training step again, with gradient.
            Without it, the parameters of the passage encoder are set to `requires_grad=False`,
            except those that the question encoder also has (one model under two prefixes).
        explore: in training, m of the K passages are drawn without replacement from the softened
            prior softmax(s / explore_tau) over the candidates after the first K - m.
        explore_pool: number of candidates; None: all passages.
        explore_tau: softening of that prior; larger is more uniform.
        rescore, passage_batch, null_passage, null_score: see `Retriever`.
        adapter: an `Adapter` of the generator, for a model that is not of transformers.
        label_smoothing, objective, tau_lm: see `RagLoss`. With an objective that leaves the
            generator alone ("replug") its parameters are set to `requires_grad=False`.
        prune, prune_unbiased: train the generator on few of the K contexts, see `Reader`.
        in_batch, contrastive: weights of contrastive terms, see `Contrast`.
        posterior_encoder: the encoder of question and answer of the objective jsa, see `Retriever`.

    Raises:
        ValueError: index and passages of different length or width, numbers out of range, a
            processor of another kind, vocabulary, prefix or passage tokenizer, or with a longer
            window than the generator has positions; a generator that `adapt_generator` refuses.

    Note:
        Under `torch.distributed.fsdp.fully_shard`, the generator's embedding and head have to be in
        the group of the root, which is gathered while the loss is computed: shard the encoders and
        the generator's blocks, then the model. `fully_shard` leaves the index where it is, so move
        the model to its device before. It shards no scalar, such as that of `learn_tau`.

    Example:
        >>> processor = RagProcessor(question_tokenizer, generator_tokenizer)  # doctest: +SKIP
        >>> passages = PassageStore.build(corpus, processor)                   # doctest: +SKIP
        >>> model = RagModel(question_encoder, passage_encoder, generator, index, passages,
        ...                  processor)                                        # doctest: +SKIP
        >>> model(**processor.collate(questions)).loss.backward()              # doctest: +SKIP
    """

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
        processor: RagProcessor,
        *,
        n_docs: int = 5,
        marginal: str = "token",
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
        label_smoothing: float = 0.0,
        objective: str | RetrieverTerm = "marginal",
        tau_lm: float = 1.0,
        prune: float | None = None,
        prune_unbiased: bool = False,
        in_batch: float = 0.0,
        contrastive: float = 0.0,
        posterior_encoder: nn.Module | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.retriever = Retriever(
            question_encoder,
            passage_encoder,
            index,
            passages,
            n_docs=n_docs,
            tau=tau,
            learn_tau=learn_tau,
            train_passage_encoder=train_passage_encoder,
            explore=explore,
            explore_pool=explore_pool,
            explore_tau=explore_tau,
            rescore=rescore,
            passage_batch=passage_batch,
            null_passage=null_passage,
            null_score=null_score,
            posterior_encoder=posterior_encoder,
        )
        self.reader = Reader(generator, adapter, prune=prune, prune_unbiased=prune_unbiased)
        self.loss_fn = RagLoss(marginal, objective, tau_lm=tau_lm, label_smoothing=label_smoothing)
        if self.loss_fn.generator_loss == "none":
            generator.requires_grad_(False)
        check_pruning(self.loss_fn, prune, prune_unbiased)
        check_posterior(self.loss_fn, posterior_encoder)
        self.contrast = Contrast(
            checked_weight("in_batch", in_batch), checked_weight("contrastive", contrastive)
        )
        self.processor = processor
        check_processor(processor, self.reader, self.retriever)
        self._checked: tuple[Any, ...] = ()  # parts that were found to fit the processor
        keep_one_name_per_tensor(self)

    def __getattr__(self, name: str) -> Any:
        owner = _OWNERS.get(name)
        if owner is not None:
            return getattr(getattr(self, owner), name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        owner = _OWNERS.get(name)
        if owner is None:
            super().__setattr__(name, value)
        else:
            setattr(getattr(self, owner), name, value)

    @property
    def marginal(self) -> str:
        """Which marginal likelihood is trained, "token" or "sequence"."""
        return self.loss_fn.marginal

    @property
    def config(self) -> PreTrainedConfig:
        """The outputs that transformers.Trainer must leave out when it joins batches.

        The length T of a token model's `log_posterior` `[B, K, T]` differs between batches.
        """
        ragged = ["log_posterior"] if self.marginal == "token" else []
        return PreTrainedConfig(keys_to_ignore_at_inference=ragged)

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
        rows: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        example_weight: Tensor | None = None,
        doc_scores: Tensor | None = None,
        include_rows: Tensor | None = None,
        exclude_rows: Tensor | None = None,
        positive_rows: Tensor | None = None,
        posterior_ids: Tensor | None = None,
        posterior_mask: Tensor | None = None,
    ) -> RagOutput:
        """Retrieve K passages per question and return the marginal loss of the labels.

        Args:
            input_ids: questions in the question encoder's vocabulary, `[B, S]` int64.
            attention_mask: `[B, S]`, 1 at tokens.
            prompt_ids: questions in the generator's vocabulary, `[B, S']` int64, right-padded.
            prompt_mask: `[B, S']`, 1 at tokens.
            labels: answers, `[B, T]` int64, padded with -100; None: retrieval only.
            rows: use these passages instead of searching, `[B, K]` int64, -1 = missing.
            num_items_in_batch: divisor of the loss; None: the label tokens of this batch.
            example_weight: `[B]` factors of the examples in the loss.
            doc_scores: scores of `rows` from another retriever such as `BM25Index`, `[B, K]`, whose
                softmax is the prior. The question encoder is then not used.
            include_rows: rows that have to be among the K, `[B, E]` int64, -1 for none.
            exclude_rows: rows that must not be found, `[B, E']` int64, -1 for none.
            positive_rows: rows that contain the answer, `[B, P]` int64, -1 for none, for
                `contrastive`; they have to be among the K.
            posterior_ids: question and answer in the question encoder's vocabulary, `[B, S'']`
                int64, for the posterior encoder. Its K nearest passages are read as well.
            posterior_mask: `[B, S'']`, 1 at tokens.

        Returns:
            `RagOutput`.

        Raises:
            ValueError: shapes disagree, a question or passage without a finite vector (named; on
                a GPU, where looking would cost a wait, the loss is NaN instead), an empty index.
        """
        if labels is not None:
            check_answers(labels, len(input_ids))
        if doc_scores is None:
            found = self.retriever(
                input_ids,
                attention_mask,
                rows,
                include=include_rows,
                exclude=exclude_rows,
                posterior_ids=posterior_ids,
                posterior_mask=posterior_mask,
            )
        else:
            unused = (include_rows, exclude_rows, posterior_ids)
            found = given_scores(rows, doc_scores, input_ids, *unused)
        output: dict[str, Tensor] = {"doc_scores": found.doc_scores, "rows": found.hits.rows}
        if labels is None:
            return RagOutput(**output)
        contexts = self.contexts(found.hits.rows, prompt_ids, prompt_mask)
        loss_fn = self.loss_fn
        share: dict[str, Any] = {"normalizer": num_items_in_batch, "example_weight": example_weight}
        read = self.reader.loss(
            loss_fn,
            contexts,
            labels,
            found.doc_scores,
            posterior_scores=found.posterior_scores,
            **share,
        )
        output |= read._asdict()
        if self.training and any(self.contrast):
            terms = self.contrast.terms(found, self.tau, positive_rows)
            output["loss"] = read.loss + loss_fn.reduce(terms, labels, **share)
        return RagOutput(n_cut=contexts.n_cut, **output)

    def retrieve(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, k: int | None = None
    ) -> Hits:
        """Return the K nearest passages of each question; see `Retriever.search`."""
        return self.retriever.search(input_ids, attention_mask, k)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        *,
        marginal: str | None = None,
        max_new_tokens: int | None = None,
        n_docs: int | None = None,
        rows: Tensor | None = None,
        doc_scores: Tensor | None = None,
        labels: Tensor | None = None,
        loss_fn: RagLoss | None = None,
        on_progress: Callable[[float], None] | None = None,
        **generate_kwargs: Any,
    ) -> RagGeneration:
        """Answer questions by the decoding that fits the marginal, in eval mode.

            token:     a search for y_1, y_2, ... under sum_k p(z_k|x) p(y_t|x,z_k,y_<t)
            sequence:  y = argmax of sum_k p(z_k|x) p(y|x,z_k) over the answers found under each
                       passage; the sum is over the passages that found y
            sequence-thorough:  the same, but the sum is over all passages
                                                (Lewis et al. 2020, sec. 2.5)

        The search is greedy unless `num_beams` or `do_sample` say otherwise.

        Args:
            input_ids: `[B, S]` int64, question encoder's vocabulary.
            attention_mask: `[B, S]`.
            prompt_ids: `[B, S']` int64, generator's vocabulary.
            prompt_mask: `[B, S']`.
            marginal: a name in `fastrag.generation.DECODERS`, for example "token" or "sequence".
                None: the marginal that the model is trained with.
            max_new_tokens: longest answer; None: that of `generation_config` if given, else 32.
            n_docs: passages per question, which may differ from those of training; None: the
                model's, or all of `rows`.
            rows: use these passages instead of searching, `[B, K]` int64, -1 = missing.
            doc_scores: scores of `rows`, as in `forward`.
            labels: answers, `[B, T]` int64, padded with -100: compute their loss as `forward` does,
                from the same reading of the contexts.
            loss_fn: computes that loss; None: the model's own.
            on_progress: called with the share of the work that was done since the last call.
            generate_kwargs: arguments of transformers' `generate` (`logits_processor`,
                `stopping_criteria`, `prefix_allowed_tokens_fn`, `streamer`, `generation_config`,
                ...) and fields of its `GenerationConfig` (`num_beams`, `do_sample`, `top_p`,
                `num_return_sequences`, ...). The decoder's docstring says which distribution they
                see: `fastrag.generation.rag_token` or `rag_sequence`.

        Returns:
            `RagGeneration`.

        Raises:
            ValueError: as `forward`; a count below 1; no decoder of this name; a setting of a
                search that is refused by name, or one that transformers does not know.
        """
        from fastrag.generation import DECODERS, Search

        decoder = DECODERS.get(self.marginal if marginal is None else marginal)
        if decoder is None:
            raise ValueError(f"marginal: expected one of {tuple(DECODERS)}, got {shown(marginal)}")
        if rows is not None and n_docs not in (None, *rows.shape[1:]):
            raise ValueError(f"n_docs: expected None with rows {list(rows.shape)}, got {n_docs}")
        n_docs = self.n_docs if n_docs is None else n_docs
        check_count("n_docs", n_docs)
        if labels is not None:
            check_answers(labels, len(input_ids))
        if not isinstance(self.adapter, GeneratorAdapter):
            raise ValueError(
                f"adapter: expected one of adapt_generator to generate with, got "
                f"{type(self.adapter).__name__}, which can only train"
            )
        with evaluating(self):
            if doc_scores is None:
                found = self.retriever(input_ids, attention_mask, rows, n_docs)
            else:
                found = given_scores(rows, doc_scores, input_ids)
            context = self.contexts(found.hits.rows, prompt_ids, prompt_mask)
            search = Search(
                self.adapter,
                context.ids,
                context.mask,
                found.doc_scores,
                found.hits.rows,
                max_new_tokens=max_new_tokens,
                pad_id=self.processor.bound.pad_id,
                # Training taught the template's end, which may differ from the generator's own.
                eos_id=self.processor.bound.eos_id,
                labels=labels,
                loss_fn=self.loss_fn if loss_fn is None else loss_fn,
                on_progress=on_progress,
                prefix_cache=self.prefix_cache,
                prefix_len=context.prefix_len,
                **{"tokenizer": self.processor.generator_tokenizer, **generate_kwargs},
            )
            try:
                return decoder(search)
            except RuntimeError as error:
                explain_failure("generator", self.generator, context.ids, error)
                raise

    def refresh_index(self, batch_size: int = 256, *, progress: bool = False) -> None:
        """Encode all passages again and swap the vectors in; see `Retriever.refresh_index`."""
        self.retriever.refresh_index(batch_size, progress=progress)

    def contexts(
        self, rows: Tensor, prompt_ids: Tensor | None, prompt_mask: Tensor | None = None
    ) -> Contexts:
        """Join questions and their passages to the generator's inputs.

        Args:
            rows: `[B, K]` int64, -1 = missing.
            prompt_ids: questions in the generator's vocabulary, `[B, S']` int64, right-padded.
            prompt_mask: `[B, S']`, 1 at tokens.

        Returns:
            `Contexts`.

        Raises:
            ValueError: no prompt, ids outside the vocabulary, or a question over the window.
        """
        if prompt_ids is None:
            raise ValueError("prompt_ids: expected the questions in the generator's vocabulary")
        retriever, reader, processor = self.retriever, self.reader, self.processor
        encoders = (retriever.question_encoder, retriever.passage_encoder)
        passages = retriever.passages
        parts = (*encoders, passages, reader.generator, processor)
        with stage("contexts"):
            if parts != self._checked:  # each may have been replaced since the last step
                check_processor(processor, reader, retriever)
                self._checked = parts
            return processor.contexts(passages, rows, prompt_ids, prompt_mask)

    def _checkpointed_parts(self) -> list[Any]:
        """Return the transformers models that train."""
        encoders: list[Any] = [self.question_encoder]
        if self.train_passage_encoder and self.passage_encoder is not self.question_encoder:
            encoders.append(self.passage_encoder)
        if self.posterior_encoder is not None:
            encoders.append(self.posterior_encoder)
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

    def extra_repr(self) -> str:
        return f"marginal={self.marginal!r}, max_context={self.processor.max_context}"
