"""What RagModel returns, as transformers ModelOutputs (Trainer reads them by name or index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class RagOutput(ModelOutput):
    """Loss and retrieval of one forward pass.

    Attributes:
        loss: scalar; None without labels.
        doc_scores: retrieval scores divided by tau, `[B, K]`, -inf at missing passages.
        rows: rows of the index, `[B, K]` int64, -1 at missing passages.
        log_posterior: log p(z|x,y), `[B, K]` (sequence) or `[B, K, T]` (token).
        n_cut: number of passages cut to fit the context, a 0-d int64 tensor.
        n_kept: number of contexts read with gradient, a 0-d int64 tensor; None unless pruned.
        dropped: posterior of the other contexts, a 0-d tensor; None unless pruned.
    """

    loss: Tensor | None = None
    doc_scores: Tensor | None = None
    rows: Tensor | None = None
    log_posterior: Tensor | None = None
    n_cut: Tensor | None = None
    n_kept: Tensor | None = None
    dropped: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise ValueError(
                "logits: expected a loss that needs none, because a RagModel never forms them; "
                "label smoothing is RagModel(label_smoothing=...), not label_smoothing_factor of "
                "TrainingArguments"
            )
        return super().__getitem__(key)


@dataclass
class RagGeneration(ModelOutput):
    """Answers of `RagModel.generate`.

    R answers, those of a question next to each other and best first: B, or B times
    `num_return_sequences`. C candidates of a question: K, or K times the beams under each passage.

    Attributes:
        sequences: the answers in the generator's vocabulary, `[R, T]`, EOS included, padded with
            the pad id.
        scores: log p(y|x) of the answer over the retrieved passages, `[R]`; -inf where a search
            found fewer answers than asked for.
        supporting_rows: row of the passage with the largest share in the answer, `[R]`; -1 where no
            passage was found.
        rows: retrieved rows, best first, `[B, K]`, -1 where missing.
        doc_scores: retrieval scores divided by tau, `[B, K]`.
        log_prior: log p(z|x) of the passages, `[B, K]`, -inf where missing; if none was found, the
            question alone has all mass, in the first place.
        log_posterior: log p(z|x,y), `[R, K]`; with RAG-Token log p(z|x,y_<=t) of each token,
            `[R, K, T]`, after an answer's end the prior.
        candidates: answers found under each passage, `[B, C, T]`, those of a passage next to each
            other; None with RAG-Token decoding, which searches from all passages together.
        candidate_scores: log p(y|x) of each candidate, `[B, C]`, -inf at missing passages; None
            with RAG-Token decoding.
        lengths: number of tokens of each answer, its EOS included, `[R]` int64.
        loss: scalar; None without labels.
    """

    sequences: Tensor | None = None
    scores: Tensor | None = None
    supporting_rows: Tensor | None = None
    rows: Tensor | None = None
    doc_scores: Tensor | None = None
    log_prior: Tensor | None = None
    log_posterior: Tensor | None = None
    candidates: Tensor | None = None
    candidate_scores: Tensor | None = None
    lengths: Tensor | None = None
    loss: Tensor | None = None
