"""RagConfig: round trip, overrides, and a clear error for every kind of mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrag.cli import main
from fastrag.train import RagConfig
from fastrag.train.parsing import parse_yaml
from fastrag.train.training_config import TrainingConfig
from tests.settings import rag_config


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = rag_config(
        {
            "retriever.learning_rate": 1e-5,
            "reader.lora": {"rank": 8, "alpha": "1e1", "targets": ["q", "v"]},
            "data.template": {"context": "{passage} {question}"},
            "evaluation.ks": [1, 20],
            "training.output_dir": "runs/é",
            "training.lr_scheduler_kwargs": {"num_decay_steps": 4},
            "training.save_strategy": "no",
        }
    )
    assert config.reader.lora.alpha == 10.0
    config.save(tmp_path / "c.yaml")
    assert RagConfig.load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("text", ["{answer}", "null", "1e-4", "true", "[a, b]", "&a x", " "])
def test_texts_of_a_template_are_not_read_as_yaml_again(tmp_path: Path, text: str) -> None:
    template = {"context": text, "answer": text, "answer_end": None, "add_special_tokens": False}
    config = rag_config({"data.template": template})
    assert config.data.template == template
    config.save(tmp_path / "c.yaml")
    assert RagConfig.load(tmp_path / "c.yaml").data.template == template
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    rag_config({"retriever.n_docs": 3, "reader.lora.alpha": 8, "reader.lora.rank": 2}).save(path)
    over = {"retriever": {"tau": "1e-3"}, "reader": {"lora": {"rank": 4}}}
    config = RagConfig.load(path, over)
    assert (config.retriever.n_docs, config.retriever.tau) == (3, 1e-3)
    assert (config.reader.lora.rank, config.reader.lora.alpha) == (4, 8)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 5e-5),
        ({"reader.lora.rank": 4}, 2e-4),
        ({"reader.lora.rank": 4, "training.learning_rate": 5e-5}, 5e-5),
        ({"reader.lora.rank": 4, "training.learning_rate": 0.0}, 0.0),
    ],
)
def test_the_rate_of_the_generator_suits_lora(
    tmp_path: Path, settings: dict[str, Any], rate: float
) -> None:
    """A rate that is given is obeyed; the resolved config states the number."""
    config = rag_config(settings)
    assert config.training.learning_rate == config.training_arguments().learning_rate == rate
    config.save(tmp_path / "c.yaml")
    saved = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert saved["training"]["learning_rate"] == rate
    assert RagConfig.load(tmp_path / "c.yaml") == config


def test_what_is_saved_of_training() -> None:
    """Defaults of our own, and fields of transformers' that were set; no others."""
    saved = rag_config({"training.warmup_steps": 5}).to_dict()["training"]
    assert saved.keys() == TrainingConfig.__annotations__.keys() | {"warmup_steps"}
    assert (saved["warmup_steps"], saved["seed"], saved["save_strategy"]) == (5, 0, "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever.n_doc": 3}, r"retriever\.n_doc: .* did you mean retriever\.n_docs\?$"),
        ({"zzzzzz": 3}, "zzzzzz: unknown setting$"),
        ({8: 3}, "8: unknown setting$"),
        ({"lr": 1e-3}, "lr: .* did you mean retriever.learning_rate, training.learning_rate"),
        ({"generator_lr": 1}, "generator_lr: .* retriever.learning_rate, training.learning_rate"),
        ({"n_docs": 3}, r"n_docs: unknown setting; did you mean retriever\.n_docs\?$"),
        ({"batch_size": 3}, "batch_size: .* mean training.per_device_train_batch_size"),
        ({"steps": 3}, r"steps: unknown setting; did you mean training\.max_steps\?$"),
        ({"lora": {"rank": 3}}, r"lora: unknown setting; did you mean reader\.lora\.rank\?$"),
        ({"refresh": "frozen"}, "refresh: expected a mapping of settings, got 'frozen'"),
        ({"reader.lora.r": 8}, r"reader\.lora\.r: .* did you mean reader\.lora\.rank\?$"),
        ({"reader.lora.lora_alpha": 8}, r"reader\..* did you mean reader\.lora\.alpha\?$"),
        ({"reader.lora": {8: 8}}, "reader.lora.8: unknown setting$"),
        ({"reader.lora.rank": True}, "reader.lora.rank: expected an integer or null, got True"),
        ({"retriever.n_docs": 10**20}, "retriever.n_docs: .* at most 64 bits, got 10{20}$"),
        ({"training.seed": 10**400}, "training.seed: .* 64 bits, got an integer of about 401"),
        ({"retriever.tau": 10**400}, "retriever.tau: expected a number or null, got an integer of"),
        ({"retriever.tau": "x" * 10**6}, r"retriever.tau: .* or null, got 'x{196}\.\.\.$"),
        ({"evaluation.ks": "many"}, "evaluation.ks: expected a list, got 'many'"),
        ({"retriever.n_docs": 0}, "retriever.n_docs: expected an integer >= 1, got 0"),
        ({"retriever.n_docs": 2.5}, "retriever.n_docs: expected an integer, got 2.5"),
        ({"retriever.n_docs": True}, "retriever.n_docs: expected an integer, got True"),
        ({"retriever.n_docs": None}, "retriever.n_docs: expected an integer, got None"),
        ({"training.max_steps": "many"}, "training.max_steps: expected an integer, got 'many'"),
        ({"training.max_steps": 0}, "training.max_steps: expected an integer >= 1 or -1, got 0"),
        ({"retriever.learning_rate": "fast"}, "retriever.learning_rate: expected a number, got 'f"),
        ({"retriever.learning_rate": -1.0}, "retriever.learning_rate: .* a number >= 0, got -1.0"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate: .* >= 0, got nan"),
        ({"retriever.learn_tau": "maybe"}, "retriever.learn_tau: expected true or false, got 'may"),
        ({"loss.marginal": "both"}, "loss.marginal: expected one of token, sequence, got 'both'"),
        ({"data.template": "chatty"}, "data.template: expected plain, chat or a mapping, got"),
        (
            {"retriever.index": "idx", "data.max_passage": 64},
            "data.max_passage: expected null with retriever.index = 'idx', .* got 64",
        ),
        (
            {"retriever.index": "idx", "data.corpus": "default"},
            "data.corpus: expected null with retriever.index = 'idx', .* got 'default'",
        ),
        ({"data.max_passage": 0}, "data.max_passage: expected an integer >= 1 or null, got 0"),
        ({"retriever.explore": 6}, "retriever.explore: .* from 0 to n_docs = 5, got 6"),
        ({"retriever.explore_pool": 4}, "retriever.explore_pool: .* >= n_docs = 5 or null, got 4"),
        ({"retriever.rescore": 4}, "retriever.rescore: expected an integer >= n_docs = 5 or null"),
        ({"refresh.samples": -1}, "refresh.samples: expected an integer >= 0 or null, got -1"),
        ({"retriever.explore_tau": 0.0}, "retriever.explore_tau: expected a number > 0, got 0.0"),
        ({"retriever.tau": 0.0}, "retriever.tau: expected a number > 0 or null, got 0.0"),
        (
            {"loss.objective": "em"},
            "loss.objective: expected one of .'marginal', 'emdr2', .* got 'em'",
        ),
        ({"loss.tau_lm": 0.0}, r"loss.tau_lm: expected a number > 0, got 0\.0"),
        (
            {"loss.label_smoothing": 1.0},
            r"loss.label_smoothing: .* in \[0, 1\), got 1",
        ),
        (
            {"training.label_smoothing_factor": 0.1},
            "training.label_smoothing_factor: expected 0, since loss.label_smoothing sets it",
        ),
        ({"refresh.policy": "sometimes"}, "refresh.*: expected one of .* got 'sometimes'"),
        ({"refresh.policy": "every:0"}, "refresh.*: expected one of .* got 'every:0'"),
        ({"evaluation.ks": []}, r"evaluation.ks: expected integers >= 1, got \[\]"),
        ({"training.adam_beta2": 2}, r"training.adam_beta2: expected a number in \[0, 1\), got 2"),
        ({"training.seed": -1}, r"training.seed: expected an integer from 0 to 2\*\*32 - 1, got"),
        ({"training.num_train_epochs": float("inf")}, "training.num_train_epochs: .* got inf"),
        ({"reader.lora.alpha": 8}, "reader.lora.rank: .* since reader.lora.alpha is set, got None"),
        ({"reader.lora": {"rank": 8, "alpha": 0}}, "reader.lora.alpha: .* > 0 or null, got 0"),
        (
            {"reader.lora": {"rank": 8, "alpha": "x"}},
            "reader.lora.alpha: expected a number or nu",
        ),
        ({"reader.lora": {"rank": 8, "dropout": 1}}, r"reader.lora.dropout: .* \[0, 1\), got 1"),
        ({"reader.lora": {"rank": 8, "targets": 5}}, "reader.lora.targets: .* or a list, got 5"),
        (
            {"evaluation.early_stopping": 2},
            "training.load_best_model_at_end: .* true with ev",
        ),
        (
            {"training.eval_strategy": "steps"},
            "training.eval_strategy: expected no without data.eval_questions, got 'steps'",
        ),
        (
            {"data.eval_questions": "q", "training.eval_steps": 5},
            "training.eval_strategy: expected steps, since eval_steps is 5, got 'no'",
        ),
        ({"training.save_steps": 5}, "training.save_strategy: expected steps, since save_steps is"),
        (
            {"training.metric_for_best_model": "acc"},
            "training.metric.*: .* one of em, .*'acc",
        ),
        ({"training.metric_for_best_model": "recall@7"}, ".* says which k are measured.*recall@7'"),
        ({"training.remove_unused_columns": True}, "training.remove_unused.*: expected false, got"),
        (
            {"training.resume_from_checkpoint": "c"},
            "training.resume_.*: expected null, since --res",
        ),
        ({"training.max_stepz": 3}, "training.max_stepz: unknown .* mean training.max_steps"),
        (
            {"training.accelerator_config": 1},
            "training.accelerator_config: expected a mapping or a text or null, got 1$",
        ),
        ({"retriever.question_encoder": ""}, "retriever.question_encoder: expected a model folder"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in settings.items() if isinstance(key, str)}
    with pytest.raises(ValueError, match=f"^{message}"):
        if len(values) < len(settings):
            RagConfig.from_dict(settings)
        rag_config(values)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "2: expected no aliases, got one"),
        ("n_docs: &n [*n]", "1: expected no aliases, got one"),
        ("template: " + "[" * 10_000, "1: expected at most 32 levels, got more"),
        ("n_docs: 3\nn_docs: 5", "1: expected each key once, got 'n_docs' again"),
        ("steps: 5\nn_docs: " + "9" * 5000, "2: expected a value of YAML's type int, got '99"),
        ("seed: !!timestamp x", "1: expected a value of YAML's type timestamp, got 'x'"),
        ("tau: !!float ''", "1: expected a value of YAML's type float, got ''"),
        ("a: 1\nb: \0", r"2: special characters are not allowed, got '\\x00'"),
        ("#" * 2**18 + "\n", " expected at most 262144 bytes of settings, got more"),
    ],
    ids=lambda each: repr(each)[:20],
)
def test_yaml_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"c\.yaml:{message}") as caught:
        RagConfig.load(path)
    assert len(str(caught.value)) < len(str(path)) + 300
    if len(text) < 2**17:  # the system passes no longer argument
        rag_config().save(path)
        assert main(["train", str(path), f"--retriever.tau={text}", "--print_config"]) == 2
        assert "retriever.tau" in capsys.readouterr().err


def test_words_of_yaml_1_2() -> None:
    assert parse_yaml("[no, on, true, 1e-4, 1.5, .inf, 3, 2024-01-02]") == [
        *("no", "on", True, 1e-4, 1.5, float("inf"), 3, "2024-01-02"),
    ]


def test_mistakes_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(FileNotFoundError):
        RagConfig.load(path)
    path.write_text("retriever: {n_docs: 3}\n")
    with pytest.raises(ValueError, match="c.yaml: retriever.question_encoder: expected a model"):
        RagConfig.load(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="c.yaml: expected a mapping of settings, got list"):
        RagConfig.load(path)
    path.write_text("n_docs: 3\nmarginal: [token\n")
    with pytest.raises(ValueError, match=r"c\.yaml:3: "):
        RagConfig.load(path)
    path.write_bytes(b"n_docs: 3 # \xff\n")
    with pytest.raises(ValueError, match="c.yaml: expected UTF-8 text, byte 12 is not"):
        RagConfig.load(path)


def test_training_arguments(tmp_path: Path) -> None:
    training = {
        "output_dir": str(tmp_path),
        "max_steps": 40,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 0.1,
        "learning_rate": 3e-4,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_strategy": "steps",
        "save_steps": 10,
        "load_best_model_at_end": True,
        "metric_for_best_model": "em",
        "use_cpu": True,
        "report_to": [],
        "dataloader_num_workers": 1,
    }
    settings = {"data.eval_questions": "dev.jsonl", "evaluation.early_stopping": 3}
    config = rag_config(settings | {"training": training, "loss.label_smoothing": 0.1})
    args = config.training_arguments()
    assert {name: getattr(args, name) for name in training if name != "metric_for_best_model"} == {
        name: value for name, value in training.items() if name != "metric_for_best_model"
    }
    assert args.metric_for_best_model in ("em", "eval_em") and args.greater_is_better
    assert (config.best_metric, args.label_smoothing_factor) == ("em", 0.1)
    assert args.restore_callback_states_from_checkpoint and not args.remove_unused_columns
    assert config.training.greater_is_better is None  # the config stays as it is written
    by_loss = rag_config({"training.metric_for_best_model": "loss"}).training_arguments()
    assert by_loss.greater_is_better is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": ["nothing"]}, "training.report_to: expected reporters .*, got 'nothing'"),
        ({"optim": "foo"}, "training: expected values .* foo is not a valid"),
        ({"lr_scheduler_type": "foo"}, "training.lr_scheduler_type: .* linear, .*, got 'foo'"),
        (
            {
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": "x"},
            },
            "training.lr_scheduler_kwargs: expected settings of cosine_with_restarts, got {'num",
        ),
        (
            {"accelerator_config": "no.json"},
            "training: expected values for TrainingArguments: no such file or directory$",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrr": 0.1}},
            "training.lr_scheduler_kwargs.min_lrr: .* mean training.lr_scheduler_kwargs.min_lr",
        ),
    ],
)
def test_mistakes_that_transformers_sees(settings: dict[str, Any], message: str) -> None:
    config = rag_config({"training": settings})
    with pytest.raises(ValueError, match=f"^{message}"):
        config.training_arguments()


def test_resume_may_change_what_is_watched_but_not_what_is_trained() -> None:
    started = rag_config({"training.logging_steps": 10, "training.max_steps": 100})
    watched = {"training.logging_steps": 1, "training.max_steps": 200, "evaluation.limit": 5}
    rag_config(watched).check_resumes(started, "c.yaml")
    for name, value in (("loss.marginal", "sequence"), ("reader.lora.rank", 4)):
        with pytest.raises(ValueError, match=f"{name}: expected .* as in c.yaml, got {value!r}"):
            rag_config({name: value}).check_resumes(started, "c.yaml")
    with pytest.raises(ValueError, match=r"training\.weight_decay: expected 0\.0 as in c.yaml"):
        rag_config({"training.weight_decay": 0.1}).check_resumes(started, "c.yaml")


def test_settings_are_left_as_they_were() -> None:
    values = {"training": {"seed": 2}, "training.seed": 1}
    with pytest.raises(ValueError, match=r"retriever\.question_encoder"):
        RagConfig.from_dict(values)
    assert values == {"training": {"seed": 2}, "training.seed": 1}
