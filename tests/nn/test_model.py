"""RagModel: loss and gradients, retrieval, exploring, bad input, training loops."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fastrag import functional
from fastrag.data import Passage, Template
from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import RagModel, TextEncoder
from fastrag.nn.encoders import CONFIG_NAME
from tests.tiny import (
    T5,
    TEMPLATE,
    VOCAB,
    batch,
    collator,
    encoder,
    passages,
    processor,
    questions,
    rag_model,
    tokenizer,
)

KINDS = ["seq2seq", "causal"]


def literal_loss(model, data, rows):
    """The loss put together step by step, one question and one passage at a time."""
    query = model.question_encoder(data["input_ids"], data["attention_mask"])
    vectors = model.index.vectors(rows)
    scores = torch.einsum("bd,bkd->bk", query, vectors) / model.tau
    log_prior = scores.masked_fill(rows < 0, -torch.inf).log_softmax(dim=1)
    total, count = 0.0, 0
    words = model.processor.generator_tokenizer
    for b in range(len(rows)):
        labels = data["labels"][b][data["labels"][b] != -100]
        count += len(labels)
        joint = []
        for k, row in enumerate(rows[b].tolist()):
            passage = ""
            if row >= 0:
                stored = model.passages
                passage = TEMPLATE.render_passage(Passage("", stored.title(row), stored.text(row)))
            question = words.decode(data["prompt_ids"][b][data["prompt_mask"][b].bool()])
            ids = words(TEMPLATE.render(passage, question), return_tensors="pt")["input_ids"]
            hidden = model.adapter.hidden(ids, torch.ones_like(ids), labels[None])[0, 0]
            logp = model.adapter.head().logits(hidden).log_softmax(dim=-1)
            joint.append(log_prior[b, k] + logp.gather(1, labels[:, None])[:, 0])
        joint = torch.stack(joint)  # [K, T]
        if model.marginal == "token":
            total = total - joint.logsumexp(dim=0).sum()
        else:
            prior = log_prior[b]
            total = total - (prior + (joint - prior[:, None]).nan_to_num(0.0).sum(1)).logsumexp(0)
    return total / count


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_literal_loss(kind, marginal):
    model = rag_model(kind, marginal=marginal, tau=0.3)
    model.eval()
    data = batch(kind)
    rows = torch.tensor([[0, 3, 1], [4, 1, -1], [2, 5, 6], [7, -1, -1]])
    out = model(**data, rows=rows)
    torch.testing.assert_close(out.loss, literal_loss(model, data, rows), rtol=1e-5, atol=1e-6)
    assert out.doc_scores.isneginf().equal(rows < 0)
    assert out.log_posterior.shape == ((4, 3, 2) if marginal == "token" else (4, 3))


def test_gradient_reaches_questions_and_generator_alone():
    model = rag_model()
    model(**batch()).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    frozen = "retriever.passage_encoder"
    assert all(g is None for name, g in grads.items() if name.startswith(frozen))
    assert not any(p.requires_grad for p in model.passage_encoder.parameters())
    assert all(
        g is not None and g.isfinite().all()
        for name, g in grads.items()
        if not name.startswith(frozen)
    )


@pytest.mark.parametrize("objective", ["emdr2", "pdist", "replug"])
def test_other_objectives_train_their_sides(objective):
    model = rag_model(objective=objective, tau_lm=0.5, tau=0.3)
    assert (model.loss_fn.objective, model.loss_fn.tau_lm) == (objective, 0.5)
    model(**batch()).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in model.question_encoder.parameters())
    frozen = objective == "replug"
    assert all((p.grad is None) == frozen for p in model.generator.parameters())
    assert all(p.requires_grad != frozen for p in model.generator.parameters())


def test_fresh_passages_carry_gradient_and_are_encoded_once(monkeypatch):
    model = rag_model(train_passage_encoder=True, tau=0.2)
    seen = []
    plain = model.passage_encoder.forward
    monkeypatch.setattr(
        model.passage_encoder,
        "forward",
        lambda ids, mask: seen.append(len(ids)) or plain(ids, mask),
    )
    rows = torch.tensor([[0, 3, 1], [3, 1, -1], [2, 0, 3], [1, -1, -1]])
    out = model(**batch(), rows=rows)
    assert seen == [4]  # rows 0..3, each once
    out.loss.backward()
    assert all(p.grad is not None for p in model.passage_encoder.parameters())
    # The index holds the same vectors, so scores and loss are those of the stored index.
    model.eval()
    with torch.no_grad():
        stored = model(**batch(), rows=rows)
    assert seen == [4]
    torch.testing.assert_close(out.loss.detach(), stored.loss)
    torch.testing.assert_close(out.doc_scores.detach(), stored.doc_scores, rtol=1e-4, atol=1e-5)


def test_one_encoder_for_questions_and_passages():
    model = rag_model(shared=True, train_passage_encoder=True)
    assert model.passage_encoder is model.question_encoder
    assert not any(name.startswith("retriever.passage_encoder") for name in model.state_dict())
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.question_encoder.parameters())
    clone = rag_model(shared=True, train_passage_encoder=True, seed=3)
    clone.load_state_dict(model.state_dict())
    clone.index = model.index
    torch.testing.assert_close(clone(**batch()).loss, model(**batch()).loss)


def test_learned_temperature():
    model = rag_model(tau=0.3, learn_tau=True)
    out = model(**batch())
    out.loss.backward()
    assert math.isclose(model.tau.item(), 0.3, rel_tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a number made of what has a gradient
        assert "tau=0.3," in repr(model)
    assert model.log_tau.grad.abs() > 0
    fixed = rag_model(tau=0.3)
    torch.testing.assert_close(fixed(**batch()).loss, out.loss)
    assert "retriever.log_tau" in model.state_dict() and "log_tau" not in fixed.state_dict()


def test_default_temperature_follows_normalisation():
    assert rag_model().tau == 0.05
    assert rag_model(normalize=False).tau == 1.0


def test_normalizer_adds_up_over_micro_batches():
    model = rag_model(tau=0.1)
    model.eval()
    whole = batch(n=4)
    count = (whole["labels"] != -100).sum()
    parts = [batch(n=2), collator()(questions(4)[2:])]
    summed = sum(model(**part, num_items_in_batch=count).loss for part in parts)
    torch.testing.assert_close(summed, model(**whole).loss)


def test_all_labels_ignored_is_loss_zero():
    model = rag_model()
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    loss = model(**data).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_example_weight_and_retrieval_without_labels():
    model = rag_model(tau=0.1)
    model.eval()
    data = batch()
    out = model(data["input_ids"], data["attention_mask"])
    assert out.loss is None and out.rows.shape == (4, 3)
    first = {name: value[:1] for name, value in data.items()}
    weighted = model(**data, example_weight=torch.tensor([1.0, 0, 0, 0]), num_items_in_batch=1)
    torch.testing.assert_close(weighted.loss, model(**first, num_items_in_batch=1).loss)


def test_retrieve_is_brute_force_and_ignores_training_mode():
    model = rag_model(dropout=0.5, explore=2)
    data = batch()
    scores, rows = model.retrieve(data["input_ids"], data["attention_mask"], 5)
    assert model.training
    model.eval()
    with torch.no_grad():
        query = model.question_encoder(data["input_ids"], data["attention_mask"])
    expected = (query @ model.index.index_emb.T).topk(5)
    assert rows.equal(expected.indices)
    torch.testing.assert_close(scores, expected.values)
    assert model(**data).rows.equal(rows[:, :3])


def test_more_passages_asked_for_than_there_are():
    model = rag_model(n_passages=2, n_docs=5, tau=0.1)
    out = model(**batch(n=2))
    assert (out.rows >= 0).sum(dim=1).tolist() == [2, 2]
    assert out.doc_scores.isneginf().equal(out.rows < 0)
    two = rag_model(n_passages=2, n_docs=2, tau=0.1)
    torch.testing.assert_close(out.loss, two(**batch(n=2)).loss)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_all_passages_missing_gives_loss_zero_and_finite_gradients(kind):
    model = rag_model(kind)
    out = model(**batch(kind, 2), rows=torch.full((2, 3), -1))
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_explore_keeps_the_nearest_and_draws_the_rest():
    model = rag_model(n_docs=4, explore=2, explore_pool=None, explore_tau=50.0, tau=0.1)
    data = batch()
    _, nearest = model.retrieve(data["input_ids"], data["attention_mask"], 12)
    torch.manual_seed(0)
    drawn = [model(data["input_ids"], data["attention_mask"]).rows for _ in range(60)]
    torch.manual_seed(0)
    assert model(data["input_ids"], data["attention_mask"]).rows.equal(drawn[0])
    for rows in drawn:
        assert rows[:, :2].equal(nearest[:, :2])
        assert all(len(set(row)) == 4 for row in rows.tolist())
    others = torch.stack(drawn)[:, 0, 2:].flatten().tolist()
    assert set(others) == set(nearest[0, 2:].tolist())  # nearly uniform: every one shows up
    model.eval()
    assert model(data["input_ids"], data["attention_mask"]).rows.equal(nearest[:, :4])


def test_explore_follows_the_softened_prior():
    """Frequencies of one explored place against softmax(s / (tau * explore_tau))."""
    model = rag_model(n_docs=2, explore=1, explore_pool=None, explore_tau=2.0, tau=0.2)
    data = batch(n=1)
    scores, nearest = model.retrieve(data["input_ids"], data["attention_mask"], 12)
    expected = (scores[0, 1:] / 0.4).softmax(dim=0)
    ids = data["input_ids"].expand(500, -1)
    torch.manual_seed(1)
    rows = torch.cat([model(ids).rows[:, 1] for _ in range(8)])
    counts = (rows[:, None] == nearest[0, 1:]).float().mean(dim=0)
    assert (counts - expected).abs().max() < 0.03


def test_explore_more_than_there_are():
    model = rag_model(n_passages=3, n_docs=5, explore=3)
    rows = model(**batch(n=2)).rows
    assert (rows >= 0).sum(dim=1).tolist() == [3, 3]


def test_flat_prior_warns_once():
    model = rag_model(tau=100.0)
    with pytest.warns(UserWarning, match="nearly uniform in the first batch .* tau = 100"):
        model(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch())
        rag_model(tau=0.05)(**batch())


def test_cut_passages_are_counted_and_questions_kept():
    model = rag_model(max_context=6)
    assert (
        model.processor.bound.n_literal_tokens + 1 + 3 == 7
    )  # literals, question, passage: one too many
    assert int(model(**batch()).n_cut) == 12
    assert int(rag_model(max_context=7)(**batch()).n_cut) == 0


def test_eval_is_deterministic_and_dropout_is_not():
    model = rag_model(dropout=0.3, tau=0.1)
    assert model(**batch()).loss != model(**batch()).loss
    model.eval()
    assert model(**batch()).loss == model(**batch()).loss


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_in_a_bare_loop(kind):
    """A copy task: retrieval must find the passage, the generator must copy its second word."""
    model = rag_model(kind, tau=0.1)
    data = batch(kind, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_refresh_makes_and_renews_the_index():
    model = rag_model(fill_index=False, train_passage_encoder=True)
    with pytest.raises(ValueError, match=r"index: .* empty index; call refresh_index\(\)"):
        model(**batch())
    model.refresh_index(batch_size=5)
    assert len(model.index) == 12 and model.training
    before = model.index.index_emb.clone()
    with torch.no_grad():
        for parameter in model.passage_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.refresh_index()
    assert not torch.equal(model.index.index_emb, before)
    with torch.no_grad():
        ids, lengths = model.passages.gather(torch.tensor([4]), "encoder")
        expected = model.passage_encoder(ids, torch.ones_like(ids))
    torch.testing.assert_close(model.index.index_emb[4:5], expected)


def test_deepcopy_is_independent():
    model = rag_model(tau=0.1)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.generator.parameters():
            parameter.mul_(1.5)
    assert clone.adapter.model is clone.generator
    assert clone(**batch()).loss != model(**batch()).loss


# Bad input


def _rejects(message, **changes):
    with pytest.raises(ValueError, match=message):
        rag_model(**changes)


def test_rejects_bad_settings():
    _rejects("n_docs: expected an integer >= 1, got 0", n_docs=0)
    _rejects("tau: expected a finite number > 0, got 0", tau=0.0)
    _rejects("explore: expected 0 <= integer <= n_docs = 3, got 4", explore=4)
    _rejects("n_docs: expected an integer >= 1, got '3'", n_docs="3")
    _rejects("tau: expected a finite number > 0, got 'x'", tau="x")
    _rejects("explore: expected 0 <= integer <= n_docs = 3, got 1.5", explore=1.5)
    _rejects("explore_pool: expected an integer >= n_docs = 3 or None, got 2", explore_pool=2)
    _rejects("explore_tau: expected a finite number > 0", explore_tau=0.0)
    _rejects("marginal: expected one of .* got 'both'", marginal="both")
    _rejects("label_smoothing: expected 0 <= number < 1, got 1", label_smoothing=1.0)
    _rejects("objective: expected one of .* got 'em'", objective="em")
    _rejects("tau_lm: expected a positive number, got -1", tau_lm=-1.0)
    _rejects("max_context: expected more than the template", max_context=2)
    _rejects(
        "max_context: expected at most the generator's 64 positions", kind="causal", max_context=65
    )


@pytest.mark.parametrize("place", [0, 1])
def test_rejects_the_path_of_an_encoder(place):
    model, name = rag_model(), ("question_encoder", "passage_encoder")[place]
    encoders = [model.question_encoder, model.passage_encoder]
    encoders[place] = "models/minilm"
    with pytest.raises(ValueError, match=f"^{name}: expected a module, such as .* got str$"):
        RagModel(*encoders, model.generator, model.index, model.passages, model.processor)


def test_rejects_index_of_another_size():
    model = rag_model()
    parts = {
        "question_encoder": model.question_encoder,
        "passage_encoder": model.passage_encoder,
        "generator": model.generator,
        "passages": model.passages,
        "processor": model.processor,
    }
    short = FlatIndex(16)
    short.add(torch.randn(5, 16))
    with pytest.raises(ValueError, match="index: .* got 5 vectors and 12 passages"):
        RagModel(**parts, index=short)
    narrow = FlatIndex(8)
    narrow.add(torch.randn(12, 8))
    with pytest.raises(ValueError, match="index: expected vectors of width 16 .* got 8"):
        RagModel(**parts, index=narrow)
    with pytest.raises(ValueError, match="^index: expected an Index, such as .* got NoneType$"):
        RagModel(**parts, index=None)
    with pytest.raises(ValueError, match="passage_encoder: expected a module to train, got None"):
        RagModel(
            **{**parts, "passage_encoder": None}, index=model.index, train_passage_encoder=True
        )


def _with_processor(processor, **parts):
    whole = rag_model()
    parts = {
        "question_encoder": whole.question_encoder,
        "passage_encoder": whole.passage_encoder,
        "generator": whole.generator,
        "index": whole.index,
        "passages": whole.passages,
    } | parts
    return RagModel(**parts, processor=processor)


def test_rejects_a_processor_that_contradicts_a_part():
    other = tokenizer("seq2seq")
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="generator stream was built with another tokenizer"):
        _with_processor(processor(generator_tokenizer=other))
    with pytest.raises(ValueError, match="encoder stream was built with another tokenizer"):
        _with_processor(processor(passage_tokenizer=other))
    with pytest.raises(ValueError, match="generator stream was built with another .* or template"):
        _with_processor(processor(template=Template("{question} {passage}", passage="{text}")))
    with pytest.raises(ValueError, match="^processor: expected one of kind 'seq2seq' .* 'causal'$"):
        _with_processor(processor("causal"))
    with pytest.raises(ValueError, match="^processor: expected a RagProcessor, got Template$"):
        _with_processor(TEMPLATE)
    with pytest.raises(ValueError, match=rf"ids in \[0, 9\), got one with id {VOCAB - 1}$"):
        _with_processor(
            processor(), generator=T5ForConditionalGeneration(T5Config(**T5 | {"vocab_size": 9}))
        )
    prefixed = TextEncoder(encoder().model, normalize=True, prefix="query: ")
    with pytest.raises(ValueError, match="the encoder's question_prefix 'query: ', got ''; Rag"):
        _with_processor(processor(), question_encoder=prefixed)
    with pytest.raises(ValueError, match="the processor's passage_prefix 'ada ' .*, got ''$"):
        _with_processor(processor(passage_prefix="ada "), passage_encoder=None)


def test_rejects_vectors_that_are_not_finite():
    model = rag_model(train_passage_encoder=True)
    word = tokenizer("encoder").convert_tokens_to_ids
    with torch.no_grad():
        model.question_encoder.model.embeddings.word_embeddings.weight[word("bob")] = torch.nan
    with pytest.raises(ValueError, match="question_encoder: .* NaN or inf for example 1"):
        model(**batch())
    model = rag_model(train_passage_encoder=True)
    with torch.no_grad():  # green stands in passage 2
        model.passage_encoder.model.embeddings.word_embeddings.weight[word("green")] = torch.nan
    rows = torch.tensor([[0, 2, 1]]).expand(4, -1)
    with pytest.raises(ValueError, match="passage_encoder: .* NaN or inf for row 2"):
        model(**batch(), rows=rows)
    with pytest.raises(ValueError, match="row 2"):
        model.refresh_index()


def test_rejects_bad_batches():
    model = rag_model()
    data = batch()
    with pytest.raises(ValueError, match=r"^input_ids: expected at least one question, got \[0, "):
        model(**{name: values[:0] for name, values in data.items()})
    with pytest.raises(ValueError, match="^input_ids: expected a tensor, got list$"):
        model([1, 2])
    with pytest.raises(ValueError, match=r"rows: expected \[B, K\] with B = 4"):
        model(**data, rows=torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows: expected"):
        model(**data, rows=torch.full((4, 2), 12))
    with pytest.raises(ValueError, match="prompt_ids: expected the questions"):
        model(data["input_ids"], labels=data["labels"])
    with pytest.raises(ValueError, match="prompt_ids: expected question and template within"):
        long = torch.ones(4, 40, dtype=torch.int64)
        model(**{**data, "prompt_ids": long, "prompt_mask": long})
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(**{**data, "attention_mask": torch.ones(4, 9)})
    with pytest.raises(ValueError, match="rows: expected a tensor, got list"):
        model(**data, rows=[[0, 1]] * 4)
    with pytest.raises(ValueError, match="K = 0"):
        model(**data, rows=torch.zeros(4, 0, dtype=torch.int64))
    rows, doc_scores = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="doc_scores: expected the rows that they score as well"):
        model(**data, doc_scores=doc_scores)
    with pytest.raises(ValueError, match="rows: expected .* B = 4 and K of at least 1, got .3, 2"):
        model(**data, rows=rows[:3], doc_scores=doc_scores[:3])
    with pytest.raises(ValueError, match=r"doc_scores: expected floating point \[4, 2\] as rows"):
        model(**data, rows=rows, doc_scores=rows)
    with pytest.raises(TypeError, match="lables"):
        model(**data, lables=data["labels"])


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_scores_of_another_retriever_are_the_prior(marginal):
    """The model's own scores give its own loss and answer; the score of a missing row is none."""
    model = rag_model(marginal=marginal).eval()
    data = batch()
    own = model(**data)
    given = {"rows": own.rows, "doc_scores": own.doc_scores.detach()}
    assert torch.equal(model(**data, **given).loss, own.loss)
    answer, expected = model.generate(**data, **given), model.generate(**data)
    assert torch.equal(answer.sequences, expected.sequences)
    assert torch.equal(answer.scores, expected.scores)
    missing = {"rows": own.rows.clone(), "doc_scores": torch.zeros(4, 3)}
    missing["rows"][:, 1] = -1
    found = model(**data, **missing)
    assert found.doc_scores.tolist() == [[0.0, -math.inf, 0.0]] * 4
    first = model(**data, rows=own.rows[:, ::2], doc_scores=torch.zeros(4, 2)).loss
    torch.testing.assert_close(found.loss, first)
    model.train()
    model(**data, **given).loss.backward()
    assert all(each.grad is None for each in model.question_encoder.parameters())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", lambda x: x.float(), r"labels: expected int64 \[B, T\] .* float32"),
        ("labels", lambda x: x[:, 0], r"labels: expected int64 \[B, T\] .* got \[4\] int64"),
        ("labels", lambda x: x[:3], r"labels: .* with B = 4 .* got \[3, 2\]"),
        ("labels", lambda x: x[:, :0], r"labels: .* T of at least 1, got \[4, 0\]"),
        (
            "labels",
            lambda x: x + VOCAB,
            rf"labels: expected values in \[0, {VOCAB}\) or ignore_index",
        ),
        ("prompt_ids", lambda x: x.float(), "prompt_ids: expected int64 .* float32"),
        ("prompt_ids", lambda x: x + VOCAB, rf"prompt_ids: expected token ids in \[0, {VOCAB}\)"),
        ("input_ids", lambda x: x.float(), "input_ids: expected int64 .* float32"),
        (
            "input_ids",
            lambda x: x - VOCAB,
            rf"input_ids: expected token ids in \[0, {VOCAB}\).* got -",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rejects_shapes_dtypes_and_ids(kind, name, change, message):
    data = batch(kind)
    with pytest.raises(ValueError, match=message):
        rag_model(kind)(**{**data, name: change(data[name])})


def test_no_passages_are_not_a_default():
    """K = 0 is an error, not a way to say n_docs."""
    model, data = rag_model(), batch()
    with pytest.raises(ValueError, match="k: expected an integer >= 1, got 0"):
        model.retrieve(data["input_ids"], data["attention_mask"], k=0)
    names = ("input_ids", "attention_mask", "prompt_ids", "prompt_mask")
    with pytest.raises(ValueError, match="n_docs: expected an integer >= 1, got 0"):
        model.generate(*(data[name] for name in names), n_docs=0)


def test_one_model_under_two_prefixes_trains_and_is_saved_once(tmp_path):
    """Freezing the passage encoder must not freeze what the question encoder is made of."""
    base = rag_model()
    question_encoder = base.question_encoder
    passage_encoder = TextEncoder(question_encoder.model, normalize=True, prefix="passage: ")
    passage_encoder.own = torch.nn.Linear(2, 2)
    prefixed = processor(passage_prefix="passage: ")
    model = RagModel(
        question_encoder,
        passage_encoder,
        base.generator,
        base.index,
        PassageStore.build(passages(), prefixed),
        prefixed,
    )
    assert all(parameter.requires_grad for parameter in question_encoder.parameters())
    assert not passage_encoder.own.weight.requires_grad
    model(**batch()).loss.backward()
    assert question_encoder.model.embeddings.word_embeddings.weight.grad.any()
    model.save_pretrained(tmp_path / "m")
    assert [file.name for file in (tmp_path / "m" / "passage_encoder").iterdir()] == [CONFIG_NAME]
    again = RagModel.from_pretrained(tmp_path / "m", model.index, model.passages)
    assert again.passage_encoder.model is again.question_encoder.model
    assert (again.passage_encoder.prefix, again.question_encoder.prefix) == ("passage: ", "")
    torch.testing.assert_close(again(**batch()).loss, model.eval()(**batch()).loss)


def test_checkpoint_of_another_configuration_is_a_value_error():
    state = rag_model().state_dict()
    other = rag_model("causal")
    with pytest.raises(ValueError, match="state_dict: checkpoint of another configuration"):
        other.load_state_dict(state)
    state["retriever.question_encoder.model.embeddings.word_embeddings.weight"] = torch.zeros(3, 16)
    with pytest.raises(ValueError, match="(?s)another configuration: .*size mismatch"):
        rag_model().load_state_dict(state, strict=False)


def test_encoders_of_your_own():
    """Any module of (input_ids, attention_mask) -> [B, D] is an encoder."""

    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(VOCAB, 16)

        def forward(self, input_ids, attention_mask):
            return (self.words(input_ids) * attention_mask[..., None]).sum(dim=1)

    base = rag_model()
    torch.manual_seed(0)
    model = RagModel(
        Bag(),
        Bag(),
        base.generator,
        FlatIndex(16),
        base.passages,
        base.processor,
        n_docs=3,
    )
    model.refresh_index()
    out = model(**batch())
    out.loss.backward()
    assert model.question_encoder.words.weight.grad.any()
    expected = functional.doc_scores(
        model.question_encoder(batch()["input_ids"], batch()["attention_mask"]),
        model.index.index_emb,
        rows=out.rows,
    )
    torch.testing.assert_close(out.doc_scores, expected)
    assert encoder().dim == 16
