"""What transformers tests of its RAG models, of patched ones: shapes, paths and refusals.

The numbers of the tests are those of the list in transformers' tests/models/rag.
"""

from __future__ import annotations

import pytest
import torch

import fastrag
from tests import tiny
from tests.hf.models import (
    CLASSES,
    DIM,
    N_DOCS,
    WIDTH,
    context_encoder,
    questions,
    rag,
    same,
)
from tests.hf.test_retrieval import parts

N, T, H = 3, 5, 16  # questions, target tokens, width of the generator

cases = pytest.mark.parametrize(
    ("marginal", "name"), [(m, n) for m in CLASSES for n in ("bart", "t5_tied")]
)
quirks = pytest.mark.parametrize("quirks", [False, True])


def patched(marginal: str, name: str, quirks: bool = False, *, indexed: bool = True, **settings):
    """A patched model that retrieves; T5 has no BOS, which transformers' RAG-Sequence asks for."""
    model = rag(marginal, name, retrieves=True, **settings)
    given = parts(model) if indexed else {}
    return fastrag.patch_hf_rag(model, **given, hf_quirks=quirks)


def decoder_ids() -> torch.Tensor:
    return torch.randint(4, tiny.VOCAB, (N, T), generator=torch.Generator().manual_seed(0))


def retrieved(model, n_docs: int = N_DOCS, query=None):
    """What the retriever finds, and scores computed from it as transformers documents."""
    query = model.question_encoder(**questions(N))[0] if query is None else query
    found = model.retriever(
        questions(N)["input_ids"],
        query.detach().float().numpy(),
        prefix=getattr(model.config.generator, "prefix", None),
        n_docs=n_docs,
        return_tensors="pt",
    )
    vectors = found["retrieved_doc_embeds"].to(query)
    return {
        "context_input_ids": found["context_input_ids"],
        "context_attention_mask": found["context_attention_mask"],
        "doc_scores": torch.bmm(query.unsqueeze(1), vectors.transpose(1, 2)).squeeze(1),
    }


def check(output, n_docs: int = N_DOCS, indexed: bool = True) -> None:
    assert output.logits.shape == (n_docs * N, T, tiny.VOCAB)
    states = output.generator_enc_last_hidden_state
    assert states.shape[0] == n_docs * N and states.shape[2] == H
    assert states.shape[1] <= WIDTH if indexed else states.shape[1] == WIDTH
    assert output.doc_scores.shape == (N, n_docs)


@cases
@quirks
def test_1_model_with_retriever(marginal, name, quirks):
    model = patched(marginal, name, quirks)
    check(model(**questions(N), decoder_input_ids=decoder_ids()))
    loss = model(**questions(N), labels=decoder_ids())
    assert loss.loss.shape == (N,) and loss.doc_scores.shape == (N, N_DOCS)


@cases
def test_1_with_the_retriever_of_transformers(marginal, name):
    model = patched(marginal, name, indexed=False)
    check(model(**questions(N), decoder_input_ids=decoder_ids()), indexed=False)


@cases
def test_2_model_with_end2end_retriever(marginal, name):
    model = patched(marginal, name)
    model.set_context_encoder_for_training(context_encoder())
    model.retriever.set_ctx_encoder_tokenizer(tiny.tokenizer("encoder"))
    check(model(**questions(N), decoder_input_ids=decoder_ids()))
    model(**questions(N), labels=decoder_ids(), reduce_loss=True).loss.backward()
    gradients = [p.grad for p in model.rag.ctx_encoder.parameters() if p.grad is not None]
    assert sum(float(each.abs().sum()) > 0 for each in gradients) > 10


@cases
@quirks
def test_3_model_without_retriever(marginal, name, quirks):
    model = patched(marginal, name, quirks)
    given = retrieved(model)
    check(model(**given, decoder_input_ids=decoder_ids()))
    with_retriever = model(**questions(N), labels=decoder_ids())
    same(model(**given, labels=decoder_ids()).loss, with_retriever.loss)


@cases
def test_4_model_with_encoder_outputs(marginal, name):
    model = patched(marginal, name)
    first = model(**questions(N), decoder_input_ids=decoder_ids(), output_retrieved=True)
    given = {
        "encoder_outputs": (first.generator_enc_last_hidden_state,),
        "context_attention_mask": first.context_attention_mask,
        "doc_scores": first.doc_scores,
    }
    again = model(**given, decoder_input_ids=decoder_ids())
    check(again)
    same(again.logits, first.logits)
    expected = model(**questions(N), labels=decoder_ids()).loss
    same(model(**given, labels=decoder_ids()).loss, expected)


@cases
@quirks
def test_5_model_generate(marginal, name, quirks):
    settings = {} if not quirks else {"bos_token_id": tiny.BOS}
    model = patched(marginal, name, quirks, **settings)
    answers = model.generate(
        **questions(N),
        num_beams=2,
        num_return_sequences=2,
        max_length=5,
        decoder_start_token_id=model.generator.config.decoder_start_token_id,
    )
    assert answers.shape[0] == 2 * N and answers.shape[1] <= 5
    assert bool(((answers >= 0) & (answers < tiny.VOCAB)).all())


@cases
def test_6_generate_from_contexts(marginal, name):
    model = patched(marginal, name)
    given, settings = retrieved(model), {"num_beams": 2, "num_return_sequences": 2}
    if marginal == "sequence":
        settings["do_deduplication"] = True
    start = model.generator.config.decoder_start_token_id
    answers = model.generate(**given, **settings, max_length=5, decoder_start_token_id=start)
    assert answers.shape[0] == 2 * N


@cases
def test_7_model_with_custom_n_docs(marginal, name):
    model = patched(marginal, name)
    given = retrieved(model, n_docs=1)
    check(model(**given, decoder_input_ids=decoder_ids(), n_docs=1), n_docs=1)
    output = model(**given, labels=decoder_ids(), n_docs=1)
    assert output.doc_scores.shape == (N, 1)
    same(model(**questions(N), labels=decoder_ids(), n_docs=1).loss, output.loss)


@cases
def test_8_model_with_mismatched_n_docs(marginal, name):
    model = patched(marginal, name)
    given = retrieved(model, n_docs=3)
    for target in ("decoder_input_ids", "labels"):
        with pytest.raises(AssertionError, match="should be a multiple of `n_docs`=2"):
            model(**given, **{target: decoder_ids()}, n_docs=2)


def test_vectors_have_the_width_of_the_question_encoder():
    assert patched("token", "bart").config.retrieval_vector_size == DIM
