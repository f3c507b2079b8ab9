"""RagConfig: round trip, overrides, and a clear error for every kind of mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastrag.train import RagConfig

PARTS = {"question_encoder": "enc", "generator": "gen"}


def make(**settings: Any) -> RagConfig:
    return RagConfig.from_dict(PARTS | settings)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = make(
        output_dir="runs/é",
        retriever_lr=1e-5,
        lora={"rank": 8, "alpha": "1e1", "targets": ["q", "v"]},
        template={"context": "{passage} {question}"},
        eval_ks=[1, 20],
        lr_scheduler_kwargs={"num_decay_steps": 4},
        adam_betas=[0.9, 0.98],
    )
    config.save(tmp_path / "c.yaml")
    assert RagConfig.load(tmp_path / "c.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    make(n_docs=3).save(path)
    config = RagConfig.load(
        path, ["n_docs=8", "retriever_lr=1e-3", "lora.rank=4", "steps=null", "eval_ks=[1, 2]"]
    )
    assert (config.n_docs, config.retriever_lr, config.lora) == (8, 1e-3, {"rank": 4})
    assert (config.steps, config.eval_ks) == (None, [1, 2])
    with pytest.raises(ValueError, match="--set: expected key=value, got 'n_docs'"):
        RagConfig.load(path, ["n_docs"])
    with pytest.raises(ValueError, match="--set n_docs.x: n_docs is not a mapping"):
        RagConfig.load(path, ["n_docs.x=1"])
    with pytest.raises(ValueError, match="--set n_docs: expected a YAML value"):
        RagConfig.load(path, ["n_docs=[1"])


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 5e-5),
        ({"lora": {"rank": 4}}, 2e-4),
        ({"lora": {"rank": 4}, "generator_lr": 5e-5}, 5e-5),
        ({"lora": {"rank": 4}, "generator_lr": 0.0}, 0.0),
    ],
)
def test_the_rate_of_the_generator_suits_lora(
    tmp_path: Path, settings: dict[str, Any], rate: float
) -> None:
    """A rate that is given is obeyed; the resolved config states the number."""
    config = make(**settings)
    assert config.generator_lr == config.training_arguments().learning_rate == rate
    config.save(tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["generator_lr"] == rate
    assert RagConfig.load(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_doc": 3}, "n_doc: unknown setting; did you mean n_docs?"),
        ({"zzzzzz": 3}, "zzzzzz: unknown setting$"),
        ({"lr": 1e-3}, r"lr: unknown setting; did you mean retriever_lr, generator_lr\?$"),
        ({"learning_rate": 1}, r"learning_rate: .* did you mean retriever_lr, generator_lr\?$"),
        ({"per_device_train_batch_size": 3}, r"per_device.*; did you mean batch_size\?$"),
        ({"max_steps": 3}, r"max_steps: unknown setting; did you mean steps\?$"),
        ({"lora": {"r": 8}}, r"lora\.r: unknown setting; did you mean lora\.rank\?$"),
        ({"lora": {"lora_alpha": 8}}, r"lora\.lora_alpha: .* did you mean lora\.alpha\?$"),
        ({"lora": {"target_modules": 8}}, r"lora\..* did you mean lora\.targets\?$"),
        ({"lora": {8: 8}}, "lora.8: unknown setting$"),
        ({"lora": {"rank": True}}, "lora.rank: expected an integer, got True"),
        ({"n_docs": 10**20}, "n_docs: expected an integer of at most 64 bits, got 10{20}$"),
        ({"seed": 10**400}, "seed: .* 64 bits, got an integer of about 401 digits$"),
        ({"tau": 10**400}, "tau: expected a number or null, got an integer of about 401 digits$"),
        ({"tau": "x" * 10**6}, r"tau: expected a number or null, got 'x{196}\.\.\.$"),
        ({"eval_ks": "many"}, "eval_ks: expected a list, got 'many'"),
        ({"n_docs": 0}, "n_docs: expected an integer >= 1, got 0"),
        ({"n_docs": 2.5}, "n_docs: expected an integer, got 2.5"),
        ({"n_docs": True}, "n_docs: expected an integer, got True"),
        ({"steps": "many"}, "steps: expected an integer or null, got 'many'"),
        ({"steps": 0}, "steps: expected an integer >= 1 or null, got 0"),
        ({"retriever_lr": "fast"}, "retriever_lr: expected a number, got 'fast'"),
        ({"retriever_lr": -1.0}, "retriever_lr: expected a number >= 0, got -1.0"),
        ({"generator_lr": float("nan")}, "generator_lr: expected a number >= 0, got nan"),
        ({"learn_tau": "yes"}, "learn_tau: expected true or false, got 'yes'"),
        ({"marginal": "both"}, "marginal: expected one of token, sequence, got 'both'"),
        ({"precision": "int8"}, "precision: expected one of fp32, bf16, fp16, got 'int8'"),
        ({"template": "chatty"}, "template: expected one of plain, chat, got 'chatty'"),
        (
            {"index": "idx", "max_passage": 64},
            "max_passage: expected null with index = 'idx', .* got 64",
        ),
        (
            {"index": "idx", "corpus": "default"},
            "corpus: expected null with index = 'idx', .* got 'default'",
        ),
        ({"max_passage": 0}, "max_passage: expected an integer >= 1 or null, got 0"),
        ({"explore": 6}, "explore: expected an integer from 0 to n_docs = 5, got 6"),
        ({"explore_pool": 4}, "explore_pool: expected an integer >= n_docs = 5 or null, got 4"),
        ({"explore_tau": 0.0}, "explore_tau: expected a number > 0, got 0.0"),
        ({"tau": 0.0}, "tau: expected a number > 0 or null, got 0.0"),
        (
            {"objective": "em"},
            "objective: expected one of marginal, emdr2, pdist, replug, got 'em'",
        ),
        ({"tau_lm": 0.0}, r"tau_lm: expected a number > 0, got 0\.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"refresh": "sometimes"}, "refresh: expected one of .* got 'sometimes'"),
        ({"refresh": "every:0"}, "refresh: expected one of .* got 'every:0'"),
        ({"eval_ks": []}, r"eval_ks: expected integers >= 1, got \[\]"),
        ({"adam_betas": [0.9]}, r"adam_betas: expected two numbers in \[0, 1\), got \[0.9\]"),
        ({"adam_betas": [2, 3]}, r"adam_betas: expected two numbers in \[0, 1\), got \[2.0, 3.0\]"),
        ({"seed": -1}, r"seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        ({"epochs": float("inf")}, "epochs: expected a number > 0, got inf"),
        ({"lora": {"rnk": 8}}, "lora.rnk: unknown setting; did you mean lora.rank?"),
        ({"lora": {"alpha": 8}}, "lora.rank: expected an integer >= 1, got None"),
        ({"lora": {"rank": 8, "alpha": 0}}, "lora.alpha: expected a number > 0, got 0"),
        (
            {"lora": {"rank": 8, "alpha": "x"}},
            "lora.alpha: expected an integer or a number, got 'x'",
        ),
        (
            {"lora": {"rank": 8, "dropout": 1}},
            r"lora.dropout: expected a number in \[0, 1\), got 1.0",
        ),
        ({"lora": {"rank": 8, "targets": 5}}, "lora.targets: expected a text or a list, got 5"),
        ({"early_stopping": 2}, "early_stopping: expected best_metric to be set"),
        ({"best_metric": "em"}, "best_metric: expected eval_questions to be set"),
        (
            {"best_metric": "em", "eval_questions": "q"},
            "best_metric: expected eval_steps to be set",
        ),
        ({"question_encoder": ""}, "question_encoder: expected a text, got ''"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**settings)


def test_one_value_is_a_list_of_one() -> None:
    assert make(eval_ks=5).eval_ks == [5]
    assert make(report_to="tensorboard").report_to == ["tensorboard"]
    for targets in ("q_proj", "self_attn.q_proj"):
        assert make(lora={"rank": 8, "targets": targets}).lora["targets"] == [targets]
    for targets in ("all-linear", r".*\.(q|v)_proj"):  # PEFT reads these as texts
        assert make(lora={"rank": 8, "targets": targets}).lora["targets"] == targets
    with pytest.raises(ValueError, match=r"adam_betas: expected two numbers .*, got \[0.9\]"):
        make(adam_betas=0.9)


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "4: expected at most 10000 values, got more"),
        ("n_docs: &n [*n]", "1: expected at most 10000 values, got more"),
        ("template: " + "[" * 10_000, "1: expected at most 32 levels, got more"),
        ("n_docs: 3\nn_docs: 5", "2: expected each key once, got 'n_docs' again"),
        ("steps: 5\nn_docs: " + "9" * 5000, "2: expected a value of YAML's type int, got '99"),
        ("seed: 2024-13-45", "1: expected a value of YAML's type timestamp, got '2024-13-45'"),
        ("tau: !!float ''", "1: expected a value of YAML's type float, got ''"),
        ("a: 1\nb: \0", r"2: special characters are not allowed, got '\\x00'"),
        ("#" * 2**18 + "\n", " expected at most 262144 bytes of settings, got more"),
    ],
    ids=lambda each: repr(each)[:20],
)
def test_yaml_is_bounded(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"c\.yaml:{message}") as caught:
        RagConfig.load(path)
    assert len(str(caught.value)) < len(str(path)) + 300
    if len(text) < 2**17:  # the system passes no longer argument
        with pytest.raises(ValueError, match="--set tau: expected a YAML value, got"):
            RagConfig.load(_minimal(tmp_path), [f"tau={text}"])


def _minimal(folder: Path) -> Path:
    path = folder / "minimal.yaml"
    make().save(path)
    return path


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("question_encoder: &a e\ngenerator: *a\neval_ks: &k [1, 2]\n")
    assert RagConfig.load(path).generator == "e"


def test_mistakes_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(FileNotFoundError):
        RagConfig.load(path)
    path.write_text("n_docs: 3\n")
    with pytest.raises(ValueError, match="c.yaml: question_encoder: expected a value"):
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
    config = make(
        output_dir=str(tmp_path),
        steps=40,
        batch_size=2,
        accumulation=4,
        warmup=0.1,
        generator_lr=3e-4,
        eval_questions="dev.jsonl",
        eval_steps=10,
        best_metric="em",
        early_stopping=3,
        device="cpu",
        report_to=[],
        training={"dataloader_num_workers": 1},
    )
    args = config.training_arguments()
    assert (args.max_steps, args.per_device_train_batch_size) == (40, 2)
    assert (args.gradient_accumulation_steps, args.get_warmup_steps(40)) == (4, 4)
    assert (args.learning_rate, args.dataloader_num_workers) == (3e-4, 1)
    assert args.load_best_model_at_end and args.greater_is_better
    assert (args.metric_for_best_model, args.save_steps, args.eval_steps) == ("eval_em", 10, 10)
    assert args.report_to == [] and args.remove_unused_columns is False
    by_loss = make(eval_questions="d", eval_steps=5, best_metric="loss").training_arguments()
    assert by_loss.greater_is_better is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": ["nothing"]}, "report_to: expected reporters .*, got 'nothing'"),
        ({"training": {"max_stepz": 3}}, "training.max_stepz: unknown .* mean training.max_steps"),
        ({"training": {"max_steps": "abc"}}, "training.max_steps: expected an integer, got 'abc'"),
        ({"training": {"optim": "foo"}}, "training: expected values .* foo is not a valid"),
        ({"lr_scheduler": "foo"}, "lr_scheduler: expected one of linear, .*, got 'foo'"),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            "lr_scheduler_kwargs: expected settings of cosine_with_restarts, got {'num_cycles': 'x",
        ),
        (
            {"training": {"accelerator_config": 1}},
            "training.accelerator_config: expected a mapping or a text or null, got 1$",
        ),
        (
            {"training": {"accelerator_config": "no.json"}},
            "training: expected values for TrainingArguments: no such file or directory$",
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrr": 0.1}},
            "lr_scheduler_kwargs.min_lrr: unknown setting; did you mean lr_scheduler_kwargs.min_lr",
        ),
    ],
)
def test_mistakes_that_transformers_sees(settings: dict[str, Any], message: str) -> None:
    config = make(**settings)
    with pytest.raises(ValueError, match=f"^{message}"):
        config.training_arguments()


def test_resume_may_change_what_is_watched_but_not_what_is_trained() -> None:
    started = make(n_docs=5, log_steps=10, steps=100)
    make(n_docs=5, log_steps=1, steps=200).check_resumes(started, "c.yaml")
    with pytest.raises(ValueError, match="marginal: expected 'token' as in c.yaml, got 'sequence'"):
        make(marginal="sequence").check_resumes(started, "c.yaml")
