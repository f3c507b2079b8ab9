"""The training step: both sides read the same texts, find the same passages and train alike.

That loss and gradients are those of the oracle is in test_registry.py, as for every entry.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ops import OPS
from benchmarks.ops import rag_step_corpus as texts
from benchmarks.ops.rag_step import FastragStep, GeneratorStep, HfStep, Parts, Problem

OP = OPS["rag_step"]
TINY = OP.checked[0]
N_QUESTIONS, N_DOCS, CONTEXT_WIDTH, ANSWER_WIDTH = TINY[:4]
CPU = torch.device("cpu")
SIDES = {"fastrag": FastragStep, "hf": HfStep}


def problem(shape: tuple[int, ...] = TINY) -> Problem:
    return OP.make(shape, torch.float32, CPU)


def step(side: str, mode: str) -> Any:
    reason = OP.provider(side).why_not("cpu", "float32", mode)
    if reason:
        pytest.skip(reason)
    return SIDES[side](mode, problem())


# ------------------------------------------------------------------------------------------ texts


def test_contexts_and_answers_have_the_widths_of_the_shape() -> None:
    parts = Parts("token", problem())
    ids, mask = parts.corpus.contexts(torch.arange(12).view(3, 4))
    assert ids.shape == mask.shape == (12, CONTEXT_WIDTH)
    assert parts.batch["labels"].shape == (N_QUESTIONS, ANSWER_WIDTH)
    assert (parts.batch["labels"] >= 0).all()


def test_checked_answers_differ_in_length() -> None:
    made = Parts("token", OP.make_checked(TINY, torch.float32, CPU))
    lengths = (made.batch["labels"] >= 0).sum(1)
    assert lengths.tolist() == [7, 6, 5]  # of 2 labels at the least Hugging Face keeps the prior


def test_passages_beyond_the_facts_are_other_passages() -> None:
    n = len(texts.facts().passages)
    first, again = (texts.passage(at, 40) for at in (5, n + 5))
    assert first.title == again.title and first.text != again.text


@pytest.mark.parametrize(
    ("place", "number", "said"),
    [
        (2, 12, "L: expected room for a passage and questions of"),
        (3, 2, "T: expected at least 3 tokens (<s>, answer, </s>), got 2"),
        (4, 17, "H: expected one of 16, 256, 768, got 17"),
    ],
)
def test_a_shape_without_a_step_is_refused(place: int, number: int, said: str) -> None:
    shape = tuple(number if i == place else size for i, size in enumerate(TINY))
    with pytest.raises(ValueError) as error:
        Parts("token", problem(shape))
    assert str(error.value).startswith(said)


# ------------------------------------------------------------------------------------ both sides


def retrieved(side: Any) -> torch.Tensor:
    if isinstance(side, FastragStep):
        return side.output().rows
    seen = []
    retrieve = side.model.rag.retriever.retrieve

    def remember(*args: Any) -> Any:
        found = retrieve(*args)
        seen.append(torch.from_numpy(found[1]))
        return found

    side.model.rag.retriever.retrieve = remember
    side.output()
    return seen[0]


def test_both_retrieve_the_same_rows() -> None:
    parts = Parts("token", problem())
    query_emb = parts.question_encoder(parts.batch["input_ids"], parts.batch["attention_mask"])[0]
    expected = (query_emb.double() @ parts.vectors.double().t()).topk(N_DOCS, dim=1).indices
    assert len(expected.unique()) > N_DOCS  # the questions do not all have the same passages
    for side in SIDES:
        assert torch.equal(retrieved(step(side, "token")), expected), side


def test_both_give_the_generator_the_same_contexts() -> None:
    seen = {}
    for name in SIDES:
        side = step(name, "token")
        inner = side.parts.generator.forward

        def remember(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            seen[name] = kwargs["input_ids"], kwargs["attention_mask"]
            return inner(*args, **kwargs)

        side.parts.generator.forward = remember
        side()
    for ours, theirs in zip(seen["fastrag"], seen["hf"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_both_train_alike(mode: str) -> None:
    sides = [step(side, mode) for side in SIDES]
    sizes = [sum(p.numel() for p in side.model.parameters()) for side in sides]
    assert sizes[0] == sizes[1]
    for side in sides:
        side.optimizer.param_groups[0]["lr"] = 1e-3
    losses = torch.tensor([[float(side()[0]) for _ in range(3)] for side in sides])
    assert (losses[:, 2] < losses[:, 0] - 1e-3).all()  # the optimiser acts
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)


def test_the_retriever_needs_packages_that_its_loss_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "faiss" and find(name))
    hf = OP.provider("hf")
    assert hf.why_not("cpu", "float32", "token") == "faiss is not installed"
    assert hf.why_not("cpu", "float32", "sequence-given") == ""
    assert "float32 and bfloat16 only" in hf.why_not("cpu", "float16", "token-given")


# ------------------------------------------------------------------------------------------- work


def test_flops_are_those_of_the_matrix_products() -> None:
    shape = (2, 3, 64, 8, 16, 6)
    side = HfStep("token-given", problem(shape))
    for model in (side.parts.question_encoder, side.parts.generator):
        model.set_attn_implementation("eager")  # torch counts no attention that is one operation
    with FlopCounterMode(display=False) as counter:
        side.loss().backward()
    # one column of the decoder and of the head more than there are labels
    expected = OP.flops("token-given", (*shape[:3], 9, *shape[4:]))
    # the questions have 15 tokens, not the 12 of the formula
    assert 0.999 < counter.get_total_flops() / expected < 1.01


def test_the_ceiling_is_the_body_alone() -> None:
    side = GeneratorStep("token-given", problem())
    assert side() == ()
    assert side.parts.generator.model.decoder.layers[0].fc1.weight.grad is not None
    assert side.parts.watched()[0].grad is None  # no question encoder
