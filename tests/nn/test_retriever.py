"""Retriever: one version of the index a step, whatever changes meanwhile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastrag import functional
from fastrag.index import FlatIndex, Hits, Index
from fastrag.nn import Retriever
from tests.threads import repeated
from tests.tiny import batch, encoder, rag_model, store

N = 12


def question_gradient(model, change=lambda index: None, **options) -> Tensor:
    """Gradient of the question encoder where the index changes between forward and backward."""
    data = batch()
    loss = model(**data, **options).loss
    change(model.index)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.question_encoder.parameters()])


def update(index: Index) -> None:
    index.update(torch.arange(N), torch.randn(N, index.dim))


CHANGES = {
    "update": update,
    "replace": lambda index: index.replace(torch.randn(N, index.dim)),
    "remove": lambda index: index.remove(torch.arange(N)),
    "add": lambda index: index.add(torch.randn(3, index.dim)),
    "to": lambda index: index.to("cpu"),
}


@pytest.mark.parametrize("rows", [None, torch.tensor([[0, 3, 1]] * 4)], ids=["searched", "given"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_are_those_of_the_version_that_was_searched(change, dtype, rows):
    def model():
        made = rag_model(tau=0.1)
        made.index = made.index.astype(dtype)
        return made

    expected = question_gradient(model(), rows=rows)
    assert torch.equal(question_gradient(model(), CHANGES[change], rows=rows), expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_a_question_of_bfloat16_is_searched_in_float32(weights):
    model = rag_model(tau=0.5)
    model.question_encoder.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        retrieved = model.retriever(batch()["input_ids"], batch()["attention_mask"])
    query, hits = retrieved.query_emb.detach().float(), retrieved.hits
    expected = model.index.search(query, hits.rows.shape[1])
    assert torch.equal(hits.rows, expected.rows) and torch.equal(hits.scores, expected.scores)
    assert retrieved.doc_scores.dtype == torch.float32
    scores = torch.einsum("bd,bkd->bk", query, hits.vectors) / 0.5
    torch.testing.assert_close(retrieved.doc_scores.detach(), scores)


@pytest.mark.parametrize("rows", [None, torch.tensor([[0, 3, -1]] * 4)], ids=["searched", "given"])
def test_another_thread_may_update_all_the_time(rows):
    """Scores, vectors, version and gradient of a step agree, whichever version it has met."""
    torch.manual_seed(0)
    model = rag_model(tau=0.5)
    versions = {model.index.version: model.index.vectors(torch.arange(N))}

    def change() -> None:
        vectors = torch.randn(N, model.index.dim)
        versions[model.index.version + 1] = vectors  # known before any step can meet it
        model.index.update(torch.arange(N), vectors)

    with repeated(change):
        for _ in range(50):
            retrieved = model.retriever(batch()["input_ids"], batch()["attention_mask"], rows)
            query, hits = retrieved.query_emb, retrieved.hits
            present = (hits.rows >= 0)[..., None]
            (found,) = torch.autograd.grad(retrieved.doc_scores[present[..., 0]].sum(), query)
            torch.testing.assert_close(found, hits.vectors.sum(1) / 0.5)
            torch.testing.assert_close(hits.scores, retrieved.doc_scores.detach() * 0.5)
            assert torch.equal(hits.vectors, versions[hits.version][hits.rows] * present)


def test_given_rows_are_scored_once_and_their_version_is_that_of_their_vectors(monkeypatch):
    class Torn(FlatIndex):
        """An index that changes each time that somebody has asked for its version."""

        @property
        def version(self) -> int:
            found = super().version
            update(self)
            return found

    model = rag_model()
    index = Torn(16)
    index.add(model.index.vectors(torch.arange(N)))
    model.index, rows, calls = index, torch.tensor([[0, 3, 1]] * 4), []
    score = functional.doc_scores
    monkeypatch.setattr(
        functional,
        "doc_scores",
        lambda *args, **options: calls.append(1) or score(*args, **options),
    )
    hits = model.retriever(batch()["input_ids"], batch()["attention_mask"], rows).hits
    assert hits.version == index._version and len(calls) == 1
    assert torch.equal(hits.vectors, index.vectors(rows))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_scores_and_prior_are_those_of_the_stored_vectors(dtype):
    """An index scored without its scale, or without its offset, would be caught here."""
    torch.manual_seed(0)
    vectors = 3.0 + torch.randn(N, 16) * torch.linspace(0.1, 5.0, 16)
    index = FlatIndex(16, dtype)
    index.add(vectors)
    retriever = Retriever(encoder(), None, index, store(), n_docs=4, tau=0.5)
    data = batch()
    retrieved = retriever(data["input_ids"], data["attention_mask"])
    stored = index.vectors(retrieved.hits.rows)
    torch.testing.assert_close(stored, vectors[retrieved.hits.rows], rtol=0.02, atol=0.06)
    expected = torch.einsum("bd,bkd->bk", retrieved.query_emb, stored) / 0.5
    torch.testing.assert_close(retrieved.doc_scores, expected)
    torch.testing.assert_close(retrieved.log_prior, expected.log_softmax(1))
    assert retrieved.hits.version == index.version == 1


def test_explored_hits_keep_rows_scores_and_vectors_together():
    torch.manual_seed(0)
    model = rag_model(explore=2, explore_tau=50.0, tau=1.0)
    for _ in range(5):
        hits = model.retriever(batch()["input_ids"], batch()["attention_mask"]).hits
        assert torch.equal(hits.vectors, model.index.vectors(hits.rows))
    assert hits.rows.shape == hits.scores.shape == (4, 3)


def test_candidates_are_chosen_by_fresh_scores():
    """With all passages as candidates, the K are those of a fresh index; they alone train."""
    model = rag_model(train_passage_encoder=True)
    with torch.no_grad():
        for parameter in model.passage_encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    data = batch()
    stale = model.retriever.search(data["input_ids"], data["attention_mask"])
    model.retriever.rescore = N
    found = model.retriever(data["input_ids"], data["attention_mask"])
    searched = model.retriever.search(data["input_ids"], data["attention_mask"])
    before = model.index.version
    model.retriever.rescore = None
    model.refresh_index()
    right = model.retriever.search(data["input_ids"], data["attention_mask"])
    assert not torch.equal(stale.rows, right.rows) and model.index.version == before + 1
    assert torch.equal(found.hits.rows, right.rows) and torch.equal(searched.rows, right.rows)
    torch.testing.assert_close(found.hits.scores, right.scores)
    torch.testing.assert_close(found.hits.vectors, model.index.vectors(right.rows))
    torch.testing.assert_close(found.doc_scores, right.scores / model.tau, rtol=1e-4, atol=1e-4)
    assert found.candidates.rows.shape == (4, N) and found.passage_emb.requires_grad
    assert model.passage_encoder.training


def test_rescoring_of_few_candidates_and_its_errors():
    model = rag_model()
    model.index.remove(torch.arange(2, N))
    model.retriever.rescore = 5
    data = batch()
    hits = model.retriever(data["input_ids"], data["attention_mask"]).hits
    assert hits.rows.shape == (4, 3) and hits.rows[:, 2].eq(-1).all()
    assert hits.scores[:, 2].isneginf().all() and not hits.vectors[:, 2].any()
    model.retriever.rescore = 2
    with pytest.raises(ValueError, match="rescore: expected at least 3 candidates for 3 passages"):
        model.retriever(data["input_ids"], data["attention_mask"])
    model.retriever.rescore, model.passage_encoder = 5, None
    with pytest.raises(ValueError, match="passage_encoder: expected a module to encode"):
        model.retriever(data["input_ids"], data["attention_mask"])


def kept_numbers(n_docs: int, passage_batch: int | None) -> tuple[int, list[torch.Tensor]]:
    """Return the numbers that a step keeps for backward, and the gradients."""
    torch.manual_seed(0)
    model = rag_model(n_docs=n_docs, train_passage_encoder=True, passage_batch=passage_batch)
    sizes: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    data = batch()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = model.retriever(data["input_ids"], data["attention_mask"])
        loss = found.log_prior[:, 0].sum()
    loss.backward()
    return sum(sizes), [each.grad for each in model.passage_encoder.parameters()]


def test_activations_of_passages_in_batches_do_not_grow_with_k():
    (few, _), (many, grads) = kept_numbers(3, 2), kept_numbers(10, 2)
    (all_few, _), (all_at_once, plain) = kept_numbers(3, None), kept_numbers(10, None)
    assert all_at_once - all_few > 10 * (many - few)
    assert any(each.abs().max() > 1e-3 for each in plain)
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-6)


def test_an_index_from_outside_with_four_methods():
    """All that a kind has to define; no matrix, no lock, no file."""

    class Rounded(Index):
        def __init__(self, vectors: Tensor) -> None:
            self.dim, self._vectors = vectors.shape[1], vectors.round()

        def __len__(self) -> int:
            return len(self._vectors)

        @property
        def device(self) -> torch.device:
            return self._vectors.device

        def search(self, query_emb, k, exclude=None, *, vectors=False):
            scores, rows = functional.mips_topk(query_emb.detach(), self._vectors, k)
            return Hits(scores, rows, self.vectors(rows) if vectors else None, self.version)

        def vectors(self, rows):
            return self._vectors[rows]

    model = rag_model(tau=1.0)
    model.index = Rounded(model.index.vectors(torch.arange(N)) * 4)
    assert question_gradient(model).isfinite().all()
    model.index.to("cpu")
    with pytest.raises(ValueError, match="index: expected one with `update`, got a Rounded"):
        model.index.update(torch.tensor([0]), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="index: expected one with `replace`, got a Rounded"):
        model.train_passage_encoder = True
        model.refresh_index()


def test_the_index_moves_with_the_module(monkeypatch):
    """There is no second device here: the move is the function that `to` applies to tensors."""
    retriever = Retriever(nn.Identity(), None, rag_model().index, store())
    moved = []
    for part in (retriever.index, retriever.passages):
        monkeypatch.setattr(part, "to", lambda device, part=part: moved.append((part, device)))
    gpu = torch.device("cuda", 0)
    retriever._apply(lambda tensor: SimpleNamespace(device=gpu))
    assert moved == [(part, gpu) for part in (retriever.index, retriever.passages)]
    moved.clear()
    retriever.to("cpu").double().to("meta")
    retriever.move_index = False
    retriever._apply(lambda tensor: SimpleNamespace(device=gpu))
    assert moved == []


class Narrow(nn.Module):
    """An encoder of width 8."""

    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(64, self.dim)

    def forward(self, input_ids, attention_mask):
        return self.words(input_ids)


def test_an_index_of_another_width_is_refused_where_it_meets():
    model, data = rag_model(), batch()
    index, loss = model.index, model(**data).loss
    other = FlatIndex(8)
    other.add(torch.randn(N, 8))
    with pytest.raises(ValueError, match="index: expected vectors of width 16 .* got 8"):
        model.index = other
    assert model.index is index and torch.equal(model(**data).loss, loss)
    # An encoder may be replaced before its index is, so the step is where they meet.
    model.question_encoder = Narrow()
    with pytest.raises(ValueError, match="index: expected vectors of width 8 .* got 16"):
        model(**data)
    with pytest.raises(ValueError, match="index: expected vectors of width 8 .* got 16"):
        model(**data, rows=torch.zeros(4, 3, dtype=torch.int64))
    model.index = other
    assert model(**data).loss.isfinite()


def test_the_gradient_of_a_passage_that_many_questions_found_repeats_to_the_bit():
    class Wide(nn.Module):
        """One vector for all passages, wide enough that torch adds its gradients in two threads."""

        dim = 4096

        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.zeros(self.dim))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.vector.expand(len(input_ids), -1)

    questions, passages = Wide(), Wide()
    index = FlatIndex(Wide.dim)
    index.add(torch.zeros(N, Wide.dim))
    retriever = Retriever(questions, passages, index, store(), train_passage_encoder=True)
    torch.manual_seed(0)
    rows = torch.randint(N, (128, 5))
    upstream = torch.randn(128, 5, Wide.dim)

    def gradient() -> Tensor:
        return torch.autograd.grad((retriever.encode_rows(rows) * upstream).sum(), passages.vector)[
            0
        ]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)
