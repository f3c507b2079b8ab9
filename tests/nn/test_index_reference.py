"""The index in a state dict: named, never copied, and compared when the state is loaded."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load, save

from fastrag.index import FlatIndex
from fastrag.nn.index_reference import IndexReference
from tests.tiny import rag_model, same_weights

KEY = "retriever._extra_state"


def load_quietly(model, state):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)


def test_a_state_dict_names_its_index(tmp_path):
    model = rag_model()
    model.index.save(tmp_path / "index")
    state = model.state_dict()
    reference = IndexReference.unpack(state[KEY])
    assert reference == (16, 12, 1, model.index.checksum(), str(tmp_path / "index"))
    assert state[KEY].numel() < 512
    again = rag_model(seed=9)
    again.index = FlatIndex.load(tmp_path / "index")
    load_quietly(again, load(save(state)))  # safetensors holds tensors alone
    same_weights(model, again)


def test_a_state_dict_without_a_reference_loads_strictly():
    """Models that were saved before there was a reference."""
    model, again = rag_model(), rag_model(seed=9)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != KEY}
    load_quietly(again, state)
    same_weights(model, again)


@pytest.mark.parametrize("change", ["update", "remove"])
def test_another_content_is_a_warning_that_names_both(change):
    model, state = rag_model(), rag_model().state_dict()
    if change == "update":
        model.index.update(torch.arange(2), torch.randn(2, 16))
    else:
        model.index.remove(torch.arange(2))
    saved, present = IndexReference.unpack(state[KEY]), IndexReference.of(model.index)
    with pytest.warns(UserWarning, match="refresh_index") as caught:
        model.load_state_dict(state)
    assert str(saved) in str(caught[0].message) and str(present) in str(caught[0].message)
    assert "in version 1 (checksum" in str(saved) and "in version 2 (checksum" in str(present)


def test_an_index_that_is_still_empty_can_have_any_reference():
    load_quietly(rag_model(fill_index=False), rag_model().state_dict())
    load_quietly(rag_model(), rag_model(fill_index=False).state_dict())


def test_vectors_of_another_width_are_refused():
    model = rag_model()
    state = model.state_dict() | {KEY: IndexReference(8, 12, 1, None, None).pack()}
    with pytest.raises(ValueError, match="index: expected vectors of width 8, .* got 16"):
        model.load_state_dict(state)
    state[KEY] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="index reference: expected JSON"):
        model.load_state_dict(state)
