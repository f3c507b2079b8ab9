"""Settings of any kind and text: a config, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrag.train import RagConfig
from fastrag.train.parsing import dotted_hints, parse_yaml
from tests.fuzz.effort import effort
from tests.settings import rag_config

FIELDS = sorted(dotted_hints(RagConfig))
SECTIONS = sorted({name.partition(".")[0] for name in FIELDS})
OTHERS = st.text(st.characters(exclude_characters="."), max_size=10)
NESTED = [
    "rank",
    "alpha",
    "dropout",
    "targets",
    "context",
    "passage",
    "num_cycles",
    "max_steps",
    "x",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**20, 10**400, -1, 0, 1, 5])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["token", "frozen", "every:5", "every:" + "9" * 5000, "1e-3", "x" * 10**4])
    | st.dates()
    | st.binary(max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NESTED) | st.integers() | st.text(max_size=3), inner)
    ),
    max_leaves=6,
)
SETTINGS = st.dictionaries(st.sampled_from(FIELDS) | OTHERS, VALUES, max_size=4)
SETTINGS |= st.dictionaries(st.sampled_from(SECTIONS) | OTHERS, VALUES, max_size=2)
PIECES = [
    *(
        "&a ",
        "*a",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "\n",
        "  ",
        "? ",
        "!!int ",
        "!!float ",
        "!!set ",
    ),
    *("!!timestamp ", "!!binary ", "!!omap ", "!!python/object:a ", "<<: ", "|\n", ">\n", "'", '"'),
    *("#", "%", "---", "...", "@", "0x", "1:60", "1e400", "9" * 5000, "2024-13-45", "~", "=", "\t"),
    *(
        "retriever",
        "n_docs",
        "lora",
        "training",
        ",",
        "\\",
        "\\ud800",
        "é",
        "\0",
        "\ufeff",
        "\x85",
        "0o8",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=30)


def one_line(error: ValueError) -> None:
    message = str(error)
    assert message and len(message) < 1000 and "\n" not in message, message


@pytest.mark.parametrize("examples", effort(quick=200, slow=2000))
def test_any_settings(examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(SETTINGS)
    def check(values: dict[str, Any]) -> None:
        try:
            config = rag_config(values)
        except ValueError as error:
            one_line(error)
            return
        assert RagConfig.from_dict(config.to_dict()) == config or "nan" in str(config)

    check()


@pytest.mark.parametrize("examples", effort(quick=200, slow=2000))
def test_any_yaml(examples: int) -> None:
    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(TEXTS)
    def check(text: str) -> None:
        try:
            value = parse_yaml(text)
        except ValueError as error:
            one_line(error)
            assert str(error).partition(":")[0].isdecimal()
            return
        yaml.safe_dump(value)

    check()


@pytest.mark.parametrize("examples", effort(quick=100, slow=1000))
def test_any_file(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"

    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "replace")))
    def check(data: bytes) -> None:
        path.write_bytes(b"retriever: {question_encoder: a}\nreader: {generator: b}\n" + data)
        try:
            RagConfig.load(path)
        except ValueError as error:
            one_line(error)
            assert str(path) in str(error)

    check()


@pytest.mark.parametrize("examples", effort(quick=30, slow=600))
def test_any_training_arguments(examples: int) -> None:
    fields = ["max_steps", "optim", "fsdp_config", "accelerator_config", "report_to", "debug"]
    fields += ["metric_for_best_model", "eval_strategy", "label_names", "lr_scheduler_kwargs"]
    fields += ["lr_scheduler_type", "warmup_steps", "bf16", "logging_steps"]
    inner = st.dictionaries(st.sampled_from(["num_cycles", "min_lr", "x"]), VALUES, max_size=2)
    training = st.dictionaries(st.sampled_from(fields), VALUES | inner, max_size=3)
    schedules = ["linear", "cosine_with_min_lr", "warmup_stable_decay", "cosine_with_restarts"]

    @settings(derandomize=True, deadline=None, max_examples=examples)
    @given(training, st.sampled_from(schedules))
    def check(training: dict[str, Any], schedule: str) -> None:
        training = {"lr_scheduler_type": schedule, "use_cpu": True} | training
        try:
            rag_config({"training": training}).training_arguments()
        except ValueError as error:
            one_line(error)

    check()
