"""RagModel.from_hf and to_hf: one set of modules, composed either way, and through folders."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import RagRetriever, RagTokenizer

import fastrag
from fastrag import RagModel
from fastrag.hf import IndexRetriever
from tests import tiny
from tests.hf.models import CLASSES, context_encoder, gradients, rag, same
from tests.hf.test_retrieval import parts

both = pytest.mark.parametrize("marginal", ["token", "sequence"])
NAMES = tiny.NAMES[:2]


def answers(start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same answers as transformers' labels, start token first, and as ours."""
    ours = torch.tensor([[7, 9, 5, 2], [8, 2, -100, -100]])
    theirs = torch.cat([torch.full((2, 1), start), ours.masked_fill(ours < 0, tiny.PAD)], 1)
    return theirs, ours


def batch(model: RagModel) -> dict[str, torch.Tensor]:
    return model.processor.collate([{"question": name} for name in NAMES])


@both
@pytest.mark.parametrize("name", ["bart", "t5_tied"])
def test_the_loss_is_that_of_the_patched_model(marginal, name):
    theirs = rag(marginal, name, retrieves=True, label_smoothing=0.1)
    theirs.rag.ctx_encoder = context_encoder()
    ours = RagModel.from_hf(theirs)
    assert ours.question_encoder.model is theirs.question_encoder
    assert ours.generator is theirs.generator and not ours.training
    assert ours.passage_encoder.model is theirs.rag.ctx_encoder
    assert (ours.marginal, ours.n_docs, ours.tau, len(ours.index)) == (marginal, 3, 1.0, 3)
    fastrag.patch_hf_rag(theirs, index=ours.index, passages=ours.passages)
    their_labels, labels = answers(theirs.generator.config.decoder_start_token_id)
    given = batch(ours)
    expected = theirs(
        given["input_ids"], given["attention_mask"], labels=their_labels, reduce_loss=True
    ).loss
    found = ours(**given, labels=labels, num_items_in_batch=1).loss
    same(found, expected)
    for a, b in zip(gradients(theirs, found), gradients(theirs, expected), strict=True):
        same(a, b)


def test_decoder_only():
    theirs = rag("sequence", "gpt2", retrieves=True)
    ours = RagModel.from_hf(theirs)
    assert ours.processor.kind == "causal"
    given, (_, labels) = batch(ours), answers(0)
    fastrag.patch_hf_rag(theirs, **parts(theirs, "causal"))
    expected = theirs(given["input_ids"], given["attention_mask"], labels=labels).loss
    same(ours(**given, labels=labels, num_items_in_batch=1).loss, expected.sum())
    answer = ours.generate(**given, max_new_tokens=3)
    assert answer.sequences.shape[0] == 2 and bool((answer.scores < 0).all())


@both
def test_the_round_trip_through_a_folder(marginal, tmp_path):
    """The context encoder comes back, which transformers saves and does not load."""
    theirs = rag(marginal, retrieves=True, dtype=torch.float32, decoder_start_token_id=tiny.BOS)
    theirs.rag.ctx_encoder = context_encoder(torch.float32)
    first = RagModel.from_hf(theirs)
    made = first.to_hf()
    assert type(made) is CLASSES[marginal] and isinstance(made.retriever, IndexRetriever)
    for name in ("title_sep", "doc_sep", "n_docs", "max_combined_length", "label_smoothing"):
        assert getattr(made.config, name) == getattr(theirs.config, name), name
    tiny.same_weights(made, theirs)
    made.save_pretrained(tmp_path / "rag")
    made.retriever.save_pretrained(tmp_path / "rag")
    assert CLASSES[marginal].from_pretrained(tmp_path / "rag").rag.ctx_encoder is None
    again = RagModel.from_hf(tmp_path / "rag", first.index, first.passages)
    tiny.same_weights(again, first)
    assert again.processor.template == first.processor.template
    assert again.processor.max_context == first.processor.max_context
    given, (their_labels, labels) = batch(again), answers(tiny.BOS)
    loss = first(**given, labels=labels).loss
    assert torch.equal(again(**given, labels=labels).loss, loss)
    again.refresh_index()  # with the context encoder
    unpatched = made(given["input_ids"], given["attention_mask"], labels=their_labels)
    assert unpatched.logits.shape == (6, 5, tiny.VOCAB)
    answer = made.generate(given["input_ids"], given["attention_mask"], max_length=5)
    assert answer.shape[0] == 2


def test_a_saved_custom_index_comes_with_the_folder(tmp_path):
    theirs = rag(retrieves=True, dtype=torch.float32)
    theirs.retriever.config = theirs.config  # whose paths the retriever writes
    theirs.config.index_name = "custom"
    theirs.retriever.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    tokenizers = RagTokenizer(tiny.tokenizer("encoder"), tiny.tokenizer("seq2seq"))
    tokenizers.save_pretrained(tmp_path)
    model = RagModel.from_hf(tmp_path)
    assert type(model.index).__name__ == "FaissIndex" and len(model.passages) == 3
    given, (_, labels) = batch(model), answers(0)
    expected = RagModel.from_hf(theirs)(**given, labels=labels)
    found = model(**given, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.rows, expected.rows)


def test_an_end2end_model_trains_its_context_encoder_here_and_there():
    theirs = rag("token", retrieves=True, dtype=torch.float32)
    theirs.set_context_encoder_for_training(context_encoder(torch.float32))
    ours = RagModel.from_hf(theirs)
    assert ours.train_passage_encoder
    made = ours.to_hf()
    assert made.rag.context_encoder_training and made.retriever.return_tokenized_docs
    given, (labels, _) = batch(ours), answers(tiny.BOS)
    loss = made(given["input_ids"], given["attention_mask"], labels=labels, reduce_loss=True).loss
    loss.backward()
    touched = [p.grad is not None for p in made.rag.ctx_encoder.parameters()]
    assert sum(touched) > 10


def test_a_patched_model_brings_its_index_and_its_processor():
    theirs = rag(retrieves=True)
    given = parts(theirs)
    ours = RagModel.from_hf(fastrag.patch_hf_rag(theirs, **given), n_docs=2)
    assert ours.index is given["index"] and ours.passages is given["passages"] and ours.n_docs == 2
    assert ours.processor is theirs.retriever.processor


def test_bos_that_transformers_leaves_out_is_a_warning():
    with pytest.warns(UserWarning, match="exclude_bos_score: expected False, got True"):
        RagModel.from_hf(rag("sequence", retrieves=True, exclude_bos_score=True))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), {}, "model: expected a RagTokenForGeneration, .* got Line"),
        (lambda: "no such folder", {}, "model: expected a model folder of a RAG model"),
        (rag, {}, "question_tokenizer: expected a tokenizer, as the model comes without one"),
        (rag, {"processor": tiny.processor()}, "index: expected an index with passages"),
        (
            lambda: rag(retrieves=True),
            {"processor": tiny.processor(), "question_tokenizer": tiny.tokenizer("encoder")},
            "processor: expected one, or tokenizers",
        ),
        (lambda: rag(retrieves=True), {"index": fastrag.FlatIndex(16)}, "passages: expected index"),
    ],
    ids=["class", "folder", "tokenizer", "index", "both", "passages"],
)
def test_from_hf_refuses(source, settings, message):
    with pytest.raises(ValueError, match=message):
        RagModel.from_hf(source(), **settings)


def test_a_folder_of_something_else_is_refused(tmp_path):
    tiny.t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="config.json: expected architectures to name one of"):
        RagModel.from_hf(tmp_path / "t5")
    rag("token", "gpt2", dtype=torch.float32).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="expected an encoder-decoder as generator, .* got 'gpt2'"):
        RagModel.from_hf(tmp_path / "gpt2")
    made = rag(dtype=torch.float32)
    made.save_pretrained(tmp_path / "rag")
    settings = tmp_path / "rag" / "config.json"
    whole = settings.read_text()
    for content in ("{", "[]", whole.replace('"n_docs": 3', '"n_docs": "3"')):
        settings.write_text(content)
        with pytest.raises(ValueError, match="model: expected .*rag to hold a RAG model: "):
            RagModel.from_hf(tmp_path / "rag")
    settings.write_text(whole)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "rag" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "question_encoder" in name)]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="expected the weights of a RagTokenForGeneration, got mi"):
        RagModel.from_hf(tmp_path / "rag")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.retriever, "_tau", 0.5), "tau: expected 1, since transformers"),
        (lambda m: setattr(m.question_encoder, "normalize", True), "question_encoder: expected po"),
        (
            lambda m: setattr(m.processor, "template", fastrag.data.Template.default("seq2seq")),
            "template: expected passage before question",
        ),
    ],
    ids=["tau", "pooling", "template"],
)
def test_to_hf_refuses(change, message):
    model = copy.deepcopy(RagModel.from_hf(rag(retrieves=True)))
    change(model)
    with pytest.raises(ValueError, match=message):
        model.to_hf()


def test_to_hf_refuses_generators_that_transformers_cannot_run():
    with pytest.raises(ValueError, match="generator: expected a plain encoder-decoder, .* GPT2LMH"):
        RagModel.from_hf(rag("token", "gpt2", retrieves=True)).to_hf()
    assert issubclass(IndexRetriever, RagRetriever)
