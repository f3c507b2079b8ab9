"""In how many bits the generator's weights are kept, and how those of few bits are updated."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastrag.nn.checkpoint import load_whole
from fastrag.train import RagTrainer, build_model, training_config
from fastrag.train.callbacks import read_metrics
from fastrag.train.optimizer import MasterWeights
from tests import tiny
from tests.settings import rag_config

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A config's folders; the generator is stored in bfloat16."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.save_parts(folder)
    generator = tiny.t5().to(BF16)
    generator.save_pretrained(folder / "generator")
    corpus = [{"id": p.id, "title": p.title, "text": p.text} for p in tiny.passages()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in corpus))
    return {
        "retriever.question_encoder": str(folder / "encoder"),
        "reader.generator": str(folder / "generator"),
        "data.corpus": str(folder / "corpus.jsonl"),
    }


def weight_of(model: Any) -> torch.Tensor:
    base = getattr(model.generator, "base_model", model.generator)
    return base.encoder.block[0].layer[1].DenseReluDense.wo.weight


@pytest.mark.parametrize(
    ("settings", "dtype", "said"),
    [
        ({}, torch.float32, "generator: float32 weights, stored in bfloat16 (see"),
        ({"training.bf16": True}, torch.float32, "generator: float32 weights"),
        ({"reader.dtype": "bfloat16"}, BF16, ""),
        ({"reader.lora.rank": 2}, torch.float32, "generator: float32 weights"),
        ({"reader.lora.rank": 2, "training.bf16": True}, BF16, ""),
        (
            {"reader.lora.rank": 2, "training.bf16": True, "reader.dtype": "float32"},
            torch.float32,
            "generator: float32 weights",
        ),
    ],
)
def test_dtype_is_chosen_and_said(
    parts: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    dtype: torch.dtype,
    said: str,
) -> None:
    model = build_model(rag_config(parts | {"training.output_dir": str(tmp_path)} | settings))
    frozen = {p.dtype for n, p in model.generator.named_parameters() if "lora_" not in n}
    adapters = {p.dtype for n, p in model.generator.named_parameters() if "lora_" in n}
    assert frozen == {dtype} and adapters == (
        {torch.float32} if "reader.lora.rank" in settings else set()
    )
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)


def test_mistakes(parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^reader\.dtype: expected one of auto, float32, bfl"):
        rag_config({"reader.dtype": "int8"})
    with pytest.raises(ValueError, match=r"^reader\.dtype: expected auto or float32 with .*fp16"):
        rag_config({"reader.dtype": "bfloat16", "training.fp16": True})
    shutil.copytree(parts["reader.generator"], tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gguf"}}))
    packed = parts | {"reader.generator": str(tmp_path / "packed")}
    with pytest.raises(ValueError, match=r"^generator: .*config.json: .* no quantization_config"):
        build_model(rag_config(packed | {"training.output_dir": str(tmp_path / "run")}))


@pytest.mark.parametrize("slow", [True, False])
def test_bf16_that_a_cpu_emulates_is_said(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(training_config, "multiplies", lambda dtype: not slow)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rag_config({"training.bf16": True, "training.use_cpu": True}).training_arguments()
        rag_config({"training.use_cpu": True}).training_arguments()
    said = [str(each.message) for each in seen if str(each.message).startswith("training.bf16: ")]
    assert len(said) == slow


def test_updates_that_a_weight_of_few_bits_loses_add_up() -> None:
    """Equal to the bit to the optimiser on float32 weights that are rounded for each gradient."""
    torch.manual_seed(0)
    start, inputs = torch.randn(4, 8).to(BF16), torch.randn(40, 3, 8).to(BF16)
    low, lost = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bias, bias_alone = (nn.Parameter(torch.zeros(4)) for _ in range(2))  # float32: no copy
    master = nn.Parameter(start.float())

    def groups(weight: nn.Parameter, other: nn.Parameter) -> list[dict[str, Any]]:
        return [{"params": [weight], "lr": 1e-4}, {"params": [other], "lr": 1e-2}]

    optimizer = MasterWeights(torch.optim.AdamW, groups(low, bias), weight_decay=0.1)
    alone = torch.optim.AdamW(groups(master, bias_alone), weight_decay=0.1)
    plain = torch.optim.AdamW([lost], lr=1e-4, weight_decay=0.1)
    for x in inputs:
        for weight, other in ((low, bias), (lost, torch.zeros(4))):
            (torch.tanh(x @ weight.t()).float() + other).square().mean().backward()
        rounded = master.detach().to(BF16).requires_grad_()
        (torch.tanh(x @ rounded.t()).float() + bias_alone).square().mean().backward()
        assert rounded.grad is not None
        master.grad = rounded.grad.float()
        for each in (optimizer, alone, plain):
            each.step()
            each.zero_grad()
        assert low.grad is None and low.dtype == BF16
    assert torch.equal(low, master.to(BF16)) and torch.equal(bias, bias_alone)
    moved = [(each - start).abs().mean().item() for each in (low.detach(), lost.detach())]
    assert moved[0] > 4 * moved[1]


def trainer(folder: Path, **settings: Any) -> RagTrainer:
    training = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_tqdm": True,
    }
    config = rag_config({"training": training | settings})
    model = tiny.rag_model("causal", make_generator=lambda: tiny.llama().to(BF16))
    return RagTrainer(model, config, tiny.collator("causal"), tiny.questions())


@pytest.mark.parametrize("bf16", [False, True])
def test_bfloat16_weights_train_and_resume_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = trainer(whole, bf16=bf16)
    before = first.model.generator.model.embed_tokens.weight.detach().clone()
    first.train()
    assert first.model.generator.dtype == BF16
    assert not torch.equal(first.model.generator.model.embed_tokens.weight, before)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", cut)
    second = trainer(cut, bf16=bf16)
    second.train(resume_from_checkpoint=True)
    losses = [
        [each["loss"] for each in read_metrics(folder / "metrics.jsonl") if "loss" in each]
        for folder in (whole, cut)
    ]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_a_state_without_copies_is_refused(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=BF16))
    optimizer = MasterWeights(torch.optim.SGD, [{"params": [weight]}], lr=0.1)
    plain = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="^state_dict: expected float32 copies of 1 .*, got none"):
        optimizer.load_state_dict(plain.state_dict())
    other = plain.state_dict() | {"masters": [torch.ones(3)]}
    with pytest.raises(ValueError, match="got those of other parameters"):
        optimizer.load_state_dict(other)


def test_weights_of_a_saved_model_keep_their_dtype(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.save_model()
    from transformers import AutoModelForCausalLM

    assert load_whole(AutoModelForCausalLM, tmp_path / "model" / "generator").dtype == BF16
