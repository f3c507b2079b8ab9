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
    """

    loss: Tensor | None = None
    doc_scores: Tensor | None = None
    rows: Tensor | None = None
    log_posterior: Tensor | None = None
    n_cut: Tensor | None = None

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

    Attributes:
        sequences: best answer of each question in the generator's vocabulary, `[B, T]`, EOS
            included, padded with the pad id.
        scores: log p(y|x) of the answer over the retrieved passages, `[B]`.
        supporting_rows: row of the passage with the largest share in the answer, `[B]`; -1 where no
            passage was found.
        rows: retrieved rows, best first, `[B, K]`, -1 where missing.
        doc_scores: retrieval scores divided by tau, `[B, K]`.
        candidates: greedy answer under each passage, `[B, K, T]`; None with RAG-Token decoding,
            which generates one answer from all passages.
        candidate_scores: log p(y|x) of each candidate, `[B, K]`, -inf at missing passages; None
            with RAG-Token decoding.
        lengths: number of tokens of each answer, its EOS included, `[B]` int64.
        loss: scalar; None without labels.
    """

    sequences: Tensor | None = None
    scores: Tensor | None = None
    supporting_rows: Tensor | None = None
    rows: Tensor | None = None
    doc_scores: Tensor | None = None
    candidates: Tensor | None = None
    candidate_scores: Tensor | None = None
    lengths: Tensor | None = None
    loss: Tensor | None = None
