"""RAG-Sequence decoding, greedy under each passage ("fast decoding", Lewis et al. 2020, sec. 2.5).

    candidates:  y_k = greedy answer given passage z_k
    score(y)     = log sum over {k : y_k = y} of p(z_k|x) p(y|x,z_k)

A passage that did not itself propose y counts as giving it no probability: that is what saves the
K x K forward passes of "thorough decoding".
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrag import functional
from fastrag.nn.heads import base_model
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.nn.generators import GeneratorAdapter

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
}


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
        generate_kwargs: further settings of the generator's `generate`; `eos_token_id` (one id or
            several) says what ends an answer in place of the generator's own.

    Returns:
        `RagGeneration`.

    Raises:
        ValueError: shapes disagree, `max_new_tokens` < 1, or settings of another search.
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
    tokens = _greedy(adapter, context_ids, context_mask, settings)  # [B*K, T]
    labels = _until_end(tokens, end_ids, IGNORE_INDEX)
    joint = _log_prior(doc_scores) + _seq_logp(adapter, context_ids, context_mask, labels).view(
        n_questions, n_docs
    )  # log p(z_k|x) p(y_k|x,z_k), [B, K]
    candidates = labels.masked_fill(labels == IGNORE_INDEX, pad_id).unflatten(0, (-1, n_docs))
    keys = labels.unflatten(0, (-1, n_docs))
    same = (keys.unsqueeze(2) == keys.unsqueeze(1)).all(dim=-1)  # [B, K, K]
    alike = joint.unsqueeze(1).masked_fill(~same, -torch.inf)
    candidate_scores = alike.logsumexp(dim=2).masked_fill(joint.isneginf(), -torch.inf)
    scores, best = candidate_scores.max(dim=1)
    question = torch.arange(n_questions, device=best.device)
    support = alike[question, best].argmax(dim=1)
    return RagGeneration(
        sequences=candidates[question, best],
        scores=scores,
        supporting_rows=rows[question, support],
        rows=rows,
        doc_scores=doc_scores,
        candidates=candidates,
        candidate_scores=candidate_scores,
        lengths=(keys[question, best] != IGNORE_INDEX).sum(dim=1),
    )


def _greedy(
    adapter: GeneratorAdapter, ids: Tensor, mask: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Run the generator's own greedy search; return the answer's columns alone."""
    config = copy.deepcopy(base_model(adapter.model).generation_config)
    config.update(**_GREEDY, **settings)
    out = adapter.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return out[:, 1:] if adapter.kind == "seq2seq" else out[:, ids.shape[1] :]


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


def _seq_logp(adapter: GeneratorAdapter, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """log p(y|x,z) of one answer per context, `[B*K]`."""
    head = adapter.head()
    token_logp = functional.token_logp(
        adapter.hidden(ids, mask, labels, IGNORE_INDEX),  # [B*K, 1, T, H]
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
