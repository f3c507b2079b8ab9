"""The registry of decoders: the model's own marginal by default, and a decoder from outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrag.generation import DECODERS, Search
from fastrag.generation.answers import answer_questions
from fastrag.nn.outputs import RagGeneration
from tests import tiny


def nearest_passage(search: Search) -> RagGeneration:
    """Answer from the nearest passage alone."""
    [reading] = search.readings()
    answers, _ = search.generate(reading)
    first = answers[:: search.n_docs]
    return RagGeneration(
        sequences=first.masked_fill(first < 0, search.pad_id),
        supporting_rows=search.rows[:, 0],
        rows=search.rows,
        lengths=(first >= 0).sum(1),
        loss=search.loss(),
    )


def test_a_decoder_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODERS, "nearest", nearest_passage)
    model = tiny.rag_model("causal", tau=0.1).eval()
    data = tiny.batch("causal")
    out = model.generate(**data, marginal="nearest", max_new_tokens=3)
    candidates = model.generate(**data, marginal="sequence", max_new_tokens=3).candidates
    assert out.sequences.equal(candidates[:, 0])
    assert out.supporting_rows.equal(out.rows[:, 0])
    with pytest.raises(ValueError, match="scores: expected the decoder to return this field"):
        answer_questions(model, ["ada"], marginal="nearest")
    with torch.no_grad():
        assert out.loss.item() == pytest.approx(model(**data).loss.item(), rel=1e-5)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_decoding_follows_the_marginal_of_the_model(marginal: Any) -> None:
    model = tiny.rag_model("causal", tau=0.1, marginal=marginal).eval()
    out = model.generate(**tiny.batch("causal"), max_new_tokens=3)
    other = model.generate(**tiny.batch("causal"), max_new_tokens=3, marginal=marginal)
    assert out.scores.equal(other.scores)
    assert (out.candidates is None) == (marginal == "token")
