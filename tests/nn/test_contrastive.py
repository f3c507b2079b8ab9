"""The contrastive terms against a literal softmax over the distinct passages of a batch."""

from __future__ import annotations

import pytest
import torch

from fastrag.nn.contrastive import Contrast, in_batch_nll
from tests.tiny import batch, rag_model


def literal(query, passage, rows, targets, tau):
    """One question at a time, each row of the index once."""
    known = {}
    for b, k in (rows >= 0).nonzero().tolist():
        known[int(rows[b, k])] = passage[b, k]
    terms = []
    for b, q in enumerate(query):
        scores = {row: q @ vector / tau for row, vector in known.items()}
        wanted = [scores[row] for row in set(targets[b].tolist()) if row in scores]
        if not wanted:
            terms.append(q.new_zeros(()))
            continue
        whole = torch.stack(list(scores.values())).logsumexp(0)
        terms.append(whole - torch.stack(wanted).logsumexp(0))
    return torch.stack(terms)


def test_equals_the_literal_terms():
    torch.manual_seed(0)
    query = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    index = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0, 3, 1], [3, 4, -1], [8, 0, 3], [-1, -1, -1]])
    passage = index[rows.clamp(min=0)]
    # several, one that only another question found, one that nobody found, none
    targets = torch.tensor([[3, 1], [8, -1], [7, -1], [-1, -1]])
    for chosen in (targets, rows):
        got = in_batch_nll(query, passage, rows, chosen, tau=0.7)
        want = literal(query, passage, rows, chosen, 0.7)
        torch.testing.assert_close(got, want)
        grads = [
            torch.autograd.grad(each.sum(), (query, index), retain_graph=True)
            for each in (got, want)
        ]
        torch.testing.assert_close(*grads)


def test_terms_enter_the_loss_of_a_training_step_alone():
    model = rag_model(tau=0.3)
    rows = torch.tensor([[0, 3, 1], [4, 1, -1], [2, 5, 6], [7, 8, 9]])
    data = {**batch(), "rows": rows}
    plain = model(**data)
    model.contrast = Contrast(in_batch=0.5, contrastive=2.0)
    positive = torch.tensor([[0], [1], [-1], [11]])
    found = model.retriever(data["input_ids"], data["attention_mask"], rows)
    n = int((data["labels"] != -100).sum())
    terms = [
        weight * in_batch_nll(found.query_emb, found.vectors, rows, targets, 0.3).sum() / n
        for weight, targets in ((0.5, rows), (2.0, positive))
    ]
    torch.testing.assert_close(model(**data, positive_rows=positive).loss, plain.loss + sum(terms))
    torch.testing.assert_close(model(**data).loss, plain.loss + terms[0])
    model.eval()
    torch.testing.assert_close(model(**data, positive_rows=positive).loss, plain.loss)


def test_given_scores_have_no_encoder_to_train():
    model = rag_model(in_batch=0.1)
    rows = torch.tensor([[0, 3, 1]] * 4)
    with pytest.raises(ValueError, match="doc_scores: expected None with in_batch or contrastive"):
        model(**batch(), rows=rows, doc_scores=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="contrastive: expected a number >= 0, got -1"):
        rag_model(contrastive=-1)
