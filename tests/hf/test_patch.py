"""patch_hf_rag: values and gradients are transformers' with hf_quirks, otherwise the paper's."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor

import fastrag
from tests import tiny
from tests.hf.models import contexts, gradients, labels, rag, same

both = pytest.mark.parametrize("marginal", ["token", "sequence"])


@both
@pytest.mark.parametrize("name", ["bart", "t5_tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduce_loss": True},
        {"label_smoothing": 0.1},
        {"exclude_bos_score": True, "label_smoothing": 0.1, "bos_token_id": tiny.BOS},
    ],
    ids=["plain", "reduced", "smoothed", "without_bos"],
)
def test_quirks_are_transformers_own(marginal, name, settings):
    settings = {"bos_token_id": tiny.BOS, **settings}  # RAG-Sequence with T5 fails without
    model = rag(marginal, name, **settings)
    given = contexts()
    given["doc_scores"].requires_grad_()
    target = labels()
    if settings.get("exclude_bos_score"):
        target[:, 1] = tiny.BOS
    results = []
    for _ in range(2):
        output = model(**given, labels=target)
        found = gradients(model, output.loss, given["doc_scores"])
        results.append([output.loss, output.doc_scores, output.generator_enc_last_hidden_state])
        results[-1] += found
        if len(results) == 1:
            fastrag.patch_hf_rag(model, hf_quirks=True)
    assert len(results[0]) > 40
    for ours, theirs in zip(results[1], results[0], strict=True):
        same(ours, theirs)


def paper(marginal: str, model, given: dict[str, Tensor], decoder_ids: Tensor, targets: Tensor):
    """The paper's nll [B], literally, of targets that -100 fills up."""
    n_questions, n_docs = given["doc_scores"].shape
    logits = model.generator(
        input_ids=given["context_input_ids"],
        attention_mask=given["context_attention_mask"],
        decoder_input_ids=decoder_ids.repeat_interleave(n_docs, 0),
    ).logits
    return literal(marginal, logits.unflatten(0, (n_questions, n_docs)), given, targets)


def literal(marginal: str, logits: Tensor, given: dict[str, Tensor], targets: Tensor) -> Tensor:
    counts = (targets >= 0).unsqueeze(1)
    at = targets.clamp(min=0)[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
    logp = logits.log_softmax(-1).gather(-1, at)[..., 0]
    prior = given["doc_scores"].log_softmax(1)
    if marginal == "token":
        return -torch.where(counts[:, 0], (prior[..., None] + logp).logsumexp(1), 0.0).sum(1)
    return -(prior + torch.where(counts, logp, 0.0).sum(2)).logsumexp(1)


def shifted(target: Tensor) -> Tensor:
    moved = torch.cat([target[:, 1:], torch.full_like(target[:, :1], -100)], 1)
    return moved.masked_fill(moved == tiny.PAD, -100)


def agree(model, loss: Tensor, expected: Tensor, scores: Tensor) -> None:
    same(loss, expected)
    found, wanted = gradients(model, loss, scores), gradients(model, expected, scores)
    for ours, theirs in zip(found, wanted, strict=True):
        same(ours, theirs)
    assert bool((found[-1].abs().sum(1) > 1e-6).all())  # every example trains the retriever


@both
@pytest.mark.parametrize("name", ["bart", "t5_tied"])
def test_the_loss_is_the_papers(marginal, name):
    """T5 with RAG-Sequence, on which transformers fails, and a target of one token."""
    model = fastrag.patch_hf_rag(rag(marginal, name))
    assert model.config.bos_token_id is None
    given, target = contexts(), labels()
    given["doc_scores"].requires_grad_()
    loss = model(**given, labels=target).loss
    expected = paper(marginal, model, given, target, shifted(target))
    agree(model, loss, expected, given["doc_scores"])
    padded = target.masked_fill(target == tiny.PAD, -100)
    same(model(**given, labels=padded).loss, loss)
    same(model(**given, labels=target, reduce_loss=True).loss, loss.sum())


def test_both_values_of_a_one_token_target():
    """transformers loses the prior where the second target is padding."""
    model, given, target = rag("sequence", bos_token_id=tiny.BOS), contexts(), labels()
    theirs = model(**given, labels=target).loss
    ours = fastrag.patch_hf_rag(model)(**given, labels=target).loss
    same(ours[:2], theirs[:2])
    assert float((ours[2] - theirs[2]).detach()) > 0.1


@both
def test_a_target_of_one_column(marginal):
    """transformers shifts it away: its loss is -log K, or 0."""
    model, given = rag(marginal, bos_token_id=tiny.BOS), contexts()
    given["doc_scores"].requires_grad_()
    target = labels()[:, 1:2]
    theirs = model(**given, labels=target).loss
    value = 0.0 if marginal == "token" else -torch.tensor(3.0, dtype=torch.float64).log()
    same(theirs, torch.full((3,), float(value), dtype=torch.float64))
    fastrag.patch_hf_rag(model, hf_quirks=True)
    same(model(**given, labels=target).loss, theirs)
    fastrag.patch_hf_rag(fastrag.unpatch_hf_rag(model))
    start = torch.full_like(target, model.generator.config.decoder_start_token_id)
    expected = paper(marginal, model, given, start, target)
    agree(model, model(**given, labels=target).loss, expected, given["doc_scores"])


@both
def test_bos_may_be_left_out(marginal):
    model = fastrag.patch_hf_rag(rag(marginal, bos_token_id=tiny.BOS))
    given, target = contexts(), labels()
    target[:, 1] = tiny.BOS
    targets = shifted(target)
    if marginal == "sequence":  # RAG-Token has no such switch
        targets[:, 0] = -100
        loss = model(**given, labels=target, exclude_bos_score=True).loss
        target[0, 1] = 5  # not in every row: nothing is left out
        whole = paper(marginal, model, given, target, shifted(target))
        same(model(**given, labels=target, exclude_bos_score=True).loss, whole)
        target[0, 1] = tiny.BOS
    else:
        model.config.exclude_bos_score = True
        loss = model(**given, labels=target).loss
    same(loss, paper(marginal, model, given, target, targets))


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_only(marginal, side):
    model = fastrag.patch_hf_rag(rag(marginal, "gpt2"))
    given, target = contexts(), labels()[:, 1:]
    given["doc_scores"].requires_grad_()
    inputs = dict(given)
    if side == "left":
        for name in ("context_input_ids", "context_attention_mask"):
            inputs[name] = torch.stack(
                [
                    row.roll(int((mask == 0).sum()))
                    for row, mask in zip(given[name], given["context_attention_mask"], strict=True)
                ]
            )
    output = model(**inputs, labels=target)
    targets = target.masked_fill(target == tiny.PAD, -100)
    rows = []
    for i in range(9):  # one context after the other, without padding
        context = given["context_input_ids"][i][given["context_attention_mask"][i] == 1]
        whole = torch.cat([context, target[i // 3, :-1]])[None]
        rows.append(model.generator(whole).logits[0, -target.shape[1] :])
    expected = literal(marginal, torch.stack(rows).unflatten(0, (3, 3)), given, targets)
    agree(model, output.loss, expected, given["doc_scores"])
    for call, message in (
        (lambda: model(**given), "labels: expected the answers, without which transformers cannot"),
        (lambda: model.generate(**given), "generate: expected an encoder-decoder, got GPT2LMHead"),
        (
            lambda: model(**given, labels=target, output_attentions=True),
            "output_attentions: expected None with GPT2LMHeadModel",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    plain = vars(fastrag.unpatch_hf_rag(model))
    assert "generate" not in plain and "forward" not in plain
    with pytest.raises(ValueError, match="hf_quirks: expected False with GPT2LMHeadModel"):
        fastrag.patch_hf_rag(model, hf_quirks=True)


def test_unpatching_restores_the_very_object():
    model = rag("sequence", retrieves=True)
    before, tensors, retriever = dict(vars(model)), model.state_dict(), model.retriever
    assert fastrag.patch_hf_rag(model) is model
    assert model.state_dict().keys() == tensors.keys() and type(model).__name__ in str(model)
    assert "labels" in inspect.signature(model.forward).parameters
    assert fastrag.unpatch_hf_rag(model) is model
    assert vars(model).keys() == before.keys() and model.retriever is retriever
    assert all(vars(model)[name] is value for name, value in before.items())
    assert model.forward.__func__ is type(model).forward
    with pytest.raises(ValueError, match="model: expected a patched model, got a plain RagSeq"):
        fastrag.unpatch_hf_rag(model)


def test_a_copy_of_a_patched_model_is_patched():
    model = fastrag.patch_hf_rag(rag())
    given, target = contexts(), labels()
    given["doc_scores"].requires_grad_()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.generator.get_output_embeddings().weight.mul_(2.0)
    output = twin(**given, labels=target)
    expected = paper("token", twin, given, target, shifted(target))
    agree(twin, output.loss, expected, given["doc_scores"])
    assert float((output.loss - model(**given, labels=target).loss).detach().abs().min()) > 1e-3
    fastrag.unpatch_hf_rag(twin)
    assert "forward" in vars(model)


def test_a_replaced_generator_trains():
    model, given, target = fastrag.patch_hf_rag(rag(name="bart")), contexts(), labels()
    model.rag.generator = rag(name="t5_tied").generator
    output = model(**given, labels=target)
    same(output.loss, paper("token", model, given, target, shifted(target)))


def test_no_logits_are_made_and_all_else_is_there():
    model, given, target = rag("token", output_retrieved=True), contexts(), labels()
    theirs = model(**given, labels=target, output_attentions=True)
    widths = []
    model.generator.get_output_embeddings().register_forward_hook(
        lambda _, args, out: widths.append(tuple(out.shape[:2]))
    )
    fastrag.patch_hf_rag(model)
    widths.clear()
    ours = model(**given, labels=target, output_attentions=True)
    assert widths == [(1, 1)]
    assert set(theirs.keys()) - set(ours.keys()) == {"logits"} and set(ours.keys()) > {"loss"}
    for name in set(ours.keys()) - {"context_input_ids"}:
        same(ours[name], theirs[name])
    same(ours[0], ours.loss)
    for read in (lambda: ours.logits, lambda: ours["logits"], lambda: ours[1], lambda: ours[:2]):
        with pytest.raises(ValueError, match="call it without labels"):
            read()
    assert not hasattr(ours, "nothing")
    same(model(**given, decoder_input_ids=target).logits, theirs.logits)
    moved = torch.utils._pytree.tree_map(lambda x: x, ours)
    assert type(moved) is type(ours) and moved.keys() == ours.keys()


@both
def test_decoder_ids_of_ones_own(marginal):
    """transformers shifts the labels of one class and the decoder_input_ids of the other."""
    model, given, target = rag(marginal, bos_token_id=tiny.BOS), contexts(), labels()
    own = target.roll(1, 0)
    theirs = model(**given, labels=target, decoder_input_ids=own).loss
    fastrag.patch_hf_rag(model, hf_quirks=True)
    same(model(**given, labels=target, decoder_input_ids=own).loss, theirs)
    fastrag.patch_hf_rag(fastrag.unpatch_hf_rag(model))
    with pytest.raises(ValueError, match="decoder_input_ids: expected None with labels"):
        model(**given, labels=target, decoder_input_ids=own)


def wrapped():
    model = rag()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (lambda: rag().rag, {}, "model: expected a RagTokenForGeneration or .*, got RagModel"),
        (lambda: torch.nn.DataParallel(rag()), {}, "model: expected a RagToken.*, got DataParall"),
        (lambda: fastrag.patch_hf_rag(rag()), {}, "model: expected one that is not patched"),
        (wrapped, {}, "model: expected one with the forward of its class"),
        (rag, {"index": fastrag.FlatIndex(16)}, "passages: expected index and passages together"),
        (rag, {"passages": object()}, "index: expected index and passages together, got None"),
        (rag, {"processor": tiny.processor()}, "processor: expected None without an index"),
        (rag, {"index": "x", "passages": []}, "index: expected a fastrag Index, got str"),
        (
            rag,
            {"index": fastrag.FlatIndex(16), "passages": []},
            "passages: expected a fastrag PassageStore, got list",
        ),
    ],
    ids=[
        *("class", "wrapper", "twice", "wrapped", "index", "passages", "processor"),
        *("kind of index", "kind of passages"),
    ],
)
def test_a_patch_is_refused(made, settings, message):
    model = made()
    with pytest.raises(ValueError, match=message):
        fastrag.patch_hf_rag(model, **settings)


def test_a_wrapped_patch_is_not_undone():
    model = fastrag.patch_hf_rag(rag())
    model.forward = torch.no_grad()(model.forward)  # as accelerate's mixed precision does
    with pytest.raises(ValueError, match="model: expected the forward of patch_hf_rag, got one"):
        fastrag.unpatch_hf_rag(model)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"labels: expected int64 \[B, T\]"),
        (torch.full((3, 2), tiny.VOCAB), "labels"),
        (
            torch.full((2, 2), 5),
            r"labels: .* with B = 3 and T of .* got \[2, 2\]",
        ),
    ],
    ids=["shape", "vocabulary", "questions"],
)
@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_bad_labels_are_named(name, target, message):
    model = fastrag.patch_hf_rag(rag(name=name))
    with pytest.raises(ValueError, match=message):
        model(**contexts(), labels=target)
