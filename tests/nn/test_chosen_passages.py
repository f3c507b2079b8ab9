"""Passages that are put among the K, kept out of them, added without text, or drawn by jsa."""

from __future__ import annotations

import pytest
import torch

from fastrag.nn import Retriever
from tests.tiny import batch, collator, encoder, questions, rag_model, store


def retriever(**settings):
    made = encoder()
    model = rag_model(n_docs=4)
    return Retriever(made, encoder(), model.index, store(), n_docs=4, tau=0.3, **settings)


def find(made, **chosen):
    data = batch()
    return made(data["input_ids"], data["attention_mask"], **chosen)


def test_given_rows_come_first_and_excluded_ones_never():
    made = retriever().eval()
    plain = find(made).hits.rows
    include = torch.tensor([[11, 10], [10, -1], [-1, -1], [int(plain[3, 0]), 9]])
    exclude = plain[:, 1:2]
    found = find(made, include=include, exclude=exclude)
    rows = found.hits.rows
    for b in range(4):
        given = [row for row in include[b].tolist() if row >= 0]
        left_out = [*given, int(exclude[b])]
        everything = find(made, n_docs=12).hits.rows[b].tolist()
        others = [row for row in everything if row not in left_out]
        assert rows[b].tolist() == (given + others)[:4]
    vectors = made.index.vectors(rows)
    want = torch.einsum("bd,bkd->bk", found.query_emb, vectors) / 0.3
    torch.testing.assert_close(found.doc_scores, want)
    torch.testing.assert_close(found.hits.vectors, vectors)


def test_given_rows_leave_the_drawn_ones_in():
    made = retriever(explore=2, explore_tau=1e3).train()
    nearest = find(made.eval()).hits.rows
    made.train()
    include = torch.full((4, 1), 11)
    rows = torch.stack([find(made, include=include).hits.rows for _ in range(20)])
    assert (rows[..., 0] == 11).all()
    assert (rows[..., 3] == nearest[:, 0]).float().mean() > 0.9  # 11 may be the nearest
    assert len(rows[..., 1].unique()) > 4


def test_null_passage_has_a_learned_share_and_the_question_alone():
    model = rag_model(null_passage=True, null_score=0.5, tau=0.3)
    rows = torch.tensor([[0, 3, 1], [4, -1, -1], [2, 5, 6], [-1, -1, -1]])
    out = model(**batch(), rows=rows)
    scores = out.doc_scores.detach()
    assert out.rows[:, 3].tolist() == [-1] * 4
    present = rows[:3] >= 0
    mean = torch.where(present, scores[:3, :3], 0.0).sum(1) / present.sum(1)
    torch.testing.assert_close(scores[:, 3], torch.cat([mean, torch.zeros(1)]) + 0.5)
    out.loss.backward()
    grad = model.null_score.grad
    posterior = out.log_posterior.exp()[:, 3]  # [B, T]
    prior = scores.softmax(1)[:, 3:]
    counted = batch()["labels"] != -100
    want = ((prior - posterior) * counted).sum() / counted.sum()
    torch.testing.assert_close(grad, want)
    answer = model.eval().generate(**{k: v for k, v in batch().items() if k != "labels"})
    assert answer.log_prior.shape == (4, 4) and (answer.log_prior[:, 3] > -20).all()


def test_null_passage_is_saved(tmp_path):
    model = rag_model(null_passage=True, null_score=0.5, prune=0.1, objective="topk:2")
    model.save_pretrained(tmp_path / "m", include_index=True)
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert loaded.null_score.item() == 0.5 and loaded.prune == 0.1
    assert loaded.loss_fn.objective == "topk:2"
    with pytest.raises(ValueError, match="null_passage: expected False, since transformers"):
        loaded.to_hf()


def jsa_model(**settings):
    return rag_model(
        objective="jsa:20", marginal="sequence", posterior_encoder=encoder(seed=3), **settings
    )


def test_posterior_encoder_is_saved(tmp_path):
    model, data = jsa_model(prune=0.0), collator(posterior=True)(questions(4))
    with torch.no_grad():
        model.posterior_encoder.model.embeddings.word_embeddings.weight.add_(0.1)
    model.save_pretrained(tmp_path / "m", include_index=True)
    loaded = type(model).from_pretrained(tmp_path / "m").train()
    losses = []
    for each in (model, loaded):
        torch.manual_seed(0)
        losses.append(each(**data).loss)
    assert losses[0] == losses[1]
    # An encoder that is also that of the questions stays so.
    model.posterior_encoder = model.question_encoder
    model.save_pretrained(tmp_path / "m", include_index=True)
    assert not (tmp_path / "m" / "posterior_encoder").exists()
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert loaded.posterior_encoder is loaded.question_encoder
    # A state dict, as a checkpoint of Trainer, has it as well.
    assert any(name.startswith("retriever.posterior_enc") for name in jsa_model().state_dict())


def test_jsa_reads_passages_of_question_and_answer():
    model = jsa_model()
    data = collator(posterior=True)(questions(4))
    torch.manual_seed(0)
    out = model(**data)
    assert out.rows.shape == out.log_posterior.shape == (4, 6)
    q = model.posterior_encoder(data["posterior_ids"], data["posterior_mask"])
    nearest = model.index.search(q.detach(), 3).rows
    assert out.rows[:, :3].equal(nearest)
    assert all(len(set(row)) == 6 for row in out.rows.tolist())
    out.loss.backward()
    parts = [model.question_encoder, model.generator, model.posterior_encoder]
    grads = [[p.grad for p in part.parameters()] for part in parts]
    assert all(any(g is not None and g.any() for g in each) for each in grads)
    # Reading with gradient only what the chain visited changes nothing.
    losses = []
    for model.prune in (None, 0.0):
        torch.manual_seed(0)
        out = model(**data)
        losses.append(out.loss)
    torch.testing.assert_close(*losses)
    assert 4 <= int(out.n_kept) < 24
    # An evaluation computes the likelihood that the draws estimate.
    model.eval()
    plain = rag_model(marginal="sequence").eval()
    del data["posterior_ids"], data["posterior_mask"]
    torch.testing.assert_close(model(**data).loss, plain(**data).loss)


def test_rejects():
    given = {"rows": torch.zeros(4, 3, dtype=torch.int64), "include_rows": torch.zeros(4, 1).long()}
    with pytest.raises(ValueError, match="posterior_ids: expected None with rows, which"):
        rag_model()(**batch(), **given)
    with pytest.raises(ValueError, match="posterior_ids: expected None with doc_scores"):
        rag_model()(**batch(), **given, doc_scores=torch.zeros(4, 3))
    data = collator(posterior=True)(questions(4))
    with pytest.raises(ValueError, match="posterior_ids: expected None without a posterior_enc"):
        rag_model()(**data)
    with pytest.raises(ValueError, match="posterior_ids: expected questions with answers for"):
        jsa_model()(**batch())
    with pytest.raises(ValueError, match="posterior_encoder: expected None with the objective pdi"):
        rag_model(objective="pdist", posterior_encoder=encoder())
