"""evaluate: metrics from predictions, independence from the batch, what is judged and what not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fastrag.data import Question
from fastrag.eval import BM25Retriever, calibrate, evaluate
from fastrag.eval.batches import choose_fixed
from fastrag.nn import RagLoss, RagModel
from tests import tiny


class _Perfect(torch.nn.Module):
    """An encoder that gives every person a direction of its own: token ids to a one-hot vector."""

    def __init__(self, tokenizer: Any, dim: int) -> None:
        super().__init__()
        self.names = tokenizer.convert_tokens_to_ids(list(tiny.NAMES))
        self.dim = dim
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hits = [(input_ids == name).any(dim=1) for name in self.names]
        return torch.stack(hits, dim=1).float() * self.scale


@pytest.fixture
def perfect() -> RagModel:
    """A model that retrieves each person's passage first."""
    model = tiny.rag_model()
    encoder = _Perfect(model.processor.question_tokenizer, dim=len(tiny.NAMES))
    model.question_encoder = model.passage_encoder = encoder
    model.index = type(model.index)(encoder.dim)
    model.refresh_index()
    return model


def test_recall_by_passage_id(perfect: RagModel) -> None:
    result = evaluate(perfect, tiny.questions(), ks=(1, 3), max_new_tokens=2)
    assert result.metrics["recall@1"] == 1.0
    assert [each.hit_rank for each in result.predictions] == [0] * 12
    assert [each.retrieved[0] for each in result.predictions] == [f"p{i}" for i in range(12)]
    wrong = [Question(q.id, q.question, q.answers, positive_ids=("p0",)) for q in tiny.questions(4)]
    result = evaluate(perfect, wrong, ks=1, max_new_tokens=2)
    assert result.metrics["recall@1"] == 0.25


def test_recall_counts_the_first_k(perfect: RagModel) -> None:
    found = evaluate(perfect, tiny.questions(), ks=3, max_new_tokens=2)
    second = [
        Question(q.id, q.question, q.answers, positive_ids=(p.retrieved[1],))
        for q, p in zip(tiny.questions(), found.predictions, strict=True)
    ]
    result = evaluate(perfect, second, ks=(1, 2), max_new_tokens=2)
    assert (result.metrics["recall@1"], result.metrics["recall@2"]) == (0.0, 1.0)


def test_recall_by_answer_text_when_no_positive_is_named(perfect: RagModel) -> None:
    questions = [
        Question("a", "ada", answers=("RED",)),
        Question("b", "bob", answers=("likes red",)),
    ]
    result = evaluate(perfect, questions, ks=(1,), max_new_tokens=2)
    assert [each.hit_rank for each in result.predictions] == [0, -1]
    assert result.metrics["recall@1"] == 0.5


def test_metrics_are_means_of_the_predictions(perfect: RagModel) -> None:
    questions = tiny.questions()
    answered = evaluate(perfect, questions, max_new_tokens=2).predictions
    pairs = list(zip(questions, answered, strict=True))
    # accept what the model says for the first three, so that EM is not trivially 0
    known = [
        Question(q.id, q.question, ("no such colour", p.prediction or "red"), q.positive_ids)
        if i < 3
        else Question(q.id, q.question, ("no such colour",), q.positive_ids)
        for i, (q, p) in enumerate(zip(questions, answered, strict=True))
    ]
    result = evaluate(perfect, known, max_new_tokens=2)
    said = sum(bool(each.prediction) for each in answered[:3])
    assert result.metrics["em"] == said / 12
    assert result.metrics["em"] == sum(p.exact_match for p in result.predictions) / 12
    assert result.metrics["f1"] == pytest.approx(sum(p.f1 for p in result.predictions) / 12)
    chatty = [Question(q.id, q.question, (p.prediction[1:] or "x",)) for q, p in pairs]
    covered = evaluate(perfect, chatty, max_new_tokens=2)
    assert covered.metrics["cover_em"] == sum(len(p.prediction) > 1 for p in answered) / 12
    assert covered.metrics["em"] == 0.0


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_decoding_follows_the_marginal(marginal: str) -> None:
    model = tiny.rag_model(marginal=marginal, tau=0.1)
    settings: dict[str, Any] = {"max_new_tokens": 3, "progress": False}
    result = evaluate(model, tiny.questions(4), **settings)
    assert result.decoding == f"RAG-{marginal.capitalize()}, K = 3"
    found = result.predictions
    for asked in ("token", "sequence"):
        other = evaluate(model, tiny.questions(4), marginal=asked, **settings)
        assert other.marginal == asked
        assert (other.predictions == found) == (asked == marginal)
    expected = model.eval().generate(**tiny.batch(), max_new_tokens=3)
    assert [each.log_prob for each in found] == pytest.approx(expected.scores.tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_batch_does_not_matter(kind: str) -> None:
    model = tiny.rag_model(kind)
    results = [
        evaluate(
            model,
            tiny.questions(),
            batch_size=size,
            max_new_tokens=3,
            loss=True,
        )
        for size in (1, 5, 12)
    ]
    for other in results[1:]:
        assert other.metrics == pytest.approx(results[0].metrics, rel=1e-5)
        for a, b in zip(results[0].predictions, other.predictions, strict=True):
            assert (a.prediction, a.passage_id, a.retrieved) == (
                b.prediction,
                b.passage_id,
                b.retrieved,
            )
            assert a.log_prob == pytest.approx(b.log_prob, rel=1e-4)


def test_loss_is_that_of_all_questions_at_once() -> None:
    model = tiny.rag_model()
    collator = tiny.collator()
    questions = [
        Question(q.id, q.question, (" ".join(["red"] * (1 + i % 3)),))
        for i, q in enumerate(tiny.questions())
    ]
    model.eval()
    with torch.no_grad():
        expected = float(model(**collator(questions)).loss)
    result = evaluate(model, questions, batch_size=5, max_new_tokens=1, loss=True)
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert "loss" not in evaluate(model, questions, max_new_tokens=1).metrics


@pytest.mark.parametrize("asked", ["token", "sequence"])
@pytest.mark.parametrize("trained", ["token", "sequence"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"objective": "emdr2"}])
def test_nll_is_the_likelihood_under_the_marginal_of_the_decoding(
    trained: str, asked: str, settings: dict[str, Any]
) -> None:
    """Whatever the model is trained on; `loss` is that."""
    model = tiny.rag_model(marginal=trained, **settings).eval()
    questions = [
        Question(q.id, q.question, (" ".join(["red"] * (1 + i % 3)),))
        for i, q in enumerate(tiny.questions())
    ]
    found = evaluate(
        model, questions, batch_size=5, marginal=asked, max_new_tokens=1, loss=True, progress=False
    )
    collator = tiny.collator()
    with torch.no_grad():
        assert found.metrics["loss"] == pytest.approx(
            float(model(**collator(questions)).loss), rel=1e-5
        )
        model.loss_fn = RagLoss(asked)
        one_by_one = [float(model(**collator([question])).loss) for question in questions]
        together = float(model(**collator(questions)).loss)
    assert found.values["nll"] == pytest.approx(one_by_one, rel=1e-5)
    assert found.weights["nll"] == [2.0, 3.0, 4.0] * 4  # the words and the end
    assert found.metrics["nll"] == pytest.approx(together, rel=1e-5)
    assert list(found.summary) == ["recall@1", "recall@5", "em", "f1", "loss", "n_questions"]
    low, high = found.interval("nll") or (0.0, 0.0)
    assert low <= found.metrics["nll"] <= high and found.interval("loss") is None


def test_another_retriever_finds_the_passages_and_gives_the_prior() -> None:
    model = tiny.rag_model(n_docs=2).eval()
    questions = [
        Question(q.id, f"{q.question} likes", q.answers, q.positive_ids) for q in tiny.questions(6)
    ]
    bm25 = BM25Retriever(model.passages)
    settings: dict[str, Any] = {"max_new_tokens": 2, "loss": True, "progress": False}
    found = evaluate(model, questions, retriever=bm25, ks=(1, 2), **settings)
    hits = bm25(questions, 2)
    assert [each.retrieved[0] for each in found.predictions] == [f"p{i}" for i in range(6)]
    for prediction, prior in zip(found.predictions, hits.scores.softmax(1).tolist(), strict=True):
        assert prediction.prior == pytest.approx(prior)
    batch = tiny.collator()(questions)
    with torch.no_grad():
        loss = float(model(**batch, rows=hits.rows, doc_scores=hits.scores).loss)
        dense = float(model(**batch, rows=hits.rows).loss)
    assert abs(loss - dense) > 1e-3
    assert found.metrics["nll"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    wide = evaluate(model, questions, retriever=bm25, n_docs=3, **settings)
    assert wide.metrics["loss"] == pytest.approx(loss, rel=1e-5) != wide.metrics["nll"]
    # a question without a word of any passage: no passage, no prior, and still an answer
    [none] = evaluate(model, [{"question": "zzz"}], retriever=bm25, **settings).predictions
    assert none.retrieved == none.prior == () and math.isfinite(none.log_prob)
    with pytest.raises(ValueError, match="retriever: expected one of the model's passages, got"):
        evaluate(model, questions, retriever=BM25Retriever(tiny.store()))


def test_the_prior_is_compared_with_what_is_right(perfect: RagModel) -> None:
    found = evaluate(perfect, tiny.questions(), ks=1, max_new_tokens=2, progress=False)
    assert found.calibration is not None and found.calibration.sums.shape[0] == 12
    assert sum(each.n for each in found.calibration.bins) == 12 * perfect.n_docs
    priors = [each.prior for each in found.predictions]
    assert all(sum(prior) == pytest.approx(1.0) for prior in priors)
    assert found.metrics["ece"] == pytest.approx(calibrate(priors, [[True, False, False]] * 12).ece)
    low, high = found.interval("ece") or (0.0, 0.0)
    assert low <= found.metrics["ece"] <= high
    bare = evaluate(perfect, [{"question": "ada"}], max_new_tokens=2, progress=False)
    assert bare.calibration is None and "ece" not in bare.metrics


def test_questions_without_answers_or_positives() -> None:
    model = tiny.rag_model()
    questions = [{"id": "x", "question": "ada"}]
    result = evaluate(model, questions, max_new_tokens=2, loss=True)
    assert result.metrics == {"n_questions": 1.0}
    [prediction] = result.predictions
    assert math.isnan(prediction.exact_match) and prediction.hit_rank is None
    assert prediction.passage_id in prediction.retrieved


def test_some_questions_without_answers() -> None:
    """They are asked with the others and left out of EM, F1 and the loss."""
    model, settings = tiny.rag_model(), {"max_new_tokens": 2, "loss": True, "progress": False}
    questions = tiny.questions(5)
    bare = [Question(q.id, q.question) for q in questions[1:3]]
    mixed = [questions[0], *bare, *questions[3:]]
    known = evaluate(model, [questions[0], *questions[3:]], **settings)
    found = evaluate(model, mixed, **settings)
    assert found.metrics == pytest.approx(known.metrics | {"n_questions": 5.0}, rel=1e-5)
    whole = evaluate(model, questions, **settings)
    said = [[each.prediction for each in result.predictions] for result in (found, whole)]
    assert said[0] == said[1]


def test_records_are_read_as_the_collator_reads_them() -> None:
    """SQuAD's answers, one plain text, or `answer`: metrics and labels mean the same texts."""
    model = tiny.rag_model()
    asked = {"question": "ada"}
    records = [
        {**asked, "answers": {"text": ["red"], "answer_start": [0]}, "positive": "p0"},
        {**asked, "answer": "red"},
        {**asked, "answers": "red", "id": "third"},
    ]
    result = evaluate(model, records, max_new_tokens=2, loss=True)
    assert [each.answers for each in result.predictions] == [("red",)] * 3
    assert [each.id for each in result.predictions] == ["0", "1", "third"]
    assert "loss" in result.metrics and "em" in result.metrics
    with pytest.raises(ValueError, match=r"questions\[0\]: question: expected text, got nothing"):
        evaluate(model, [{"answers": ["red"]}])


def test_one_search_serves_recall_answer_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.rag_model()
    widths: list[int] = []
    plain = type(model.index).search

    def search(index: Any, query_emb: torch.Tensor, k: int, exclude: Any = None, **how: Any) -> Any:
        widths.append(k)
        return plain(index, query_emb, k, exclude, **how)

    monkeypatch.setattr(type(model.index), "search", search)
    settings: dict[str, Any] = {"batch_size": 6, "max_new_tokens": 2, "loss": True}
    few = evaluate(model, tiny.questions(), ks=(1,), **settings)
    many = evaluate(model, tiny.questions(), ks=(1, 8), n_docs=2, **settings)
    assert widths == [3, 3, 8, 8]
    assert few.metrics["loss"] == pytest.approx(many.metrics["loss"])
    assert [len(each.retrieved) for each in few.predictions] == [1] * 12
    assert [len(each.retrieved) for each in many.predictions] == [8] * 12


def test_random_state_and_training_mode_stay(perfect: RagModel) -> None:
    perfect.train()
    state = torch.get_rng_state()
    evaluate(perfect, tiny.questions(4), max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in perfect.modules())
    assert all(parameter.grad is None for parameter in perfect.parameters())


def test_the_bar_says_seconds_a_question_and_moves_within_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm import auto

    places: list[float] = []

    class Bar(auto.tqdm):
        def update(self, n: float = 1) -> bool | None:
            places.append(self.n + n)
            return super().update(n)

    model = tiny.rag_model("causal")  # shows bars of its own
    capsys.readouterr()
    monkeypatch.setattr(auto, "tqdm", lambda **settings: Bar(**settings, mininterval=0.0))
    evaluate(model, tiny.questions(4), loss=True)
    assert places[-1] == pytest.approx(4.0)
    assert len([place for place in places if 0.0 < place < 4.0]) >= 3
    assert places == sorted(places)
    first = capsys.readouterr().err.split("\r")[2]  # the first is empty, the second at 0
    assert re.search(r"\d\.\d/4 questions \[.*s/q\]", first), first


def test_choose_fixed() -> None:
    questions = list(range(10))
    assert choose_fixed(questions, 4) == [0, 2, 5, 7]
    assert choose_fixed(questions, 20) == questions == choose_fixed(questions, None)
    with pytest.raises(ValueError, match="limit: expected an integer >= 1 or None, got 0"):
        choose_fixed(questions, 0)


def test_rejects_bad_input(perfect: RagModel) -> None:
    with pytest.raises(ValueError, match="questions: expected at least one question, got none"):
        evaluate(perfect, [])
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        evaluate(perfect, tiny.questions(), batch_size=0)
    with pytest.raises(ValueError, match="n_docs: expected an integer >= 1 or None, got 0"):
        evaluate(perfect, tiny.questions(), n_docs=0)
    with pytest.raises(ValueError, match="ks: expected one or more integers >= 1"):
        evaluate(perfect, tiny.questions(), ks=())
    for ks in ("5", 2.5):
        with pytest.raises(ValueError, match="ks: expected a whole number, got "):
            evaluate(perfect, tiny.questions(), ks=ks)
    with pytest.raises(ValueError, match="ks: expected one or more integers >= 1, got .*0"):
        evaluate(perfect, tiny.questions(), ks=0)
