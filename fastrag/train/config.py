"""RagConfig: every setting of a training run, as one flat YAML file.

An unknown key or a value out of range is an error that says what was expected, because a
misspelt setting that is silently ignored costs a whole run. `RagConfig.save` writes the
resolved settings, so that the run folder alone says how a model came to be.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from fastrag.freshness import RefreshPolicy
from fastrag.index.codec import DTYPES
from fastrag.messages import clipped, shown
from fastrag.nn.loss import MARGINALS
from fastrag.nn.objectives import objective_words
from fastrag.train.files import replacing
from fastrag.train.settings import coerce, override, read_yaml, require, require_word, unknown

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What may differ when a run resumes: it changes how long and how a run is watched, not what it
# trains.
FREE_ON_RESUME = (
    "output_dir",
    "steps",
    "epochs",
    "eval_questions",
    "eval_at_start",
    "eval_steps",
    "eval_limit",
    "eval_ks",
    "eval_batch_size",
    "eval_max_new_tokens",
    "best_metric",
    "early_stopping",
    "log_steps",
    "save_steps",
    "keep_checkpoints",
    "encode_batch_size",
    "report_to",
    "device",
    "index_device",
    "training",
)
PRECISIONS = ("fp32", "bf16", "fp16")
GENERATOR_DTYPES = ("auto", "float32", "bfloat16")
ANSWER_CHOICES = ("first", "random")
EVALS_AT_START = ("retrieval", "full", "none")
TEMPLATES = ("plain", "chat")
BEST_METRICS = ("em", "f1", "loss")
GENERATOR_LR = 5e-5
LORA_LR = 2e-4  # the update is a product of two small matrices, one of which starts at zero
POSITIVE = (
    "n_docs",
    "batch_size",
    "accumulation",
    "max_question",
    "max_answer",
    "max_context",
    "eval_batch_size",
    "eval_max_new_tokens",
    "log_steps",
    "encode_batch_size",
)
POSITIVE_OR_NONE = (
    "max_passage",
    "steps",
    "eval_steps",
    "eval_limit",
    "save_steps",
    "keep_checkpoints",
)


@dataclass
class RagConfig:
    """All settings of one training run.

    Paths are taken relative to the working directory. Model parts are local folders: a Hugging
    Face folder, a sentence-transformers folder (encoders only), or one written by fastrag.

    Args:
        question_encoder: folder of the question encoder.
        generator: folder of the seq2seq or causal language model.
        passage_encoder: folder of the passage encoder; None takes the question encoder's.
        corpus: passages file (JSONL, CSV, TSV), or `default` for the embedded set, which None
            stands for. An `index` that is given has its own passages.
        index: folder written by `fastrag index build`; None builds one in the run folder.
        train_questions: questions file, or `default:<split>`.
        eval_questions: questions for the evaluation during training; None evaluates nothing.
        output_dir: run folder.
        marginal: `token` or `sequence` (Lewis et al. 2020, sec. 2.1).
        n_docs: passages per question, K.
        tau: temperature of the scores; None takes 1, or .05 for normalised encoders.
        learn_tau: train the temperature.
        train_passage_encoder: encode the K passages of a step with gradient.
        explore: how many of the K passages are drawn from the softened prior in training.
        explore_pool: how many candidates they are drawn from; None: all passages.
        explore_tau: softening of the prior they are drawn from.
        refresh: `frozen` or `every:<steps>`, when stored vectors are made anew.
        retriever_lr: learning rate of both encoders and the temperature.
        generator_lr: learning rate of the generator; None: 5e-5, or 2e-4 with `lora`.
        weight_decay: AdamW's, on matrices only.
        adam_betas: AdamW's two decay rates.
        lr_scheduler: a schedule name of transformers.
        lr_scheduler_kwargs: further settings of the schedule.
        warmup: warm-up steps when >= 1, else their share of all steps.
        max_grad_norm: gradient clipping; 0 switches it off.
        label_smoothing: epsilon of the marginal loss, in [0, 1).
        objective: `marginal`, `emdr2`, `pdist` or `replug`, see `fastrag.RagLoss`.
        tau_lm: temperature of the generator's say about the passages, in `pdist` and `replug`.
        steps: number of optimiser steps; None trains `epochs`.
        epochs: passes over the questions when `steps` is None.
        batch_size: questions per device and forward pass.
        accumulation: forward passes per optimiser step.
        precision: `fp32`, or autocast to `bf16` or `fp16`.
        generator_dtype: how the generator's weights are kept: `float32`, `bfloat16` (the optimiser
            then updates float32 copies), or `auto`: float32, but bfloat16 where LoRA leaves
            weights as they are that are stored so, and precision is `bf16`.
        gradient_checkpointing: recompute activations in the backward pass.
        max_question: question tokens of the retriever, at which a longer question is cut.
        max_passage: passage tokens of the passage encoder, at which a longer passage is cut when
            the index is built; None: 256. An `index` that is given was cut when it was built.
        max_answer: answer tokens.
        max_context: window of the generator's input.
        answer_choice: train on the `first` or a `random` answer.
        template: `plain`, `chat`, or a mapping of a `Template`'s fields.
        lora: None, or a mapping with `rank` and optionally `alpha`, `dropout`, `targets` (names of
            layers, `all-linear`, or a regular expression for their paths).
        eval_at_start: what to measure before training: `retrieval`, recall@k alone, which takes
            seconds; `full`, answers and loss as well; or `none`.
        eval_steps: evaluate every so many steps; None only before and after training.
        eval_limit: evaluate on so many fixed questions; None on all.
        eval_ks: the k of recall@k.
        eval_batch_size: questions per evaluation batch.
        eval_max_new_tokens: answer length in generation.
        best_metric: metric that picks the best checkpoint, for example `em`; None keeps the last.
        early_stopping: stop after so many evaluations without a better `best_metric`.
        log_steps: log every so many steps.
        save_steps: write a checkpoint every so many steps; None only after a signal. With
            `best_metric`, checkpoints are written at the evaluations instead.
        keep_checkpoints: how many checkpoints to keep besides the best; None keeps all.
        encode_batch_size: passages per batch when the index is built or refreshed.
        seed: seed of everything random.
        report_to: where transformers reports to, for example [tensorboard]; None: TensorBoard if it
            is installed.
        device: `auto` or `cpu`.
        index_dtype: how a new index stores vectors: float32, float16, bfloat16 or int8.
        index_device: `auto`: index and passages where the model trains; `cpu`: on the host;
            `stream`: on the host, a FlatIndex searched where the model trains.
        training: further fields of transformers' TrainingArguments.

    Raises:
        ValueError: a value is out of range or of the wrong type.

    Example:
        >>> config = RagConfig(question_encoder="minilm", generator="smollm2")
        >>> config.n_docs, config.refresh
        (5, 'frozen')
    """

    question_encoder: str
    generator: str
    passage_encoder: str | None = None
    corpus: str | None = None
    index: str | None = None
    train_questions: str = "default:train"
    eval_questions: str | None = None
    output_dir: str = "runs/rag"
    marginal: str = "token"
    n_docs: int = 5
    tau: float | None = None
    learn_tau: bool = False
    train_passage_encoder: bool = False
    explore: int = 0
    explore_pool: int | None = 256
    explore_tau: float = 1.0
    refresh: str = "frozen"
    retriever_lr: float = 2e-5
    generator_lr: float | None = None
    weight_decay: float = 0.0
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    lr_scheduler: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    objective: str = "marginal"
    tau_lm: float = 1.0
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 8
    accumulation: int = 1
    precision: str = "fp32"
    generator_dtype: str = "auto"
    gradient_checkpointing: bool = False
    max_question: int = 64
    max_passage: int | None = None
    max_answer: int = 32
    max_context: int = 512
    answer_choice: str = "first"
    template: str | dict[str, Any] = "plain"
    lora: dict[str, Any] | None = None
    eval_at_start: str = "retrieval"
    eval_steps: int | None = None
    eval_limit: int | None = 200
    eval_ks: list[int] = field(default_factory=lambda: [1, 5])
    eval_batch_size: int = 16
    eval_max_new_tokens: int = 32
    best_metric: str | None = None
    early_stopping: int | None = None
    log_steps: int = 10
    save_steps: int | None = None
    keep_checkpoints: int | None = 2
    encode_batch_size: int = 64
    seed: int = 0
    report_to: list[str] | None = None
    device: str = "auto"
    index_dtype: str = "float32"
    index_device: str = "auto"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):
            setattr(self, each.name, coerce(each.name, getattr(self, each.name), hints[each.name]))
        if self.generator_lr is None:
            self.generator_lr = GENERATOR_LR if self.lora is None else LORA_LR
        for name in POSITIVE:
            require(name, getattr(self, name) >= 1, "an integer >= 1", getattr(self, name))
        for name in (*POSITIVE_OR_NONE, "early_stopping"):
            value = getattr(self, name)
            require(name, value is None or value >= 1, "an integer >= 1 or null", value)
        require_word("marginal", self.marginal, MARGINALS)
        require_word("objective", self.objective, objective_words())
        require_word("precision", self.precision, PRECISIONS)
        require_word("generator_dtype", self.generator_dtype, GENERATOR_DTYPES)
        # the loss scaler of fp16 looks for gradients where the float32 copies are
        fits = (self.generator_dtype, self.precision) != ("bfloat16", "fp16")
        require("generator_dtype", fits, "auto or float32 with precision fp16", "bfloat16")
        require_word("answer_choice", self.answer_choice, ANSWER_CHOICES)
        require_word("eval_at_start", self.eval_at_start, EVALS_AT_START)
        require_word("device", self.device, ("auto", "cpu"))
        require_word("index_dtype", self.index_dtype, DTYPES)
        require_word("index_device", self.index_device, ("auto", "cpu", "stream"))
        if isinstance(self.template, str):
            require_word("template", self.template, TEMPLATES)
        for name in ("retriever_lr", "generator_lr", "weight_decay", "max_grad_norm", "warmup"):
            value = getattr(self, name)
            require(name, math.isfinite(value) and value >= 0.0, "a number >= 0", value)
        for name in ("tau_lm", "explore_tau", "epochs"):
            _require_positive(name, getattr(self, name))
        if self.tau is not None:
            _require_positive("tau", self.tau, " or null")
        pool = self.explore_pool
        require(
            "explore_pool",
            pool is None or pool >= self.n_docs,
            f"an integer >= n_docs = {self.n_docs} or null",
            pool,
        )
        require(
            "label_smoothing",
            0.0 <= self.label_smoothing < 1.0,
            "a number in [0, 1)",
            self.label_smoothing,
        )
        require(
            "explore",
            0 <= self.explore <= self.n_docs,
            f"an integer from 0 to n_docs = {self.n_docs}",
            self.explore,
        )
        require(
            "eval_ks", bool(self.eval_ks) and min(self.eval_ks) >= 1, "integers >= 1", self.eval_ks
        )
        fits = len(self.adam_betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.adam_betas)
        require("adam_betas", fits, "two numbers in [0, 1)", self.adam_betas)
        require("seed", 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1", self.seed)
        RefreshPolicy.parse(self.refresh)
        if self.lora is not None:
            self.lora = _checked_lora(self.lora)
        _check_best_metric(self.best_metric, self.eval_ks)
        if self.index is not None:
            self._require_none("corpus", "which has its own passages")
            self._require_none("max_passage", "whose passages were cut when it was built")
        if self.early_stopping is not None and self.best_metric is None:
            raise ValueError(
                "early_stopping: expected best_metric to be set as well, for example em; got null"
            )
        for name in ("eval_questions", "eval_steps"):
            if self.best_metric is not None and getattr(self, name) is None:
                raise ValueError(
                    f"best_metric: expected {name} to be set when best_metric is "
                    f"{shown(self.best_metric)}, got null"
                )

    def _require_none(self, name: str, why: str) -> None:
        """Refuse a setting that a given index leaves nothing to say."""
        require(
            name,
            getattr(self, name) is None,
            f"null with index = {shown(self.index)}, {why}",
            getattr(self, name),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RagConfig:
        """Make a config from a mapping, refusing unknown keys.

        Args:
            values: setting names and values.

        Returns:
            The validated config.

        Raises:
            ValueError: an unknown key (the nearest known one is named), a missing key, or a value
                out of range.

        Example:
            >>> RagConfig.from_dict({"question_encoder": "a", "generator": "b", "n_doc": 3})
            Traceback (most recent call last):
            ValueError: n_doc: unknown setting; did you mean n_docs?
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"values: expected a mapping of settings, got {shown(values)}")
        known = {each.name: each for each in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(unknown(key, known))
        missing = [
            name
            for name, each in known.items()
            if each.default is dataclasses.MISSING
            and each.default_factory is dataclasses.MISSING
            and name not in values
        ]
        if missing:
            raise ValueError(f"{missing[0]}: expected a value, the config does not give one")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> RagConfig:
        """Read a YAML config, with `key=value` overrides.

        Args:
            path: the YAML file.
            overrides: strings such as `n_docs=8`; values are read as YAML. A dot reaches into a
                mapping: `lora.rank=8`.

        Returns:
            The validated config.

        Raises:
            ValueError: the file is not a YAML mapping, or a setting is wrong; the message starts
                with the file's name.
            OSError: the file cannot be read.

        Example:
            >>> RagConfig.load("train.yaml", ["steps=20"]).steps        # doctest: +SKIP
            20
        """
        values = read_yaml(path)
        for word in overrides or []:
            override(values, word)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def check_resumes(self, other: RagConfig, where: str) -> None:
        """Check that a run with these settings may continue one with other settings.

        Args:
            other: the settings that the run started with.
            where: the file that they stand in, for the error message.

        Raises:
            ValueError: a setting that decides what is trained differs.

        Example:
            >>> start = RagConfig("a", "b", n_docs=5)
            >>> RagConfig("a", "b", n_docs=8).check_resumes(start, "runs/x/config.yaml")
            Traceback (most recent call last):
            ValueError: n_docs: expected 5 as in runs/x/config.yaml, got 8
        """
        for name, before in other.to_dict().items():
            if name not in FREE_ON_RESUME and getattr(self, name) != before:
                raise ValueError(
                    f"{name}: expected {shown(before)} as in {where}, "
                    f"got {shown(getattr(self, name))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as a mapping of plain values.

        Returns:
            A new dict in field order.

        Example:
            >>> RagConfig(question_encoder="a", generator="b").to_dict()["marginal"]
            'token'
        """
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the resolved settings as YAML; the file is replaced in one step.

        Args:
            path: file to write.

        Example:
            >>> RagConfig(question_encoder="a", generator="b").save("c.yaml")  # doctest: +SKIP
        """
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def training_arguments(self) -> TrainingArguments:
        """Give the `transformers.TrainingArguments` that these settings stand for.

        Returns:
            TrainingArguments; fields under `training` win over ours.

        Raises:
            ValueError: a key or value under `training` is none of TrainingArguments, there is no
                such schedule or it takes no such setting, or a reporter is not installed.

        Example:
            >>> args = RagConfig("a", "b", output_dir="runs/x", steps=5).training_arguments()
            >>> args.max_steps, args.remove_unused_columns
            (5, False)
        """
        from fastrag.train.training_arguments import training_arguments

        return training_arguments(self)


def _check_best_metric(name: str | None, eval_ks: list[int]) -> None:
    # transformers would find the mistake at the first evaluation, after hours perhaps
    recalls = [f"recall@{k}" for k in sorted(eval_ks)]
    if name is not None and name not in (*BEST_METRICS, *recalls):
        expected = clipped(", ".join((*BEST_METRICS, *recalls)))
        more = "; eval_ks says which k are measured" if re.match(r"recall@\d+$", name) else ""
        raise ValueError(f"best_metric: expected one of {expected}, got {shown(name)}{more}")


def _checked_lora(lora: dict[str, Any]) -> dict[str, Any]:
    for key in lora:
        if key not in ("rank", "alpha", "dropout", "targets"):
            raise ValueError(unknown(key, ("rank", "alpha", "dropout", "targets"), "lora."))
    hints = {"rank": int, "alpha": int | float, "dropout": float, "targets": str | list[str]}
    require("lora.rank", lora.get("rank") is not None, "an integer >= 1", None)
    values = {key: coerce(f"lora.{key}", lora[key], hints[key]) for key in hints if key in lora}
    require("lora.rank", values["rank"] >= 1, "an integer >= 1", values["rank"])
    _require_positive("lora.alpha", values.get("alpha", 1.0))
    dropout = values.get("dropout", 0.0)
    require("lora.dropout", 0.0 <= dropout < 1.0, "a number in [0, 1)", dropout)
    # PEFT takes a text for a pattern of the whole path, which no name of a layer matches.
    if re.fullmatch(r"[\w.]+", str(values.get("targets", ""))):
        values["targets"] = [values["targets"]]
    return values


def _require_positive(name: str, got: float, otherwise: str = "") -> None:
    require(name, 0.0 < got < math.inf, f"a number > 0{otherwise}", got)
