"""Parameter groups and label counts, as a bare loop calls them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from fastrag.train import RagTrainer, count_label_tokens, parameter_groups
from tests import tiny


class Wrapped(nn.Module):
    """As DistributedDataParallel and torch.compile wrap a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["plain", "wrapped"])
def test_every_trained_parameter_is_in_its_group(tmp_path: Path, wrap: type[Wrapped]) -> None:
    model = tiny.rag_model(train_passage_encoder=True, learn_tau=True)
    model.generator.encoder.requires_grad_(False)
    model.loss_fn.register_parameter("mixture", nn.Parameter(torch.ones(2, 2)))
    groups = parameter_groups(wrap(model), retriever_lr=1.0, reader_lr=2.0, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert [group["part"] for group in groups] == ["reader"] * 2 + ["retriever"] * 2
    # what transformers.Trainer decays, but for vectors
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = RagTrainer(tiny.rag_model(), args, tiny.collator(), tiny.questions())
    decays = set(trainer.get_decay_parameter_names(model))
    for name, (rate, decay) in found.items():
        assert rate == (2.0 if name.startswith("reader.") else 1.0), name
        assert decay == (0.1 if name in decays and model.get_parameter(name).dim() > 1 else 0), name
    assert {decay for _, decay in found.values()} == {0.0, 0.1}


def test_groups_of_a_foreign_module_are_refused() -> None:
    message = "model: expected parameters of `retriever`, `reader` and `loss_fn`, .* got weight"
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Linear(2, 2), retriever_lr=1.0, reader_lr=1.0)


def test_micro_batches_add_up_to_one_batch() -> None:
    model = tiny.rag_model().train()
    collator, questions = tiny.collator(), tiny.questions()
    gradients: list[dict[str, Tensor]] = []
    for size in (12, 5):
        model.zero_grad()
        batches = [collator(questions[i : i + size]) for i in range(0, 12, size)]
        total = count_label_tokens(batches)
        for batch in batches:
            model(**batch, num_items_in_batch=total).loss.backward()
        assert int(total) == sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batches", [[], [{"labels": torch.ones(1, 2)}, {"labels": None}]])
def test_a_count_of_nothing_is_refused(batches: list[dict[str, Tensor]]) -> None:
    message = f"batches: expected batches with labels, got {len(batches)} batches"
    with pytest.raises(ValueError, match=re.escape(message)):
        count_label_tokens(batches)


def test_the_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real ranks: tests/train/ranks.py."""
    groups: list[object] = []

    def all_reduce(count: Tensor, group: object = None) -> None:
        groups.append(group)
        count += 40

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    batches = [{"labels": torch.tensor([[1, -100]])}, {"labels": torch.tensor([[1, 2]])}]
    group: object = object()
    assert count_label_tokens(batches).item() == 43
    assert count_label_tokens(batches, group, device="cpu").item() == 43  # type: ignore[arg-type]
    assert groups == [None, group]
