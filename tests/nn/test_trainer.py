"""RagModel under plain transformers.Trainer, and with PEFT adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from fastrag.data import Question
from tests.architectures import lora_generator
from tests.tiny import CHECKPOINTING, batch, collator, questions, rag_model, same_weights

STEPS = 6


def trainer(model, folder, kind="seq2seq", **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 3,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=questions(),
        eval_dataset=questions(4),
        data_collator=collator(kind),
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_trains_saves_and_resumes(tmp_path, kind):
    """Tied weights in the checkpoint once; a resumed run ends where an unbroken one does."""
    whole = trainer(rag_model(kind, dropout=0.1, explore=1, learn_tau=True), tmp_path / "a", kind)
    whole.train()
    stored = load_file(tmp_path / "a" / "checkpoint-3" / "model.safetensors")
    head, embedding = (
        ("reader.generator.lm_head.weight", "reader.generator.shared.weight")
        if kind == "seq2seq"
        else ("reader.generator.lm_head.weight", "reader.generator.model.embed_tokens.weight")
    )
    assert embedding in stored and head not in stored and "retriever.log_tau" in stored
    again = rag_model(kind, dropout=0.1, explore=1, learn_tau=True, seed=9)
    again.index = rag_model(kind).index  # Trainer keeps weights alone; the index is frozen
    again.load_state_dict(stored)
    assert again.generator.lm_head.weight is again.generator.get_input_embeddings().weight
    rest = trainer(again, tmp_path / "a", kind)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    same_weights(whole.model, rest.model)
    assert losses(rest)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-4)
    assert rest.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-4)


def test_loss_of_accumulated_batches_is_that_of_one(tmp_path):
    steps = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}  # Adam blows up rounding
    one = trainer(rag_model(), tmp_path / "a", per_device_train_batch_size=8, **steps)
    four = trainer(
        rag_model(),
        tmp_path / "b",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **steps,
    )
    one.train()
    four.train()
    assert losses(four) == pytest.approx(losses(one), rel=1e-4)
    same_weights(one.model, four.model)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing(tmp_path, kind):
    """Same weights with and without, passage encoder included; the parts did recompute."""
    settings = {"train_passage_encoder": True, "tau": 0.1}
    steps = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}  # Adam blows up rounding
    plain = trainer(rag_model(kind, **settings), tmp_path / "a", kind, **steps)
    plain.train()
    again = trainer(
        rag_model(kind, **settings), tmp_path / "b", kind, **steps, **{CHECKPOINTING: True}
    )
    again.train()
    parts = [again.model.generator, again.model.question_encoder, again.model.passage_encoder]
    assert all(
        any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        for module in parts
    )
    same_weights(plain.model, again.model)
    again.model.gradient_checkpointing_disable()
    assert not any(getattr(part, "gradient_checkpointing", False) for part in again.model.modules())
    again.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(part, "gradient_checkpointing", False) for part in again.model.modules())


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_evaluates_with_metrics_of_the_users(tmp_path, marginal):
    """Trainer joins outputs of 4, 4 and 1 questions, whose answers have 2, 2 and 3 tokens."""
    seen = []
    run = trainer(rag_model(marginal=marginal), tmp_path, per_device_eval_batch_size=4)
    run.eval_dataset = [*questions(8), Question("q8", "ida", ("gold plum",))]
    run.compute_metrics = lambda found: seen.append(found) or {"n": len(found.label_ids)}
    metrics = run.evaluate()
    doc_scores, rows, *more = seen[0].predictions
    assert metrics["eval_n"] == 9 and doc_scores.shape == rows.shape == (9, 3)
    assert (rows >= 0).all() and run.model.config.to_json_string()  # TensorBoard logs it
    assert [values.shape for values in more] == ([(9, 3)] if marginal == "sequence" else []) + [
        (3,)
    ]


def test_label_smoothing_of_the_trainer_is_refused_with_the_way_out(tmp_path):
    run = trainer(rag_model(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"RagModel\(label_smoothing="):
        run.train()


# PEFT


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["body", "head", "modules_to_save"],
)
def test_lora_trains_under_trainer(tmp_path, settings):
    model = rag_model("causal", make_generator=lambda: lora_generator("qwen3", **settings))
    before = {name: p.detach().clone() for name, p in model.generator.named_parameters()}
    run = trainer(model, tmp_path, "causal", save_steps=6)
    run.train()
    changed = {
        name for name, p in model.generator.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name, p in model.generator.named_parameters() if p.requires_grad}
    other = rag_model("causal", make_generator=lambda: lora_generator("qwen3", 7, **settings))
    other.load_state_dict(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    data = batch("causal")
    torch.testing.assert_close(other(**data).loss, model(**data).loss)


def test_lora_with_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model = rag_model("causal", make_generator=lora_generator, tau=0.1)
        if checkpointed:
            model.activation_checkpointing_enable()
        model(**batch("causal")).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_bf16_autocast_under_trainer(tmp_path):
    """Scores, prior and loss stay in fp32 under autocast."""
    plain = trainer(rag_model(tau=0.1), tmp_path / "a", max_steps=1)
    half = trainer(rag_model(tau=0.1), tmp_path / "b", max_steps=1, bf16=True)
    plain.train()
    half.train()
    assert losses(half) == pytest.approx(losses(plain), rel=0.02)
    assert losses(half) != losses(plain)
    with torch.autocast("cpu", torch.bfloat16):
        out = rag_model(tau=0.1)(**batch())
    assert out.loss.dtype == out.doc_scores.dtype == torch.float32


def test_lora_loss_falls(tmp_path):
    model = rag_model("causal", tau=0.1, make_generator=lora_generator)
    run = trainer(model, tmp_path, "causal", max_steps=30, learning_rate=2e-2, save_steps=100)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
