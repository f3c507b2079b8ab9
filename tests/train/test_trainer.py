"""RagTrainer: accumulation, learning rates, resume, evaluation, best checkpoint, early stopping."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from fastrag.data import Question
from fastrag.freshness import RefreshPolicy
from fastrag.nn import RagModel
from fastrag.train import RagConfig, RagTrainer
from fastrag.train.callbacks import read_metrics
from tests import tiny
from tests.settings import rag_config

JOINT: dict[str, Any] = {"train_passage_encoder": True, "explore": 1}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 5e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **defaults | settings)


def uneven_questions() -> list[Question]:
    """Answers of one to three words, so that micro-batches differ in counted tokens."""
    return [
        Question(id=q.id, question=q.question, answers=(" ".join([*q.answers] * (1 + i % 3)),))
        for i, q in enumerate(tiny.questions())
    ]


def losses(folder: Path) -> list[float]:
    return [each["loss"] for each in read_metrics(folder / "metrics.jsonl") if "loss" in each]


def parameters(model: RagModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_accumulation_equals_one_big_batch(tmp_path: Path, kind: str, marginal: str) -> None:
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = tiny.rag_model(kind, marginal=marginal, train_passage_encoder=True)
        folder = tmp_path / str(batch_size)
        args = arguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_steps=3,
        )
        RagTrainer(model, args, tiny.collator(kind), uneven_questions()).train()
        results.append((losses(folder), parameters(model)))
    (big, big_parameters), (small, small_parameters) = results
    assert big == pytest.approx(small, rel=1e-5)
    for name, parameter in big_parameters.items():
        torch.testing.assert_close(small_parameters[name], parameter, rtol=1e-4, atol=1e-6)


def test_learning_rates_and_weight_decay_by_part(tmp_path: Path) -> None:
    model = tiny.rag_model(train_passage_encoder=True, learn_tau=True)
    trainer = RagTrainer(
        model,
        arguments(tmp_path, weight_decay=0.1),
        tiny.collator(),
        tiny.questions(),
        retriever_lr=1e-3,
        generator_lr=2e-3,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["retriever.log_tau"] == (1e-3, 0.0)
    prefix = "retriever.question_encoder.model.encoder.layer.0."
    assert found[prefix + "intermediate.dense.weight"] == (1e-3, 0.1)
    assert found[prefix + "intermediate.dense.bias"] == (1e-3, 0.0)
    assert found[prefix + "output.LayerNorm.weight"] == (1e-3, 0.0)
    assert {
        n: v[0] for n, v in found.items() if n.startswith("retriever.passage_encoder.")
    }.values()
    assert all(
        lr == (2e-3 if name.startswith("reader.generator.") else 1e-3)
        for name, (lr, _) in found.items()
    )
    assert found["reader.generator.encoder.block.0.layer.0.layer_norm.weight"] == (2e-3, 0.0)
    assert found["reader.generator.shared.weight"] == (2e-3, 0.1)


def test_frozen_passage_encoder_is_left_out(tmp_path: Path) -> None:
    model = tiny.rag_model()
    trainer = RagTrainer(model, arguments(tmp_path), tiny.collator(), tiny.questions())
    trained = {id(p) for g in trainer.create_optimizer().param_groups for p in g["params"]}
    assert trained.isdisjoint(id(p) for p in model.passage_encoder.parameters())
    before = parameters(model)
    trainer.train()
    after = parameters(model)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"question_encoder", "generator"}


def test_replug_trains_the_question_encoder_alone(tmp_path: Path) -> None:
    model = tiny.rag_model(objective="replug", tau_lm=0.5)
    trainer = RagTrainer(model, arguments(tmp_path), tiny.collator(), tiny.questions())
    before = parameters(model)
    trainer.train()
    after = parameters(model)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"question_encoder"}


def test_label_smoothing_goes_to_the_loss(tmp_path: Path) -> None:
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    model = tiny.rag_model()
    trainer = RagTrainer(model, args, tiny.collator(), tiny.questions())
    assert model.loss_fn.label_smoothing == 0.1
    assert trainer.label_smoother is None
    assert args.label_smoothing_factor == 0.1  # the caller's arguments stay as they were
    assert trainer.args.remove_unused_columns is False


def resumable(folder: Path, joint: bool, **settings: Any) -> RagTrainer:
    model = tiny.rag_model(**(JOINT if joint else {"explore": 1}))
    answers = [
        Question(id=q.id, question=q.question, answers=(*q.answers, "red", "blue blue"))
        for q in tiny.questions()
    ]
    return RagTrainer(
        model,
        arguments(folder, max_steps=10, save_strategy="steps", save_steps=4, **settings),
        tiny.collator(answer_choice="random"),
        answers,
        refresh="every:3" if joint else "frozen",
    )


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_continues_the_same_losses(
    tmp_path: Path, joint: bool, accumulation: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"gradient_accumulation_steps": accumulation}
    first = resumable(whole, joint, **settings)
    first.train()
    shutil.copytree(whole / "checkpoint-4", cut / "checkpoint-4")
    # as a killed process leaves it: lines after the checkpoint, the last one cut off
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    second = resumable(cut, joint, **settings)
    with torch.no_grad():
        for parameter in second.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)  # loading has to undo this
    second.train(resume_from_checkpoint=True)
    assert len(losses(cut)) == 10
    assert losses(cut) == losses(whole)
    for name, parameter in parameters(first.model).items():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
    assert torch.equal(first.model.index.index_emb, second.model.index.index_emb)
    assert first.model.index.version == second.model.index.version


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    resumable(tmp_path, joint=False).train()
    other = resumable(tmp_path, joint=False)
    with torch.no_grad():
        next(other.model.passage_encoder.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="which does not train, has other values"):
        other.train(resume_from_checkpoint=True)
    other = resumable(tmp_path, joint=False)
    other.model.index.update(torch.tensor([0]), torch.ones(1, 16))
    with pytest.raises(ValueError, match="expected the index that the run started with"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="another configuration"):
        resumable(tmp_path, joint=True).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="expected a new run folder, .* holds checkpoints"):
        resumable(tmp_path, joint=False).train()  # its checkpoint-4 would give way to checkpoint-10
    with pytest.raises(ValueError, match="expected a checkpoint in .*empty, found none"):
        resumable(tmp_path / "empty", joint=False).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_resume_refuses_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    resumable(tmp_path, joint=False).train()
    path = tmp_path / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"checkpoint-10/{name}: expected \d+ bytes, got \d+$"):
        resumable(tmp_path, joint=False).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resume_refuses_a_fresh_start_in_part(tmp_path: Path, name: str) -> None:
    resumable(tmp_path, joint=False).train()
    (tmp_path / "checkpoint-10" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name[:9]}.*: expected the state to go on with"):
        resumable(tmp_path, joint=False).train(resume_from_checkpoint=True)


def test_resume_refuses_another_number_of_processes(tmp_path: Path) -> None:
    resumable(tmp_path, joint=False).train()
    alone = tmp_path / "checkpoint-10" / "rng_state.pth"
    for rank in (0, 1):
        shutil.copy(alone, alone.with_name(f"rng_state_{rank}.pth"))
    alone.unlink()
    with pytest.raises(ValueError, match="checkpoint-10: expected .* processes, 1, got one of 2"):
        resumable(tmp_path, joint=False).train(resume_from_checkpoint=True)


def test_refresh_makes_vectors_anew(tmp_path: Path) -> None:
    model = tiny.rag_model(**JOINT)
    version = model.index.version
    trainer = RagTrainer(
        model, arguments(tmp_path), tiny.collator(), tiny.questions(), refresh="every:4"
    )
    trainer.train()
    assert model.index.version == version + 1  # at step 4 of 6
    assert trainer.refresher.refreshed_at == 4
    stale = model.index.index_emb.clone()
    trainer.save_model()
    assert trainer.refresher.refreshed_at == 6
    assert not torch.equal(model.index.index_emb, stale)
    loaded = RagModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.index.index_emb, model.index.index_emb)
    batch = tiny.collator()(tiny.questions())
    model.eval()
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


class _Answers(TrainerCallback):
    """Stands in for training progress: moves the metric that evaluation reports."""

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        metrics["eval_em"] = self.values.pop(0)


def evaluating(folder: Path, values: list[float], **settings: Any) -> RagTrainer:
    model = tiny.rag_model(**JOINT)
    return RagTrainer(
        model,
        arguments(
            folder,
            max_steps=20,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="em",
            greater_is_better=True,
            **settings,
        ),
        tiny.collator(),
        tiny.questions(),
        tiny.questions(),
        refresh="every:3",
        eval_ks=(1, 3),
        eval_limit=5,
        eval_max_new_tokens=3,
        callbacks=[_Answers(values), EarlyStoppingCallback(early_stopping_patience=2)],
    )


def test_best_checkpoint_and_early_stopping(tmp_path: Path) -> None:
    trainer = evaluating(tmp_path, [0.2, 0.6, 0.5, 0.4, 0.3])
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen[state.global_step] = {
                **parameters(trainer.model),
                "index": trainer.model.index.index_emb.clone(),
            }

    trainer.add_callback(Remember())
    trainer.train()
    assert trainer.state.global_step == 8  # best at 4, then two evaluations without a better one
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, seen[4][name]), name
    assert torch.equal(trainer.model.index.index_emb, seen[4]["index"])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8",
    ]


@pytest.mark.parametrize("damage", ["cut", "altered", "index"])
def test_a_damaged_best_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    trainer = evaluating(tmp_path, [0.6, 0.5, 0.4])

    class Damage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                name = "index/vectors.npy" if damage == "index" else "model.safetensors"
                path = tmp_path / "checkpoint-2" / name
                whole = path.read_bytes()
                last = b"" if damage == "cut" else bytes([whole[-1] ^ 1])
                path.write_bytes(whole[:-1] + last)

    trainer.add_callback(Damage())
    with pytest.raises(ValueError, match=r"checkpoint-2/\S+: expected"):
        trainer.train()


def test_a_refresher_of_another_policy_does_not_go_on(tmp_path: Path) -> None:
    resumable(tmp_path, joint=True).train()
    other = resumable(tmp_path, joint=True)
    other.refresher.policy = RefreshPolicy.parse("every:5")
    index, version = other.model.index, other.model.index.version
    message = r"refresher\.pt: state_dict: expected the state of 'every:5', got that of 'every:3'"
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert other.model.index is index and index.version == version
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()
    (tmp_path / "checkpoint-10" / "refresher.pt").unlink()
    with (
        pytest.warns(UserWarning, match="no manifest"),
        pytest.raises(ValueError, match=r"refresher\.pt: expected the state of an IndexRefresher"),
    ):
        resumable(tmp_path, joint=True).train(resume_from_checkpoint=True)


def test_resuming_says_nothing_of_frozen_parameters(tmp_path: Path) -> None:
    """transformers would warn of every parameter that a checkpoint leaves out."""
    resumable(tmp_path, joint=False).train()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(handler)
    try:
        resumable(tmp_path, joint=False).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    finally:
        logger.removeHandler(handler)
    assert not [line for line in lines if "missing keys" in line], lines


class Counter(TrainerCallback, ExportableState):
    """A callback with a state, as EarlyStoppingCallback has one."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"name": self.name}, "attributes": {"steps": self.steps}}


class Another(Counter):
    """The same under another name."""


def test_states_of_callbacks_are_those_of_the_last_step(tmp_path: Path) -> None:
    """Also of two of one class, and of one that a resumed run has and the first had not."""
    first = resumable(tmp_path, joint=False)
    first.add_callback(Counter("a"))
    first.add_callback(Counter("b"))
    first.train()
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    states = [Counter.from_state(each) for each in saved["stateful_callbacks"]["Counter"]]
    assert [(each.name, each.steps) for each in states] == [("a", 8), ("b", 8)]
    second = resumable(tmp_path, joint=False)
    second.add_callback(Another("c"))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    saved = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Another"]["attributes"] == {"steps": 2}


def test_another_checkpointing_of_transformers_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="enable_jit_checkpoint: expected False, since RagTrainer"):
        RagTrainer(tiny.rag_model(), args, tiny.collator(), tiny.questions())


def test_public_hooks_of_transformers_only() -> None:
    """Underscored names of Trainer and of its callbacks are neither defined nor used."""
    private = {
        name
        for each in (*Trainer.__mro__, TrainerState, TrainerControl, CallbackHandler)
        for name in vars(each)
        if name.startswith("_") and not name.startswith("__")
    }
    # what __init__ and the methods set on the instance
    private |= set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(transformers.trainer)))
    assert {"_save_checkpoint", "_load_rng_state", "_created_lr_scheduler"} <= private
    assert not private & {*vars(RagTrainer)}
    for path in Path(inspect.getfile(RagTrainer)).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not private & used, (path, private & used)


def test_early_stopping_of_a_config_counts_on_after_a_resume(tmp_path: Path) -> None:
    def trainer(values: list[float], steps: int) -> RagTrainer:
        training = {
            "output_dir": str(tmp_path),
            "max_steps": steps,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "em",
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        config = rag_config(
            {
                "data.eval_questions": "questions.jsonl",
                "evaluation.early_stopping": 3,
                "evaluation.max_new_tokens": 2,
                "training": training,
            }
        )
        model = tiny.rag_model()
        questions = tiny.questions()
        callbacks = [_Answers(values)]
        made = RagTrainer(model, config, tiny.collator(), questions, questions, callbacks=callbacks)
        # the stand-in has to speak before the one that listens to it
        handler = made.callback_handler
        handler.callbacks.sort(key=lambda each: not isinstance(each, _Answers))
        return made

    trainer([0.5, 0.4], steps=4).train()
    resumed = trainer([0.3, 0.2, 0.1], steps=20)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8  # the third evaluation after the best one
    assert resumed.state.best_global_step == 2


def test_evaluation_metrics_files_and_curve(tmp_path: Path) -> None:
    model = tiny.rag_model()
    trainer = RagTrainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=3, report_to="tensorboard"),
        tiny.collator(),
        tiny.questions(),
        tiny.questions(),
        eval_ks=(1, 12),
        eval_limit=5,
        eval_max_new_tokens=3,
    )
    model.passage_encoder.eval()
    before = trainer.evaluate()
    assert before["eval_n_questions"] == 5 and before["eval_recall@12"] == 1.0
    assert len(trainer.last_evaluation.predictions) == 5
    assert model.training and not model.passage_encoder.training  # as they were
    trainer.train()
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in entries if "eval_em" in each] == [0, 3, 6]
    training = [each for each in entries if "loss" in each]
    assert [each["step"] for each in training] == [1, 2, 3, 4, 5, 6]
    expected = {"prior_entropy", "posterior_entropy", "kl", "unique_passages", "retriever_lr"}
    expected |= {"passages_cut", "retrieval_ms", "tokens_per_second", "learning_rate"}
    assert expected <= training[0].keys()
    assert training[0]["learning_rate"] == training[0]["retriever_lr"] == 5e-3
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert list(tmp_path.glob("tensorboard/events.out.tfevents.*"))


def test_evaluation_sets_by_name_and_without_questions(tmp_path: Path) -> None:
    model = tiny.rag_model()
    questions = tiny.questions()
    sets = {"seen": questions[:6], "new": questions[6:]}
    trainer = RagTrainer(
        model, arguments(tmp_path), tiny.collator(), questions, sets, eval_max_new_tokens=2
    )
    metrics = trainer.evaluate()
    assert {"eval_seen_em", "eval_new_em", "eval_seen_recall@5"} <= metrics.keys()
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset: expected questions"):
        trainer.evaluate()


def test_rejects_arguments_of_another_kind(tmp_path: Path) -> None:
    model: Any = tiny.rag_model()
    given: Any = {"output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"^args: expected a RagConfig or .* got dict$"):
        RagTrainer(model, given, tiny.collator(), tiny.questions())
    nothing: Any = None
    with pytest.raises(ValueError, match=r"^data_collator: expected a RagCollator, got NoneType$"):
        RagTrainer(model, arguments(tmp_path), nothing, tiny.questions())


def test_config_as_arguments(tmp_path: Path) -> None:
    config = rag_config(
        {
            "retriever.learning_rate": 1e-3,
            "refresh.policy": "every:2",
            "training.learning_rate": 2e-3,
            "training.output_dir": str(tmp_path),
            "training.max_steps": 2,
            "training.logging_steps": 1,
            "training.use_cpu": True,
            "training.disable_tqdm": True,
        }
    )
    model = tiny.rag_model(**JOINT)
    trainer = RagTrainer(model, config, tiny.collator(), tiny.questions())
    assert (trainer.retriever_lr, trainer.generator_lr) == (1e-3, 2e-3)
    assert str(trainer.refresher.policy) == "every:2"
    trainer.train()
    assert RagConfig.load(tmp_path / "config.yaml") == config
    assert not list(tmp_path.glob("checkpoint-*"))
