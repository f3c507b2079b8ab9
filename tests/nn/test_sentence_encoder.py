"""A live SentenceTransformer as an encoder: its own modules and prompts, trained and saved."""

from __future__ import annotations

import pytest
import torch

from fastrag.data import RagProcessor
from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import RagModel, Retriever, SentenceEncoder, checkpoint
from tests import tiny

sentence_transformers = pytest.importorskip("sentence_transformers")

PROMPTS = {"query": "asked : ", "document": "says : "}


@pytest.fixture
def make(tmp_path):
    """Make a SentenceTransformer of width 8: BERT, mean pooling, a dense layer, normalised."""
    from sentence_transformers.sentence_transformer import modules

    tiny.encoder().model.save_pretrained(tmp_path / "bert")
    tiny.tokenizer("encoder").save_pretrained(tmp_path / "bert")

    def made(prompts=PROMPTS, include_prompt=True, **settings):
        torch.manual_seed(0)
        parts = [
            modules.Transformer(str(tmp_path / "bert"), max_seq_length=32),
            modules.Pooling(16, "mean", include_prompt=include_prompt),
            modules.Dense(16, 8),
            modules.Normalize(),
        ]
        return sentence_transformers.SentenceTransformer(
            modules=parts, prompts=prompts, device="cpu", **settings
        )

    return made


def rag_model(st) -> RagModel:
    """A RagModel with one SentenceTransformer for questions and passages."""
    processor = RagProcessor.for_encoders(
        SentenceEncoder(st, "query"),
        SentenceEncoder(st, "passage"),
        st.tokenizer,
        tiny.tokenizer("seq2seq"),
        template=tiny.TEMPLATE,
        max_context=32,
    )
    torch.manual_seed(0)
    model = RagModel(
        st,
        st,
        tiny.t5(),
        FlatIndex(8),
        PassageStore.build(tiny.passages(), processor),
        processor,
        n_docs=3,
    )
    model.refresh_index()
    return model.train()


@pytest.mark.parametrize("settings", [{}, {"include_prompt": False}, {"truncate_dim": 5}])
@pytest.mark.parametrize("role", ["query", "passage", None])
def test_vectors_are_those_of_encode(make, role, settings):
    st = make(**settings)
    encoder = SentenceEncoder(st, role)
    name = {"query": "query", "passage": "document", None: None}[role]
    assert encoder.prefix == PROMPTS.get(name, "")
    texts = ["ada", "bob likes red"]
    inputs = st.tokenizer([encoder.prefix + text for text in texts], padding=True)
    got = encoder(torch.tensor(inputs["input_ids"]), torch.tensor(inputs["attention_mask"]))
    expected = st.encode(texts, prompt=encoder.prefix, convert_to_tensor=True)
    torch.testing.assert_close(got, expected)
    assert (encoder.dim, encoder.max_length) == (expected.shape[1], 32)
    assert encoder.normalize == ("truncate_dim" not in settings)


@pytest.mark.parametrize("kept", ["same model", "own"])
def test_trains_in_a_rag_model_and_loads_again(make, tmp_path, monkeypatch, kept):
    """One model under two prompts is saved once; folders that hold it twice load all the same."""
    if kept == "own":
        monkeypatch.setattr(
            checkpoint, "_encoder_kept", lambda _, other: "own" if other else "none"
        )
    model = rag_model(make())
    question, passage = model.question_encoder, model.passage_encoder
    assert question.model is passage.model and model.retriever.tau == 0.05
    assert (question.prefix, passage.prefix) == ("asked : ", "says : ")
    data = model.processor.collate(tiny.questions(4))
    output = model(**data)
    output.loss.backward()
    for name in ("0.model.embeddings.word_embeddings.weight", "2.linear.weight"):
        assert question.model.get_parameter(name).grad.abs().sum() > 0, name
    model.eval()
    expected = model(**data)
    model.save_pretrained(tmp_path / "model", include_index=True)
    again = RagModel.from_pretrained(tmp_path / "model")
    assert isinstance(again.question_encoder, SentenceEncoder)
    question, passage = again.question_encoder, again.passage_encoder
    assert (question.prefix, passage.prefix) == ("asked : ", "says : ")
    assert (question.model is passage.model) == (kept == "same model")
    weights = [file.parent.name for file in (tmp_path / "model").rglob("*encoder/*.safetensors")]
    assert sorted(weights) == ["passage_encoder"] * (kept == "own") + ["question_encoder"]
    torch.testing.assert_close(again(**data).loss, expected.loss)


def test_without_prompts_questions_and_passages_share_one_encoder(make):
    st = make(prompts=None)
    index, store = FlatIndex(8), tiny.store()
    retriever = Retriever(st, st, index, store)
    assert retriever.passage_encoder is retriever.question_encoder
    assert all(parameter.requires_grad for parameter in st.parameters())
    retriever.question_encoder = make()
    assert retriever.question_encoder.prefix == "asked : "


def test_mistakes_are_named(make):
    with pytest.raises(ValueError, match="model: expected a SentenceTransformer, got Linear"):
        SentenceEncoder(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="role: expected 'query', 'passage' or None, got 'both'"):
        SentenceEncoder(make(), "both")
    with pytest.raises(ValueError, match="index: expected vectors of width 8 .* got 16"):
        Retriever(make(), None, FlatIndex(16), tiny.store())
    with pytest.raises(ValueError, match="input_ids: expected at most the encoder's 64 positions"):
        SentenceEncoder(make())(torch.ones(1, 65, dtype=torch.int64))
