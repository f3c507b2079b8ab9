"""RagModel under plain transformers.Trainer, and with PEFT adapters."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

from fastrag import FlatIndex, RagModel
from tests.architectures import GENERATORS
from tests.tiny import batch, collator, questions, rag_model

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


def same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_trains_saves_and_resumes(tmp_path, kind):
    """Tied weights in the checkpoint once; a resumed run ends where an unbroken one does."""
    whole = trainer(rag_model(kind, dropout=0.1, explore=1, learn_tau=True), tmp_path / "a", kind)
    whole.train()
    stored = load_file(tmp_path / "a" / "checkpoint-3" / "model.safetensors")
    head, embedding = (
        ("generator.lm_head.weight", "generator.shared.weight")
        if kind == "seq2seq"
        else ("generator.lm_head.weight", "generator.model.embed_tokens.weight")
    )
    assert embedding in stored and head not in stored and "log_tau" in stored
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
        rag_model(kind, **settings), tmp_path / "b", kind, **steps, activation_checkpointing=True
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


# PEFT


def lora_generator(name="llama", seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "lm_head"], **settings}
    model = get_peft_model(GENERATORS[name](), LoraConfig(**settings))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


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


# Folders


def reload(model, folder, **settings):
    return RagModel.from_pretrained(folder, model.index, model.passages, **settings)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("shared", [False, True], ids=["two_encoders", "shared"])
def test_saved_folder_gives_the_same_loss(tmp_path, kind, shared):
    model = rag_model(kind, shared=shared, tau=0.2, learn_tau=True, marginal="sequence")
    with torch.no_grad():
        model.log_tau.add_(0.3)
    model.save_pretrained(tmp_path / "m")
    again = reload(model, tmp_path / "m")
    assert (again.passage_encoder is again.question_encoder) == shared
    model.eval()
    data = batch(kind)
    torch.testing.assert_close(again(**data).loss, model(**data).loss)
    same_weights(model, again)
    for name in ("n_docs", "marginal", "max_context", "explore_tau"):
        assert getattr(again, name) == getattr(model, name)
    assert again.builder.template.template == model.builder.template.template
    words = again.generator_tokenizer
    assert words.get_vocab() == model.generator_tokenizer.get_vocab()


def test_folder_with_its_index(tmp_path):
    model = rag_model(tau=0.1).eval()
    model.save_pretrained(tmp_path / "m", include_index=True)
    again = RagModel.from_pretrained(tmp_path / "m", n_docs=2)
    assert again.n_docs == 2
    data = batch()
    assert again(**data).rows.equal(model(**data).rows[:, :2])


def test_saving_again_replaces_whole(tmp_path):
    """A failed save leaves the good folder as it was, and no other behind."""
    model = rag_model(tau=0.1).eval()
    model.save_pretrained(tmp_path / "m")
    expected = model(**batch()).loss
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def broken(*_, **__):
        raise OSError("disk full")

    other = rag_model(tau=0.1, seed=4)
    other.generator.save_pretrained = broken
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path / "m")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    torch.testing.assert_close(reload(model, tmp_path / "m")(**batch()).loss, expected)
    del other.generator.save_pretrained
    other.save_pretrained(tmp_path / "m")
    with pytest.raises(AssertionError):
        same_weights(reload(model, tmp_path / "m"), model)
    same_weights(reload(model, tmp_path / "m"), other)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "modules_to_save"],
)
@pytest.mark.parametrize("named", [False, True], ids=["base_kept", "base_named"])
def test_adapter_is_saved_as_adapter(tmp_path, settings, named):
    def make():
        model = lora_generator("qwen3", **settings)
        if not named:
            return model
        torch.manual_seed(0)  # the weights under lora_generator's adapter
        GENERATORS["qwen3"]().save_pretrained(tmp_path / "base")
        base = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
        wrapped = get_peft_model(base, LoraConfig(r=2, **settings))
        wrapped.load_state_dict(model.state_dict())
        return wrapped

    model = rag_model("causal", make_generator=make, tau=0.1).eval()
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "generator" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "m" / "generator" / "model.safetensors").exists()
    assert (tmp_path / "m" / "generator_base").exists() != named
    again = reload(model, tmp_path / "m")
    data = batch("causal")
    torch.testing.assert_close(again(**data).loss, model(**data).loss)
    trained = {name for name, p in model.generator.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in again.generator.named_parameters() if p.requires_grad}


def test_merged_adapter(tmp_path):
    model = rag_model("causal", make_generator=lambda: lora_generator("qwen3"), tau=0.1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", merge_adapter=True)
    assert not (tmp_path / "m" / "generator" / "adapter_config.json").exists()
    again = reload(model, tmp_path / "m")
    data = batch("causal")
    torch.testing.assert_close(again(**data).loss, model(**data).loss, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_merge_into_a_tied_head_is_refused(tmp_path):
    model = rag_model("causal", make_generator=lora_generator)
    with pytest.raises(ValueError, match="merge_adapter: expected an untied head, got LoRA"):
        model.save_pretrained(tmp_path / "m", merge_adapter=True)
    assert not (tmp_path / "m").exists()
    model.save_pretrained(tmp_path / "m")
    data = batch("causal")
    model.eval()
    torch.testing.assert_close(reload(model, tmp_path / "m")(**data).loss, model(**data).loss)


def test_rejects_folders(tmp_path):
    model = rag_model()
    with pytest.raises(ValueError, match="expected a fastrag-model folder"):
        reload(model, tmp_path / "none")
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="index: expected an index"):
        RagModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="index: expected vectors of width 16, got 8"):
        RagModel.from_pretrained(folder, FlatIndex(8), model.passages)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected an empty folder or a fastrag-model one"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    config = json.loads((folder / "generator" / "config.json").read_text())
    (folder / "generator" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ValueError, match="generator: expected the weights of a T5"):
        reload(model, folder)
    settings = json.loads((folder / "rag_config.json").read_text())
    (folder / "generator" / "config.json").write_text(json.dumps(config))
    for change, message in (
        ({"n_docs": "3"}, "n_docs: expected an integer >= 1, got '3'"),
        ({"template": 5}, "rag_config.json: template: expected a mapping, got 5"),
    ):
        (folder / "rag_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            reload(model, folder)
    (folder / "rag_config.json").write_text("5")
    with pytest.raises(ValueError, match="rag_config.json: expected the keys .* got int"):
        reload(model, folder)
    (folder / "rag_config.json").write_text(json.dumps({**settings, "depth": 9}))
    with pytest.raises(ValueError, match="rag_config.json: expected the keys"):
        reload(model, folder)
    (folder / "rag_config.json").unlink()
    with pytest.raises(ValueError, match="expected the settings of a saved RagModel"):
        reload(model, folder)


@pytest.mark.parametrize(
    "file",
    [
        "generator/adapter_model.safetensors",
        "generator/tokenizer.json",
        "generator_base/config.json",
    ],
)
def test_rejects_damaged_files(tmp_path, file):
    model = rag_model("causal", make_generator=lora_generator)
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=file.split("/")[0]):
        reload(model, tmp_path / "m")


def test_save_killed_between_the_renames_is_taken_back(tmp_path):
    model = rag_model().eval()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    torch.testing.assert_close(reload(model, tmp_path / "m")(**batch()).loss, model(**batch()).loss)
