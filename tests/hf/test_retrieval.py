"""A patched model retrieves from an index of fastrag: in forward, in generate, and end to end."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import fastrag
from fastrag import FlatIndex, PassageStore
from fastrag.data import Passage
from fastrag.hf import IndexRetriever, rag_processor
from tests import tiny
from tests.hf.models import (
    TEXTS,
    TITLES,
    context_encoder,
    gradients,
    labels,
    questions,
    rag,
    same,
    vectors,
)

both = pytest.mark.parametrize("marginal", ["token", "sequence"])
LABELS = labels()[:2]


def parts(model, kind="seq2seq", n=3, **settings):
    """Index and passages with the texts and the vectors that transformers' retriever has."""
    tokenizers = tiny.tokenizer("encoder"), tiny.tokenizer(kind)
    processor = rag_processor(model.config, *tokenizers, **settings)
    corpus = [Passage(str(i), TITLES[i], TEXTS[i]) for i in range(n)]
    index = FlatIndex(vectors().shape[1])
    index.add(vectors()[:n])
    return {"index": index, "passages": PassageStore.build(corpus, processor)}


def without_padding(output):
    masks = output.context_attention_mask.bool()
    return [ids[mask].tolist() for ids, mask in zip(output.context_input_ids, masks, strict=True)]


@both
@pytest.mark.parametrize("quirks", [False, True])
def test_retrieval_is_that_of_transformers(marginal, quirks):
    """The contexts fit the window, so both ways to make them give the same tokens."""
    model = rag(marginal, retrieves=True, bos_token_id=tiny.BOS)
    target = LABELS[:1].repeat(2, 1)
    given = questions() | {"labels": target, "output_retrieved": True}
    theirs = model(**given)
    found = gradients(model, theirs.loss)
    answers = model.generate(**questions(), num_beams=2, max_length=5)
    retriever = model.retriever
    fastrag.patch_hf_rag(model, **parts(model), hf_quirks=quirks)
    assert isinstance(model.retriever, IndexRetriever)
    ours = model(**given)
    same(ours.loss, theirs.loss)
    for a, b in zip(gradients(model, ours.loss), found, strict=True):
        same(a, b)
    assert without_padding(ours) == without_padding(theirs)
    for name in ("doc_scores", "retrieved_doc_ids", "question_encoder_last_hidden_state"):
        same(ours[name], theirs[name])
    same(ours.retrieved_doc_embeds.double(), theirs.retrieved_doc_embeds.double())
    if quirks or marginal == "token":  # RAG-Sequence's generate reads the padding as well
        assert torch.equal(model.generate(**questions(), num_beams=2, max_length=5), answers)
    assert fastrag.unpatch_hf_rag(model).retriever is retriever
    same(model(**given).loss, theirs.loss)


def test_a_question_is_never_cut():
    """transformers cuts contexts on the right, where the question is."""
    model = rag(retrieves=True, max_combined_length=6)
    given = questions() | {"labels": LABELS, "output_retrieved": True}
    asked = [tiny.tokenizer("seq2seq").convert_tokens_to_ids(name) for name in tiny.NAMES[:2]]
    fastrag.patch_hf_rag(model, **parts(model), hf_quirks=True)
    contexts = without_padding(model(**given))
    assert not any(asked[i // 3] == row[-2] for i, row in enumerate(contexts))
    fastrag.patch_hf_rag(fastrag.unpatch_hf_rag(model), **parts(model))
    contexts = without_padding(model(**given))
    assert all(asked[i // 3] == row[-2] and len(row) == 6 for i, row in enumerate(contexts))


def test_missing_passages_take_no_probability():
    """transformers' own retriever finds three passages for four; it scores the fourth 0."""
    model = rag(retrieves=True)
    given = questions() | {"labels": LABELS, "n_docs": 4, "output_retrieved": True}
    theirs = model(**given)
    assert (theirs.retrieved_doc_ids[:, 3] == -1).all() and (theirs.doc_scores[:, 3] == 0).all()
    fastrag.patch_hf_rag(model)
    ours = model(**given)
    assert (ours.doc_scores[:, 3] == -torch.inf).all()
    same(ours.loss, model(**given | {"n_docs": 3}).loss)
    assert float((ours.loss - theirs.loss).detach().abs().min()) > 1e-3


def test_a_model_without_a_retriever_takes_the_tokenizers_of_a_processor():
    model = rag()
    given = parts(model)
    with pytest.raises(ValueError, match="processor: expected a RagProcessor, as the model has no"):
        fastrag.patch_hf_rag(model, **given)
    tokenizers = tiny.tokenizer("encoder"), tiny.tokenizer("seq2seq")
    fastrag.patch_hf_rag(model, **given, processor=rag_processor(model.config, *tokenizers))
    other = fastrag.patch_hf_rag(rag(retrieves=True), **parts(model))
    same(model(**questions(), labels=LABELS).loss, other(**questions(), labels=LABELS).loss)
    assert fastrag.unpatch_hf_rag(model).retriever is None


@both
def test_decoder_only_retrieves(marginal):
    model = rag(marginal, "gpt2", retrieves=True)
    fastrag.patch_hf_rag(model, **parts(model, "causal"))
    target = LABELS[:, 1:]
    output = model(**questions(), labels=target, output_retrieved=True)
    given = {name: output[name] for name in ("context_input_ids", "context_attention_mask")}
    again = model(**given, doc_scores=output.doc_scores, labels=target)
    same(output.loss, again.loss)
    found = gradients(model, output.loss)
    assert sum(float(each.abs().sum()) > 0 for each in found) > len(found) // 2


def test_the_context_encoder_trains_on_passages_of_the_index():
    model = rag("token", retrieves=True)
    model.set_context_encoder_for_training(context_encoder())
    model.retriever.set_ctx_encoder_tokenizer(tiny.tokenizer("encoder"))
    theirs = model(**questions(), labels=LABELS)
    expected = gradients(model, theirs.loss)
    fastrag.patch_hf_rag(model, **parts(model))
    ours = model(**questions(), labels=LABELS)
    same(ours.loss, theirs.loss)
    assert any("ctx_encoder" in name for name, _ in model.named_parameters())
    for a, b in zip(gradients(model, ours.loss), expected, strict=True):
        same(a, b)


def test_parts_that_do_not_belong_together_are_refused():
    model = rag(retrieves=True)
    good, fewer = parts(model), parts(model, n=2)
    narrow = FlatIndex(4)
    narrow.add(torch.zeros(3, 4))
    seen = {**vars(model)}
    for given, message in (
        ({**good, "index": fewer["index"]}, "index: expected one vector per passage, got 2"),
        ({**good, "index": narrow}, "index: expected vectors of width 16"),
        (parts(rag(title_sep=" likes ")), "passages: the generator stream was built with another"),
        ({**good, "processor": tiny.processor("causal")}, "processor: expected one of kind 'seq2"),
    ):
        with pytest.raises(ValueError, match=message):
            fastrag.patch_hf_rag(model, **given)
        assert vars(model) == seen
    fastrag.patch_hf_rag(model, **good)
    with pytest.raises(ValueError, match="n_docs: expected at most the 3 passages of the index"):
        model(**questions(), labels=LABELS, n_docs=4)


def test_the_trainer_of_transformers_trains_a_patched_model(tmp_path):
    """It finds the columns by forward's signature, and evaluates without logits."""
    model = rag(retrieves=True, dtype=torch.float32, reduce_loss=True)
    fastrag.patch_hf_rag(model, **parts(model))
    rows = [
        {name: each[i] for name, each in (questions() | {"labels": LABELS}).items()}
        for i in range(2)
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    given = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    same(torch.tensor(before), model(**given).loss.detach(), rtol=1e-5, atol=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert fastrag.unpatch_hf_rag(model) is model


@both
def test_lora_on_the_generator_trains(marginal):
    model = rag(marginal, retrieves=True)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.rag.generator = get_peft_model(model.generator, settings).eval()
    theirs = model(**questions(), labels=LABELS[:1].repeat(2, 1))
    fastrag.patch_hf_rag(model, **parts(model))
    ours = model(**questions(), labels=LABELS[:1].repeat(2, 1))
    same(ours.loss, theirs.loss)
    for a, b in zip(gradients(model, ours.loss), gradients(model, theirs.loss), strict=True):
        same(a, b)
