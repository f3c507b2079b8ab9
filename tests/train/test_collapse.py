"""The warnings about a collapsing retriever, and the effects of the remedies."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastrag.train import RagTrainer
from fastrag.train.collapse import CollapseCallback, FreezeCallback, TemperatureCallback, symptoms
from tests.settings import rag_config
from tests.tiny import collator, encoder, questions, rag_model

HEALTHY = {"top_passage": 0.1, "unique_passages": 400, "prior_entropy": 0.8, "kl": 0.3}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, []),
        ({"top_passage": 0.8, "unique_passages": 9}, ["passages"]),
        ({"top_passage": 0.8, "unique_passages": 300}, []),  # a passage that many questions need
        ({"prior_entropy": 0.01, "kl": 2.0}, ["certainty"]),
        ({"prior_entropy": 0.01, "kl": 0.0}, []),  # it has decided, and is right
        ({"kl": 1e-6}, ["silence"]),
    ],
)
def test_symptoms(figures, expected):
    assert symptoms(HEALTHY | figures, n_docs=5, n_questions=100) == expected
    assert symptoms(HEALTHY | figures, n_docs=5, n_questions=10) == []


def test_warns_once_after_two_logs_in_a_row(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    args.gradient_accumulation_steps = 100
    callback = CollapseCallback(rag_model())
    control = TrainerControl()
    bad = HEALTHY | {"kl": 1e-6}
    said = []
    for step, figures in enumerate([bad, HEALTHY, bad, bad, bad], start=1):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback.on_log(args, state, control, {"loss": 1.0} | figures)
        said.append([str(each.message) for each in caught])
    assert [len(each) for each in said] == [0, 0, 0, 1, 0]
    assert "generator ignores its contexts" in said[3][0] and "freeze_steps" in said[3][0]


def test_temperature_falls_geometrically():
    model = rag_model(tau=0.1)
    callback = TemperatureCallback(model.retriever, 1.6, 0.1, steps=4)
    found = []
    for step in range(6):
        callback.on_step_begin(None, TrainerState(global_step=step), None)
        found.append(model.tau)
    assert found == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1, 0.1])
    with pytest.raises(ValueError, match="tau: expected a temperature that is not learned"):
        rag_model(learn_tau=True).retriever.set_tau(0.5)


def test_remedies_of_a_run(tmp_path):
    """The retriever stands still for two of three steps, under a falling temperature."""
    model = rag_model(tau=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = rag_config(
        {
            "retriever.freeze_steps": 2,
            "retriever.tau_start": 0.4,
            "retriever.tau_steps": 2,
            "training.output_dir": str(tmp_path),
            "training.max_steps": 3,
            "training.use_cpu": True,
            "training.save_strategy": "no",
        }
    )
    moved, taus = [], []

    class Watch(FreezeCallback):
        def on_step_end(self, args, state, control, **kwargs):
            taus.append(model.tau)
            now = dict(model.named_parameters())
            parts = ("retriever.question_encoder", "reader.")
            moved.append(
                [
                    any(not torch.equal(now[n], before[n]) for n in now if n.startswith(part))
                    for part in parts
                ]
            )

    trainer = RagTrainer(model, config, collator(), questions(), callbacks=[Watch(0)])
    trainer.train()
    assert moved == [[False, True], [False, True], [True, True]]
    assert taus == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever.tau_steps": 5}, "tau_steps: expected 0 without retriever.tau_start, got 5"),
        ({"retriever.tau_start": 1.0}, "tau_steps: expected an integer >= 1 with"),
        (
            {"retriever.tau_start": 1.0, "retriever.tau_steps": 2, "retriever.learn_tau": True},
            "tau_start: expected null with retriever.learn_tau",
        ),
        ({"loss.contrastive": 1.0}, "contrastive: expected 0 without data.force_labelled, got 1.0"),
        ({"loss.posterior_encoder": "e"}, "posterior_encoder: expected null unless loss.objective"),
        ({"loss.prune": 2.0}, r"loss\.prune: expected 0 <= number < 1 or None, got 2\.0"),
        ({"loss.objective": "jsa"}, r"loss\.marginal: expected 'sequence' with the objective jsa"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        rag_config(settings)


def test_posterior_encoder_of_a_run_trains_and_is_in_its_checkpoint(tmp_path):
    model = rag_model(objective="jsa:8", marginal="sequence", posterior_encoder=encoder(seed=3))
    start = [each.detach().clone() for each in model.posterior_encoder.parameters()]
    args = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, max_steps=1, save_steps=1, learning_rate=0.1
    )
    RagTrainer(model, args, collator(posterior=True), questions()).train()
    trained = dict(model.posterior_encoder.named_parameters())
    assert any(not old.equal(new) for old, new in zip(start, trained.values(), strict=True))
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    for name, parameter in trained.items():
        assert saved[f"retriever.posterior_encoder.{name}"].equal(parameter), name
