"""RAG-Token decoding: a search under the marginal distribution (Lewis et al. 2020, sec. 2.5).

    p(y_t|x,y_<t) = sum_k p(z_k|x) p(y_t|x,z_k,y_<t),    score(y) = sum_t log p(y_t|x,y_<t)

`MarginalModel` shows the K contexts of a question to transformers' `generate` as one decoder-only
model, whose logits are log p(y_t|x,y_<t). Greedy search, beams, sampling, logits processors,
stopping criteria and streamers thus see one row per question and beam, not passages.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from fastrag.generation.search import chosen, chosen_logp, each_of, in_order, join_answers
from fastrag.generation.settings import refuse
from fastrag.nn.heads import base_model
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.mixture_logp import mixture_logp
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastrag.generation.search import Search
    from fastrag.nn.generators import GeneratorAdapter, Step

# Settings that read one prompt or one cache. A question has K of both, one for each context.
_OF_ONE_CONTEXT: dict[str, Any] = {
    "guidance_scale": 1.0,
    "negative_prompt_ids": None,
    "negative_prompt_attention_mask": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "prefill_chunk_size": None,
    "cache_implementation": None,
    "cache_config": None,
}


class MarginalModel(GenerationMixin):
    """B questions with K contexts each, as a decoder-only language model of B rows.

        logits = log p(y_t|x,y_<t) = log sum_k p(z_k|x) p(y_t|x,z_k,y_<t)

    Its prompt is one token of any id for each question; the contexts are read at the first call,
    before beams are made of the questions. Each call brings the answers so far, and an answer goes
    on from the row of the last call that had its beginning. So the K caches have no part in the
    bookkeeping of transformers. A model serves one call of `generate`.

    Args:
        adapter: adapter of the generator.
        context_ids: `[B*K, L]` int64, the K contexts of a question next to each other.
        context_mask: `[B*K, L]`, 1 at tokens.
        log_prior: log p(z|x), `[B, K]`; -inf excludes a passage.
        state: what `adapter.read` returned for the contexts.
        cached: False reads contexts and answers again for each token.

    Example:
        >>> model = MarginalModel(adapter, ids, mask, log_prior)                    # doctest: +SKIP
        >>> model.generate(torch.zeros(B, 1, dtype=torch.int64), num_beams=4)       # doctest: +SKIP
    """

    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(
        self,
        adapter: GeneratorAdapter,
        context_ids: Tensor,
        context_mask: Tensor,
        log_prior: Tensor,
        *,
        state: Mapping[str, Any] | None = None,
        cached: bool = True,
    ) -> None:
        self.adapter = adapter
        self.config = PretrainedConfig(vocab_size=adapter.n_vocab)
        self.generation_config = copy.deepcopy(base_model(adapter.model).generation_config)
        # So that `generate` passes the whole answers.
        self.generation_config.update(use_cache=False, cache_implementation=None)
        self.head = adapter.head()
        self.log_prior = log_prior
        self.hidden: list[Tensor] = []  # states that predict the tokens of each call, [rows, K, H]
        self.log_z: list[Tensor] = []  # log of the sum over the vocabulary, [rows, K]
        self._contexts = (context_ids, context_mask)
        self._state = state
        self._cached = cached
        self._answers = context_ids.new_empty(len(log_prior), 0)  # of the last call
        self._step: Step | None = None

    @property
    def device(self) -> torch.device:
        return self.log_prior.device

    def __getattr__(self, name: str) -> Any:
        """Whatever else transformers asks of a model is answered by the generator."""
        if name == "adapter":  # while the object is made
            raise AttributeError(name)
        return getattr(base_model(self.adapter.model), name)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, return_dict: bool = True) -> CausalLMOutput:
        """Return the marginal log-probabilities of the next tokens, `[B*n, 1, V]`.

        Args:
            input_ids: `[B*n, 1 + t]`, the prompt and the answers so far; n answers of a question
                are next to each other.
            return_dict: always True.
        """
        answers = input_ids[:, 1:]
        n_questions, n_docs = self.log_prior.shape
        n_each = len(answers) // n_questions
        if self._step is None:
            step = self.adapter.first(*self._contexts, self._state, cached=self._cached)
        else:
            rows = self._continued(answers, n_each)
            step = self.adapter.next(
                self._step, answers[:, -1].repeat_interleave(n_docs, dim=0), rows
            )
        hidden = step.hidden.unflatten(0, (-1, n_docs))  # [B, K, H] at first, then [B*n, K, H]
        log_prior = self.log_prior.repeat_interleave(len(hidden) // n_questions, dim=0)
        marginal, log_z = mixture_logp(hidden, log_prior=log_prior, **vars(self.head))
        if self._step is None:
            marginal, hidden, log_z = (
                each.repeat_interleave(n_each, dim=0) for each in (marginal, hidden, log_z)
            )
        else:
            self._answers = answers
        self._step = step
        self.hidden.append(hidden)
        self.log_z.append(log_z)
        return CausalLMOutput(logits=marginal.unsqueeze(1))

    __call__ = forward

    def token_logp(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Return log p(y_t|x,z,y_<t) of answers, `[n, K, T]`; 0 at -100.

        Args:
            tokens: `[n, T]`, -100 after the end.
            rows: the row of the call that chose each token, `[n, T]`.
        """
        hidden, log_z = chosen(self.hidden, rows), chosen(self.log_z, rows)
        return chosen_logp(self.head, hidden, log_z, tokens)

    def _continued(self, answers: Tensor, n_each: int) -> Tensor | None:
        """Return the row of the last step that each answer and context goes on from."""
        n_questions, n_docs = self.log_prior.shape
        if n_each == 1:
            return None
        before = self._answers.unflatten(0, (n_questions, -1))  # [B, n', t]
        now = answers.unflatten(0, (n_questions, -1))[:, :, : before.shape[2]]  # [B, n, t]
        same = (now.unsqueeze(2) == before.unsqueeze(1)).all(dim=-1)  # [B, n, n']
        first = torch.arange(n_questions, device=answers.device) * before.shape[1]
        answer = first[:, None] + same.int().argmax(dim=2)
        passages = torch.arange(n_docs, device=answers.device)
        return (answer.unsqueeze(2) * n_docs + passages).flatten()


@torch.no_grad()
def rag_token(search: Search) -> RagGeneration:
    """Return the answers that a search under the marginal distribution finds.

    Greedy by default; `num_beams`, `do_sample` and `num_return_sequences` as in transformers. The
    caller's logits processors, `prefix_allowed_tokens_fn`, stopping criteria and streamer, and the
    processors of a `GenerationConfig` such as `repetition_penalty`, see one row per question (and
    beam): its marginal log-probabilities, and a first token followed by the answer so far, because
    that is what the K contexts have in common. The score of an answer is always that of the
    unchanged distributions.

    Args:
        search: the questions, their contexts and the settings.

    Returns:
        `RagGeneration`. The supporting passage has the largest posterior p(z|x,y_<=t), summed over
        the tokens of the answer. There are no candidates.

    Raises:
        ValueError: a setting that belongs to the context of one passage, such as `guidance_scale`.

    Example:
        >>> rag_token(search).sequences.shape                               # doctest: +SKIP
        torch.Size([8, 12])
    """
    settings = {**vars(search.config), **search.handed_on, **search.own_cache}
    refuse(settings, _OF_ONE_CONTEXT, "because the K contexts of a question are decoded together")
    n_docs, n_return = search.n_docs, search.n_return
    parts, answers, scores, posteriors = [], [], [], []
    for reading in search.readings(tied=True):
        questions = reading.contexts[::n_docs] // n_docs
        model = MarginalModel(
            search.adapter,
            reading.ids,
            reading.mask,
            search.log_prior[questions],
            state=reading.state,
            cached=search.own_cache.get("use_cache", True),
        )
        prompt = search.adapter.start(reading.ids[::n_docs])
        run = {"use_cache": False, "num_return_sequences": n_return}
        # The mask says that a prompt is no padding; T5's start token is its pad token as well.
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        tokens, rows = search.run(model, reading, inputs, run)
        log_prior = model.log_prior.repeat_interleave(n_return, dim=0).unsqueeze(2)
        joint = log_prior + model.token_logp(tokens, rows)  # [b * n_return, K, T]
        parts.append(each_of(questions, n_return))
        answers.append(tokens)
        scores.append(joint.logsumexp(dim=1).sum(dim=1))
        posteriors.append(joint.log_softmax(dim=1))
    answer = join_answers(parts, answers)
    counted = answer != IGNORE_INDEX
    lengths = counted.sum(dim=1)
    log_prior = search.log_prior.repeat_interleave(n_return, dim=0).to(posteriors[0].dtype)
    log_posterior = log_prior.unsqueeze(2).repeat(1, 1, answer.shape[1])  # after an answer, too
    for part, posterior in zip(parts, posteriors, strict=True):
        log_posterior[part, :, : posterior.shape[2]] = posterior
    shares = (log_posterior.exp() * counted.unsqueeze(1)).sum(dim=2)
    rows = search.rows.repeat_interleave(n_return, dim=0)
    return RagGeneration(
        sequences=answer.masked_fill(~counted, search.pad_id),
        scores=in_order(parts, scores).masked_fill(lengths == 0, -torch.inf),
        supporting_rows=rows.gather(1, shares.argmax(dim=1, keepdim=True)).squeeze(1),
        rows=search.rows,
        doc_scores=search.doc_scores,
        log_prior=search.log_prior,
        log_posterior=log_posterior,
        lengths=lengths,
        loss=search.loss(),
    )
