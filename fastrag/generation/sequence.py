"""RAG-Sequence decoding, greedy under each passage ("fast decoding", Lewis et al. 2020, sec. 2.5).

    candidates:  y_k = greedy answer given passage z_k
    score(y)     = log sum over {k : y_k = y} of p(z_k|x) p(y|x,z_k)

A passage that did not itself propose y counts as giving it no probability: that is what saves the
K x K forward passes of "thorough decoding". Each context is read once: the states that predict an
answer's tokens are kept while it is generated, and the states that predict given labels continue
from what the generator has read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from fastrag import functional
from fastrag.nn.heads import base_model
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter
    from fastrag.nn.loss import RagLoss

# Plain greedy search, whatever the model's own generation config says; what greedy search does not
# read is set to its neutral value, because transformers warns of any other.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_length": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "early_stopping": False,
    "length_penalty": 1.0,
    "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
    "dola_layers": None,
}
# Settings of the user's that a cache of ours would not obey.
_OWN_CACHE = ("use_cache", "cache_implementation", "cache_config")
# On a CPU, contexts of like length are read together: padding costs as much as text there, and so
# many rows keep it busy. A GPU takes all rows at once.
_ROWS_ON_CPU = 16


@torch.no_grad()
def rag_sequence_generate(
    adapter: GeneratorAdapter,
    context_ids: Tensor,
    context_mask: Tensor,
    doc_scores: Tensor,
    rows: Tensor,
    *,
    max_new_tokens: int = 32,
    pad_id: int = 0,
    labels: Tensor | None = None,
    valid_rows: Tensor | None = None,
    loss_fn: RagLoss | None = None,
    on_progress: Callable[[float], None] | None = None,
    **generate_kwargs: Any,
) -> RagGeneration:
    """Return the most probable greedy answer of each question, all questions at once.

    Args:
        adapter: the generator's adapter; its model should be in eval mode.
        context_ids: `[B*K, L]` int64, padded as the adapter's kind wants it.
        context_mask: `[B*K, L]`, 1 at tokens.
        doc_scores: `[B, K]`, -inf at missing passages. Where all K are missing, the answer given
            no passage is returned with its own probability.
        rows: `[B, K]` int64, -1 at missing passages.
        max_new_tokens: longest answer, shorter where the generator's positions end; one that does
            not end by then is scored as it stands.
        pad_id: fills `sequences` behind the end.
        labels: `[B, T]` int64, padded with -100: compute their loss too, without reading the
            contexts again.
        valid_rows: positions of counted labels, `[R]` int32, from the collator.
        loss_fn: the loss of `labels`; needed with them.
        on_progress: called with the share of the work that was done since the last call.
        generate_kwargs: further settings of the generator's `GenerationConfig`; `eos_token_id` (one
            id or several) says what ends an answer in place of the generator's own.

    Returns:
        `RagGeneration`.

    Raises:
        ValueError: shapes disagree, `max_new_tokens` < 1, settings of another search or of nothing
            that transformers knows, labels without a loss.
    """
    n_questions, n_docs = doc_scores.shape
    if context_ids.shape[0] != n_questions * n_docs:
        raise ValueError(
            f"context_ids: expected [B*K, L] with B*K = {n_questions * n_docs} as in doc_scores, "
            f"got {list(context_ids.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens}")
    if fixed := sorted(set(generate_kwargs) & set(_GREEDY)):
        raise ValueError(f"generate_kwargs: expected none of {fixed}: the search is greedy")
    if labels is not None and loss_fn is None:
        raise ValueError("loss_fn: expected a RagLoss for the labels, got None")
    room = adapter.room(context_ids.shape[1])
    if room is not None and room < 1:
        raise ValueError(
            f"context_ids: expected a context that leaves the generator a position to answer in, "
            f"got {context_ids.shape[1]} tokens, {1 - room} too many"
        )
    given = generate_kwargs.pop("eos_token_id", None)
    end_ids = own_end_ids(adapter) if given is None else _as_list(given)
    settings = {
        "max_new_tokens": max_new_tokens if room is None else min(max_new_tokens, room),
        "pad_token_id": pad_id,
        "eos_token_id": end_ids or None,
        **generate_kwargs,
    }
    config = _greedy_config(adapter, settings)
    continues = not set(generate_kwargs) & set(_OWN_CACHE)
    report = on_progress or (lambda share: None)
    label_rows = None if labels is None else labels.repeat_interleave(n_docs, dim=0)  # [B*K, T']

    keys = context_ids.new_full((len(context_ids), settings["max_new_tokens"]), IGNORE_INDEX)
    seq_logp = doc_scores.new_empty(len(context_ids), dtype=torch.float32)
    states: list[Tensor] = []
    groups = _alike(context_mask)
    for group in groups:
        ids, mask = _trimmed(context_ids[group], context_mask[group], adapter.kind)
        share = len(group) / len(context_ids)
        state: dict[str, Any] = {}
        if label_rows is not None and continues:
            state = adapter.read(ids, mask)
        if label_rows is not None:
            states.append(adapter.hidden(ids, mask, label_rows[group], state=state))
            report(share / 2)
            share /= 2
        tokens, hidden = _greedy(adapter, ids, mask, config, state, share, report)
        answer = _until_end(tokens, end_ids, IGNORE_INDEX)
        if hidden is None:
            hidden = adapter.hidden(ids, mask, answer)
        keys[group, : answer.shape[1]] = answer
        seq_logp[group] = _seq_logp(adapter, hidden, answer).to(seq_logp.dtype)
    keys = keys[:, : max(1, int((keys != IGNORE_INDEX).any(dim=0).sum()))]
    joint = _log_prior(doc_scores) + seq_logp.view(n_questions, n_docs)
    # log p(z_k|x) p(y_k|x,z_k), [B, K]
    candidates = keys.masked_fill(keys == IGNORE_INDEX, pad_id).unflatten(0, (-1, n_docs))
    keys = keys.unflatten(0, (-1, n_docs))
    same = (keys.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1)  # [B, K, K]
    alike = joint.unsqueeze(1).masked_fill(~same, -torch.inf)
    candidate_scores = alike.logsumexp(dim=2).masked_fill(joint.isneginf(), -torch.inf)
    scores, best = candidate_scores.max(dim=1)
    question = torch.arange(n_questions, device=best.device)
    support = alike[question, best].argmax(dim=1)
    generation = RagGeneration(
        sequences=candidates[question, best],
        scores=scores,
        supporting_rows=rows[question, support],
        rows=rows,
        doc_scores=doc_scores,
        candidates=candidates,
        candidate_scores=candidate_scores,
        lengths=(keys[question, best] != IGNORE_INDEX).sum(dim=1),
    )
    if labels is not None and loss_fn is not None:
        in_order = torch.cat(states)[torch.cat(groups).argsort()]  # [B*K, 1, T', H]
        generation["loss"] = loss_fn(
            in_order.view(n_questions, n_docs, *in_order.shape[2:]),
            adapter.head(),
            labels,
            doc_scores,
            valid_rows=valid_rows,
        ).loss
    return generation


def _alike(mask: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of `mask` in groups that are run together, on a CPU of like length."""
    if mask.device.type != "cpu":
        return (torch.arange(len(mask), device=mask.device),)
    return mask.sum(dim=1).argsort(descending=True, stable=True).split(_ROWS_ON_CPU)


def _trimmed(ids: Tensor, mask: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Cut columns that are padding in every row; on a GPU, where looking costs a wait, none."""
    if mask.device.type != "cpu":
        return ids, mask
    width = int(mask.sum(dim=1).max())
    kept = slice(0, width) if kind == "seq2seq" else slice(ids.shape[1] - width, None)
    return ids[:, kept], mask[:, kept]


def _greedy_config(adapter: GeneratorAdapter, settings: dict[str, Any]) -> Any:
    """The generator's generation config with greedy search and `settings`."""
    config = copy.deepcopy(base_model(adapter.model).generation_config)
    config.update(**_GREEDY)
    if unknown := sorted(config.update(**settings)):
        raise ValueError(
            f"generate_kwargs: expected fields of transformers' GenerationConfig, got {unknown}"
        )
    return config


class _Steps(StoppingCriteria):
    """Keeps, for each generated token, the state that predicted it. Stops nothing.

    Args:
        seen: what enters the output projection, in the order of the model's calls; emptied.
        on_step: called after each token.
    """

    def __init__(self, seen: list[Tensor], on_step: Callable[[], None]) -> None:
        self.seen = seen
        self.on_step = on_step
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.seen:
            # Any later ones since the last token are those of a processor, as for guidance.
            self.kept.append(self.seen[0])
            self.seen.clear()
        self.on_step()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _greedy(
    adapter: GeneratorAdapter,
    ids: Tensor,
    mask: Tensor,
    config: Any,
    state: dict[str, Any],
    share: float,
    report: Callable[[float], None],
) -> tuple[Tensor, Tensor | None]:
    """Run the generator's own greedy search, from the state that has read the contexts if given.

    Returns:
        The answer's columns `[n, T]`, and the states that predict them `[n, 1, T, H]`, or None
        where the search did not run the model once for each token.
    """
    if state:
        config = copy.copy(config)
        config.update(use_cache=True, cache_implementation=None)
    n_steps = 0

    def on_step() -> None:
        nonlocal n_steps
        n_steps += 1
        report(share / config.max_new_tokens)

    with adapter.predicting() as seen:
        steps = _Steps(seen, on_step)
        out = adapter.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([steps]),
            **state,
        )
    tokens = out[:, 1:] if adapter.kind == "seq2seq" else out[:, ids.shape[1] :]
    report(share * max(0.0, 1 - n_steps / config.max_new_tokens))
    width = tokens.shape[1]
    if len(steps.kept) < width:
        return tokens, None
    return tokens, torch.cat(steps.kept[:width], dim=1).unsqueeze(1)


def own_end_ids(adapter: GeneratorAdapter) -> list[int]:
    """Return the ids that end an answer by the generator's own generation config."""
    end = base_model(adapter.model).generation_config.eos_token_id
    return [] if end is None else _as_list(end)


def _as_list(ids: int | Sequence[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else [int(each) for each in ids]


def _until_end(tokens: Tensor, end_ids: list[int], ignore_index: int) -> Tensor:
    """Keep each row to its first end token, that included; the rest becomes `ignore_index`."""
    is_end = torch.isin(tokens, tokens.new_tensor(end_ids))
    behind = (is_end.long().cumsum(dim=1) - is_end.long()) > 0
    return tokens.masked_fill(behind, ignore_index)


def _seq_logp(adapter: GeneratorAdapter, hidden: Tensor, labels: Tensor) -> Tensor:
    """log p(y|x,z) of one answer per context, `[n]`, from the states that predict it."""
    head = adapter.head()
    token_logp = functional.token_logp(
        hidden,  # [n, 1, T, H]
        head.weight,
        labels,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=IGNORE_INDEX,
    )
    return token_logp.sum(dim=(1, 2))


def _log_prior(doc_scores: Tensor) -> Tensor:
    """log p(z|x); where all K passages are missing, the first context (no passage) takes it all."""
    none_found = ~doc_scores.isfinite().any(dim=1)
    fallback = torch.full_like(doc_scores, -torch.inf)
    fallback[:, 0] = 0.0
    return torch.where(none_found[:, None], fallback, doc_scores).log_softmax(dim=1)
