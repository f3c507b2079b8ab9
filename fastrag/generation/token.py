"""RAG-Token decoding: greedy under the marginal distribution (Lewis et al. 2020, sec. 2.5).

    p(y_t|x,y_<t) = sum_k p(z_k|x) p(y_t|x,z_k,y_<t)
    y_t           = argmax of it,    score(y) = sum_t log p(y_t|x,y_<t)

The K contexts of a question are generated next to each other, and in each step all of them get the
logarithm of the marginal distribution in place of their own logits. They thus choose the same
token, and the answer of the question is that of any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fastrag.generation.greedy import in_order, join_answers
from fastrag.nn.loss import RagLoss
from fastrag.nn.outputs import RagGeneration
from fastrag.ops.positions import IGNORE_INDEX

if TYPE_CHECKING:
    from fastrag.generation.greedy import GreedySearch


class MarginalLogits(LogitsProcessor):
    """Replace the scores of the K contexts of a question by their marginal log-probabilities.

        log p(y_t|x,y_<t) = log sum_k p(z_k|x) softmax(scores_k)[y_t]

    Works in any search of transformers' `generate` over B*K contexts. With n beams per context, the
    beams of a question's contexts stay equal too.

    Args:
        log_prior: log p(z|x), `[B, K]`; -inf gives a passage no say.
        processors: logits processors of the marginal distribution. They see one row per question
            (and beam), with the token ids of its first context.

    Example:
        >>> import torch
        >>> own = torch.tensor([[0.8, 0.2], [0.1, 0.9]]).log()          # B = 1, K = 2, V = 2
        >>> marginal = MarginalLogits(torch.tensor([[0.25, 0.75]]).log())
        >>> marginal(torch.zeros(2, 1, dtype=torch.int64), own).exp()   # .25 * .8 + .75 * .1
        tensor([[0.2750, 0.7250],
                [0.2750, 0.7250]])
    """

    def __init__(self, log_prior: Tensor, processors: Sequence[Any] = ()) -> None:
        self.log_prior = log_prior
        self.processors = LogitsProcessorList(processors)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shape = (*self.log_prior.shape, -1)  # [B, K, n]
        own = scores.unflatten(0, shape).log_softmax(dim=-1)  # [B, K, n, V]
        log_prior = self.log_prior.to(own.dtype)[:, :, None, None]
        marginal = (log_prior + own).logsumexp(dim=1)  # [B, n, V]
        if self.processors:
            first = input_ids.unflatten(0, shape)[:, 0].flatten(0, 1)
            marginal = self.processors(first, marginal.flatten(0, 1)).view_as(marginal)
        return marginal.unsqueeze(1).expand_as(own).flatten(0, 2)


@torch.no_grad()
def rag_token(search: GreedySearch) -> RagGeneration:
    """Return the greedy answer of each question under the marginal distribution.

    Fields of `GenerationConfig` that change logits, such as `repetition_penalty`, apply to each
    passage's own distribution. The caller's logits processors, `prefix_allowed_tokens_fn`, stopping
    criteria and streamer see one row per question, with the token ids of its first context, and
    the logits processors its marginal log-probabilities. The score of an answer is always that of
    the unchanged distributions.

    Args:
        search: the questions, their contexts and the settings.

    Returns:
        `RagGeneration`. The supporting passage has the largest posterior p(z|x,y_<=t), summed over
        the tokens of the answer. There are no candidates.

    Example:
        >>> rag_token(search).sequences.shape                               # doctest: +SKIP
        torch.Size([8, 12])
    """
    n_docs = search.n_docs
    likelihood = RagLoss("token", reduction="none")
    parts, answers, nll, shares = [], [], [], []
    for contexts in search.parts(tied=True):
        questions = contexts[::n_docs] // n_docs
        prior_scores = search.prior_scores[questions]
        marginal = MarginalLogits(prior_scores.log_softmax(dim=1), search.processors(1))
        tokens, hidden = search.generate(contexts, tied=True, processors=[marginal])
        answer = tokens[::n_docs]
        part_nll, log_posterior = likelihood(
            hidden.view(*prior_scores.shape, *hidden.shape[2:]),
            search.adapter.head(),
            answer,
            prior_scores,
        )
        counted = (answer != IGNORE_INDEX).unsqueeze(1)
        parts.append(questions)
        answers.append(answer)
        nll.append(part_nll)
        shares.append((log_posterior.exp() * counted).sum(dim=2))
    answer = join_answers(parts, answers)
    support = in_order(parts, shares).argmax(dim=1, keepdim=True)
    return RagGeneration(
        sequences=answer.masked_fill(answer == IGNORE_INDEX, search.pad_id),
        scores=-in_order(parts, nll),
        supporting_rows=search.rows.gather(1, support).squeeze(1),
        rows=search.rows,
        doc_scores=search.doc_scores,
        lengths=(answer != IGNORE_INDEX).sum(dim=1),
        loss=search.loss(),
    )
