"""A step that fails leaves the model as it was: the next step has the bits of a first one."""

from __future__ import annotations

import pytest
import torch

from fastrag.index import FlatIndex, PassageStore
from fastrag.nn import RagLoss
from fastrag.nn.generators import GeneratorAdapter
from fastrag.nn.heads import LiveHead
from tests.tiny import batch, encoder, rag_model


class Interrupted(Exception):
    pass


def interrupt(*_args, **_options):
    raise Interrupted


def fails_on_the_way_back(tensor: torch.Tensor) -> torch.Tensor:
    tensor.register_hook(interrupt)
    return tensor


STAGES = {
    "encoder": ("fastrag.nn.encoders.TextEncoder", "_pool"),
    "search": (FlatIndex, "_topk"),
    "vectors": (FlatIndex, "_vectors_of"),
    "contexts": (PassageStore, "gather"),
    "inputs": (GeneratorAdapter, "_captured"),
    "generator": ("transformers.models.t5.modeling_t5.T5LayerFF", "forward"),
    "head": (LiveHead, "__call__"),
    "loss": (RagLoss, "forward"),
}


def step(model):
    """Loss and gradients of the first batch."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def settled(model):
    """What a step may not leave behind: modes, hooks, versions."""
    return [
        (name, part.training, len(part._forward_pre_hooks), len(part._forward_hooks))
        for name, part in model.named_modules()
    ] + [model.index.version]


@pytest.mark.parametrize("stage", [*STAGES, "backward"])
def test_the_step_after_an_exception_is_a_first_step(stage, monkeypatch):
    expected = step(rag_model(tau=0.1, train_passage_encoder=True))
    model = rag_model(tau=0.1, train_passage_encoder=True)
    model.generator.eval()  # a mode of the user's
    before = settled(model)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        if stage == "backward":
            handle = model.reader.register_forward_hook(
                lambda _module, _args, hidden: fails_on_the_way_back(hidden)
            )
            try:
                model(**batch()).loss.backward()
            finally:
                handle.remove()
        else:
            owner, name = STAGES[stage]
            patch.setattr(f"{owner}.{name}", interrupt) if isinstance(owner, str) else (
                patch.setattr(owner, name, interrupt)
            )
            model(**batch())
    assert settled(model) == before
    model.index.update(torch.arange(1), model.index.vectors(torch.arange(1)))  # no lock is held
    for got, wanted in zip(step(model), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_part_on_another_device_is_named_with_both_sides():
    expected = step(rag_model(tau=0.1))
    for part in ("question_encoder", "generator"):
        model = rag_model(tau=0.1)
        getattr(model, part).to("meta")
        assert model.index.device.type == "cpu"  # its vectors cannot come back from there
        with pytest.raises(ValueError, match=f"{part}: expected weights on 'cpu', .* got 'meta'"):
            model(**batch())
        setattr(model, part, getattr(rag_model(tau=0.1), part))
        for got, wanted in zip(step(model), expected, strict=True):
            assert torch.equal(got, wanted)


def test_the_whole_model_on_meta_keeps_its_index():
    model = rag_model(tau=0.1).to("meta")
    vectors = model.index.vectors(torch.arange(12))
    with pytest.raises(
        ValueError, match="question_encoder: expected weights on 'cpu', .* got 'meta'"
    ):
        model(**batch())
    model.question_encoder = encoder()
    questions = batch()["input_ids"]
    assert torch.equal(model.retrieve(questions).rows, rag_model().retrieve(questions).rows)
    assert torch.equal(model.index.vectors(torch.arange(12)), vectors)
